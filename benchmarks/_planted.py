"""Data whose truth is known: which inputs a regression uses, and how many hidden units a teacher has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Planted", "draw_regression", "draw_teacher"]


@dataclass(frozen=True)
class Planted:
    """Rows, and the inputs that made the targets."""

    x: Tensor
    y: Tensor
    active: frozenset[int]


def draw_regression(
    seed: int, rows: int, inputs: int = 40, active: int = 6, correlation: float = 0.5, noise: float = 1.0
) -> Planted:
    """Normal inputs whose correlation is ``correlation ** distance``; slopes of size 0.5 to 1.5 on some of them."""
    generator = np.random.default_rng(seed)
    covariance = correlation ** np.abs(np.subtract.outer(np.arange(inputs), np.arange(inputs)))
    x = generator.multivariate_normal(np.zeros(inputs), covariance, size=rows)
    chosen = generator.choice(inputs, active, replace=False)
    slopes = np.zeros(inputs)
    slopes[chosen] = generator.choice([-1, 1], active) * generator.uniform(0.5, 1.5, active)
    y = x @ slopes + noise * generator.normal(size=rows)
    return Planted(torch.tensor(x).float(), torch.tensor(y).float()[:, None], frozenset(chosen.tolist()))


def draw_teacher(seed: int, rows: int = 200, noise: float = 0.5) -> Planted:
    """Three tanh units on four independent inputs."""
    generator = np.random.default_rng(seed)
    weight = np.array([[1.5, -1.0, 0.0, 0.5], [0.0, 1.2, 1.0, -0.8], [-1.0, 0.0, 1.4, 0.3]])
    x = generator.normal(size=(rows, 4))
    y = np.tanh(x @ weight.T + [0.2, -0.3, 0.1]) @ [1.0, -1.2, 0.8] + noise * generator.normal(size=rows)
    return Planted(torch.tensor(x).float(), torch.tensor(y).float()[:, None], frozenset(range(4)))
