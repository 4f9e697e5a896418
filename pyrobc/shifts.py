"""Shifted copies of inputs: noise, rotation, blur and contrast, at three levels each, the same for every network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from pyrobc.errors import DataError

__all__ = ["SHIFTS", "Shift"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shift:
    """One way to change inputs; ``needs_images``: only of shape ``(rows, channels, height, width)``.

    ``level`` is in ``unit``.
    """

    name: str
    level: float
    unit: str
    change: Callable[[Array, float], Array]
    needs_images: bool = False

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.name} {self.level:g}{self.unit}"

    def fits(self, inputs: Tensor) -> bool:
        """Whether the inputs can be changed in this way."""
        return inputs.dim() == 4 or not self.needs_images

    def __call__(self, inputs: Tensor) -> Tensor:
        """The changed inputs; a seed of its own, so that every network sees the same noise."""
        if not inputs.is_floating_point():
            raise DataError(
                f"inputs for the shift {self.label!r}", got=str(inputs.dtype), allowed="real numbers",
                fix="diagnose networks of real inputs, or pass shifts=()",
            )  # fmt: skip
        changed = self.change(inputs.detach().cpu().double().numpy(), self.level)
        return torch.from_numpy(np.ascontiguousarray(changed)).to(inputs)


def _add_noise(x: Array, level: float) -> Array:
    return np.asarray(x + level * x.std() * np.random.default_rng(0).standard_normal(x.shape))


def _rotate(x: Array, level: float) -> Array:
    # what turns in from outside is the corner's value, background in most images
    return np.asarray(ndimage.rotate(x, level, axes=(-2, -1), reshape=False, order=1, mode="nearest"))


def _blur(x: Array, level: float) -> Array:
    return np.asarray(ndimage.gaussian_filter(x, level, axes=(-2, -1)))


def _flatten_contrast(x: Array, level: float) -> Array:
    mean = x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    return np.asarray(mean + level * (x - mean))


_image = partial(Shift, needs_images=True)
SHIFTS: tuple[Shift, ...] = (
    *(Shift("noise", level, " sd", _add_noise) for level in (0.1, 0.3, 0.5)),
    *(_image("rotation", level, "\u00b0", _rotate) for level in (10.0, 20.0, 30.0)),
    *(_image("blur", level, " px", _blur) for level in (0.5, 1.0, 1.5)),
    *(Shift("contrast", level, "", _flatten_contrast) for level in (0.75, 0.5, 0.25)),
)
"""The battery; noise in standard deviations of all inputs, blur a Gaussian's, contrast about each example's mean."""
