"""Elementwise scores of millions of groups, a cache-full at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["compact", "score_in_chunks"]

# 32,768 doubles: a dozen temporaries of this size stay in a second-level cache instead of going to memory and back.
_CHUNK = 2**15


def compact(tensor: Tensor) -> Tensor:
    """One number expanded to many, as the number it is."""
    is_one = tensor.numel() == 1 or (tensor.numel() > 1 and not any(tensor.stride()))
    return tensor[(0,) * tensor.ndim] if is_one else tensor


def score_in_chunks(score: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``score(*parameters)`` for an elementwise ``score``, in pieces where no gradient is asked for.

    Args:
        score: elementwise function of tensors that broadcast against each other.
        parameters: float64 tensors; a number expanded to many goes to every piece as a number.
    """
    shape = torch.broadcast_shapes(*(t.shape for t in parameters))
    is_recorded = torch.is_grad_enabled() and any(t.requires_grad for t in parameters)
    if is_recorded or shape.numel() <= 2 * _CHUNK:
        return score(*parameters)
    compacted = [compact(t) for t in parameters]
    flat = [t.expand(shape).reshape(-1) if t.ndim else t for t in compacted]
    out = torch.empty(shape.numel(), dtype=torch.float64, device=flat[0].device)
    for start in range(0, shape.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = score(*(t[part] if t.ndim else t for t in flat))
    return out.reshape(shape)
