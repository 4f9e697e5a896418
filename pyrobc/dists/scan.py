r"""The order in which a chain walks through a weight tensor, whose neighbours are neighbours in the network.

A chain stays inside what one output computes: of a linear layer it runs along the inputs; of a convolution it runs
through each kernel, row by row in alternate directions (a snake, so that every step is to an adjacent pixel), or over
the input channels at each position of the kernel.  A kernel of one pixel has input channels only.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Walk", "from_chains", "to_chains"]

Walk = Literal["kernel", "channel"]


def to_chains(values: Tensor, shape: torch.Size, walk: Walk) -> Tensor:
    """``[..., *shape]`` as ``[..., outputs, chains of each, nodes]``; of a linear layer ``[..., outputs, nodes]``."""
    if len(shape) == 2:
        return values
    kernel = shape[2:]
    if _is_along_kernel(shape, walk):
        return _turn_odd_rows(values, len(kernel)).flatten(-len(kernel))
    return values.flatten(-len(kernel)).transpose(-1, -2)


def from_chains(chains: Tensor, shape: torch.Size, walk: Walk) -> Tensor:
    """The tensor that ``to_chains`` made these of."""
    if len(shape) == 2:
        return chains
    kernel = shape[2:]
    if _is_along_kernel(shape, walk):
        return _turn_odd_rows(chains.reshape(*chains.shape[:-1], *kernel), len(kernel))
    turned = chains.transpose(-1, -2)
    return turned.reshape(*turned.shape[:-1], *kernel)


def _is_along_kernel(shape: torch.Size, walk: Walk) -> bool:
    return walk == "kernel" and shape[2:].numel() > 1


def _turn_odd_rows(values: Tensor, kernel_dim: int) -> Tensor:
    """Every second row of a kernel backwards; twice is what it was."""
    if kernel_dim < 2:
        return values
    is_odd = torch.arange(values.shape[-2], device=values.device)[:, None] % 2 == 1
    return torch.where(is_odd, values.flip(-1), values)
