"""Mask and slice the tensors of a plain network: the two primitives that surgery and the tracer's self-check share.

``mask_groups`` zeroes what a removed group feeds (its columns in every consumer); ``slice_groups`` removes rows and
columns and corrects the layers' attributes.  Both return copies.  No Pyro, no tracing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc.errors import GroupError
from pyrobc.groups import GroupSpec, Ints, Kept

__all__ = ["SelectLinear", "call_network", "mask_groups", "slice_groups", "slice_tensors"]


class SelectLinear(nn.Linear):
    """A linear layer that reads only some features of its input: what remains after input features were pruned.

    ``index`` holds the features read, ascending; ``in_features`` equals its length.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, index: Tensor) -> None:
        """Take over ``linear``'s tensors, whose columns are already those of ``index``."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = len(index), linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("index", index)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Select, then the affine map."""
        return nn.functional.linear(input.index_select(-1, self.index), self.weight, self.bias)


def call_network(net: nn.Module, inputs: Any) -> Any:
    """Call with a tensor, a tuple of positional inputs or a dict of named ones."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def mask_groups(net: nn.Module, spec: GroupSpec, kept: Kept) -> nn.Module:
    """Copy ``net`` with the columns that read a removed group set to zero; shapes stay as they are."""
    masked = copy.deepcopy(net)
    tensors = _named_tensors(masked)
    with torch.no_grad():
        for block in spec.blocks:
            gone = np.setdiff1d(np.arange(block.size), kept[block.name])
            for member in block.consumers:
                tensor = tensors[member.parameter]
                index = torch.as_tensor(member.owned_by(gone), device=tensor.device)
                tensor.index_fill_(member.axis, index, 0.0)
    return masked


def slice_groups(net: nn.Module, spec: GroupSpec, kept: Kept) -> nn.Module:
    """Copy ``net`` with removed groups gone: a physically smaller ordinary module.

    Raises:
        GroupError: a layer would lose every channel.
    """
    emptied = spec.emptied(kept)
    if emptied:
        raise GroupError(
            "groups to keep",
            got=f"none in {', '.join(sorted({name for name, _ in emptied}))}",
            allowed="at least one channel in every layer",
            fix="keep one of the groups that own it",
        )
    return slice_tensors(net, spec.kept_indices(kept), spec.selecting())


def slice_tensors(net: nn.Module, indices: Mapping[tuple[str, int], Ints], selecting: Collection[str]) -> nn.Module:
    """Copy ``net`` keeping ``indices`` of each ``(tensor path, axis)``.

    The linear layers whose weights are in ``selecting`` read features that nobody inside the network computes, so they
    must select them from their input.
    """
    small = copy.deepcopy(net)
    changed: dict[str, set[int]] = {}
    for (name, axis), index in indices.items():
        path, _, attribute = name.rpartition(".")
        module = small.get_submodule(path)
        tensor = getattr(module, attribute)
        if len(index) == tensor.shape[axis]:
            continue
        cut = tensor.detach().index_select(axis, torch.as_tensor(index, device=tensor.device)).clone()
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        setattr(module, attribute, cut)
        changed.setdefault(path, set()).add(axis)
    for path in changed:
        _correct_attributes(small.get_submodule(path))
        weight = f"{path}.weight" if path else "weight"
        if weight in selecting and 1 in changed[path]:
            linear = cast(nn.Linear, small.get_submodule(path))
            columns = torch.as_tensor(indices[weight, 1], device=linear.weight.device)
            if isinstance(linear, SelectLinear):
                columns = linear.index[columns]
            small = _replace(small, path, SelectLinear(linear, columns))
    return small


def _named_tensors(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.named_parameters()) | dict(net.named_buffers())


def _correct_attributes(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        is_depthwise = module.groups > 1
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[0] if is_depthwise else module.weight.shape[1]
        module.groups = module.weight.shape[0] if is_depthwise else 1
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        sizes = [len(t) for t in (module.weight, module.running_mean) if t is not None]
        module.num_features = sizes[0]


def _replace(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
    return root
