r"""Orders of hidden units: which of the equal networks has the shortest code.

Permuting the units of a layer, together with what they feed, leaves the function as it is.  The model of masks learns
the density of a row from the row before and that of a column from the rows above, so rows are sorted: by how many
weights a unit has (``dense``), or by that plus how many it feeds, each relative to the mean (``both``).  Whether that
or the order given is shortest is not guessed but measured, layer by layer from the first, with ``price_bits``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyrobc.codec.price import price_bits
from pyrobc.slicing import SelectLinear

__all__ = ["order_units"]

Ints = NDArray[np.int64]
_UNITS = (nn.Linear, SelectLinear, nn.Conv1d, nn.Conv2d)
_BETWEEN = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Dropout, nn.Identity, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def order_units(net: nn.Module) -> nn.Module:
    """A copy of ``net`` with the same function and its hidden units in an order that codes shorter.

    Units move between linear and convolutional layers of one ``Sequential`` with nothing but elementwise functions,
    pools, batch norms and flattens between them; all others stay.  Weights that are coded without a mask gain nothing.
    """
    best = copy.deepcopy(net)
    pairs = [
        (parent, i, j) for parent, module in net.named_modules() if type(module) is nn.Sequential
        for i, j in _find_pairs(module)
    ]  # fmt: skip
    bits = price_bits(best) if pairs else 0.0
    for parent, i, j in pairs:
        for order in _candidates(*_layers(best, parent, i, j)):
            other = copy.deepcopy(best)
            _permute(other.get_submodule(parent), i, j, order)
            cost = price_bits(other)
            if cost < bits:
                best, bits = other, cost
    return best


def _find_pairs(chain: nn.Sequential) -> Iterator[tuple[int, int]]:
    """Positions of a layer and of the one that its units feed."""
    start = -1
    for i, module in enumerate(chain):
        if type(module) in _UNITS:
            if start >= 0 and _fits(chain[start], module):
                yield start, i
            start = i
        elif type(module) not in _BETWEEN:
            start = -1


def _fits(first: nn.Module, second: nn.Module) -> bool:
    """Whether each unit of the first owns as many columns of the second, and nothing else meets them."""
    grouped = any(getattr(module, "groups", 1) > 1 for module in (first, second))
    if grouped or isinstance(second, SelectLinear):
        return False
    units, inputs = _size(first, "out"), _size(second, "in")
    return inputs % units == 0 and (inputs == units or isinstance(second, nn.Linear))


def _size(module: nn.Module, side: str) -> int:
    return int(getattr(module, f"{side}_features", 0) or getattr(module, f"{side}_channels", 0))


def _layers(net: nn.Module, parent: str, i: int, j: int) -> tuple[nn.Module, nn.Module]:
    chain = net.get_submodule(parent)
    assert isinstance(chain, nn.Sequential)
    return chain[i], chain[j]


def _candidates(first: nn.Module, second: nn.Module) -> list[Ints]:
    """Orders to try."""
    has = _nonzero(first).reshape(_size(first, "out"), -1).sum(axis=1)
    weight = _nonzero(second)
    feeds = weight.reshape(len(weight), len(has), -1).sum(axis=(0, 2))
    both = has / max(float(has.mean()), 1.0) + feeds / max(float(feeds.mean()), 1.0)
    return [np.argsort(-key, kind="stable") for key in (has, both)]


def _nonzero(module: nn.Module) -> NDArray[np.bool_]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return np.asarray(weight.detach().cpu().numpy() != 0)


def _permute(chain: nn.Module, i: int, j: int, order: Ints) -> None:
    """Reorder the units of layer ``i``, the norms between, and the columns of layer ``j``."""
    assert isinstance(chain, nn.Sequential)
    index = torch.from_numpy(order.copy())
    with torch.no_grad():
        for module in (chain[i], *(chain[k] for k in range(i + 1, j) if type(chain[k]) in _NORMS)):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.ndim and tensor.shape[0] == len(order) and tensor is not getattr(module, "index", None):
                    tensor.copy_(tensor[index.to(tensor.device)])
                elif tensor.ndim and tensor is not getattr(module, "index", None):
                    _repeat(tensor, index.to(tensor.device))
        weight = chain[j].weight
        assert isinstance(weight, torch.Tensor)
        parts = weight.reshape(len(weight), len(order), -1)[:, index.to(weight.device)]
        weight.copy_(parts.reshape(weight.shape))


def _repeat(tensor: torch.Tensor, index: torch.Tensor) -> None:
    """A norm after a flatten has several features for each unit."""
    tensor.copy_(tensor.reshape(len(index), -1)[index].reshape(-1))
