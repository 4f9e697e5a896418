"""The same distribution in float64, unchecked: scores are in double precision whatever the network was trained in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

__all__ = ["in_double"]


def in_double(dist: Distribution, memo: dict[int, Any] | None = None) -> Distribution:
    """Copy ``dist`` with every floating-point parameter in float64; gradients flow to the original parameters.

    Distributions that share a part still share it when they are converted with the same ``memo``.
    """
    result: Distribution = _convert(dist, {} if memo is None else memo)
    return result


def _convert(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return _widen(value)
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor | Distribution | Transform) for v in value):
        return type(value)([_convert(v, memo) for v in value])
    if not isinstance(value, Distribution | Transform):
        return value
    if id(value) not in memo:
        twin = copy.copy(value)
        # The original is kept alive beside its twin, so that its id cannot be given to another object.
        memo[id(value)] = (value, twin)
        for name, part in vars(value).items():
            if not name.startswith("_cached"):
                object.__setattr__(twin, name, _convert(part, memo))
        if isinstance(twin, Distribution):
            # Values are checked against the support where it matters; a check that raises cannot answer elementwise.
            twin._validate_args = False
    return memo[id(value)][1]


def _widen(tensor: Tensor) -> Tensor:
    """``tensor`` in float64; one that is expanded from fewer numbers stays so instead of being written out."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    parts = tuple(slice(0, 1) if not step and size > 1 else slice(None) for size, step in _dims(tensor))
    return tensor[parts].double().expand(tensor.shape) if parts else tensor.double()


def _dims(tensor: Tensor) -> zip[tuple[int, int]]:
    return zip(tensor.shape, tensor.stride(), strict=True)
