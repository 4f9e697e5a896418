"""Mask and slice the tensors of a plain network: the two primitives that surgery and the tracer's self-check share.

``mask_groups`` zeroes what a removed group feeds, its columns in every consumer, or its rows where gates act on those;
``slice_groups`` removes rows and columns and corrects the attributes of layers.  Both return copies.  No Pyro here.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc.attention import Attention
from pyrobc.errors import GroupError
from pyrobc.groups import GroupSpec, Ints, Kept

__all__ = [
    "PartialLayerNorm", "SelectLinear", "count_heads", "is_depthwise", "join_path", "mask_groups", "slice_groups",
    "slice_tensors",
]  # fmt: skip

_HEADS = ("num_heads", "num_attention_heads", "n_heads")


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


class PartialLayerNorm(nn.LayerNorm):
    r"""A layer normalisation over ``full_size`` features, of which all that are not left are zero.

    With :math:`D` features, :math:`d` of them left, the mean is :math:`m = \sum_i x_i / D` and the variance
    :math:`(\sum_i (x_i - m)^2 + (D - d)\,m^2) / D`.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Take over ``norm``'s tensors, which are already cut, while it still says how many features it had."""
        nn.Module.__init__(self)
        self.full_size: int = norm.full_size if isinstance(norm, PartialLayerNorm) else norm.normalized_shape[0]
        self.weight, self.bias, self.eps, self.elementwise_affine = norm.weight, norm.bias, norm.eps, True
        self.normalized_shape = tuple(norm.weight.shape)
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, scale and shift."""
        mean = input.sum(-1, keepdim=True) / self.full_size
        centred = input - mean
        removed = self.full_size - input.shape[-1]
        variance = (centred.square().sum(-1, keepdim=True) + removed * mean.square()) / self.full_size
        scaled = centred * (variance + self.eps).rsqrt() * self.weight
        return scaled if self.bias is None else scaled + self.bias


def join_path(path: str, attribute: str) -> str:
    """Path of a tensor or module inside of the module at ``path``."""
    return f"{path}.{attribute}" if path else attribute


def mask_groups(net: nn.Module, spec: GroupSpec, kept: Kept) -> nn.Module:
    """Copy ``net`` with the columns that read a removed group, or its rows, set to zero; shapes stay as they are."""
    masked = copy.deepcopy(net)
    tensors = _named_tensors(masked)
    with torch.no_grad():
        for block in spec.blocks:
            gone = np.setdiff1d(np.arange(block.size), kept[block.name])
            for member in (*block.consumers, *block.emitters):
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
    _correct_heads(small, [path for path, axes in changed.items() if 0 in axes], indices)
    for path in changed:
        _correct_attributes(small.get_submodule(path))
        weight = join_path(path, "weight")
        if weight in selecting and 1 in changed[path]:
            linear = cast(nn.Linear, small.get_submodule(path))
            columns = torch.as_tensor(indices[weight, 1], device=linear.weight.device)
            if isinstance(linear, SelectLinear):
                columns = linear.index[columns]
            small = _replace(small, path, SelectLinear(linear, columns))
        if isinstance(norm := small.get_submodule(path), nn.LayerNorm):
            small = _replace(small, path, PartialLayerNorm(norm))
    return small


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel with itself."""
    return isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def count_heads(net: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Heads of each module that has two or more of the linear ``layers`` as children, or one that packs three."""
    linear = [path for path in layers if isinstance(net.get_submodule(path), nn.Linear)]
    parents = Counter(path.rpartition(".")[0] for path in linear for _ in range(1 + path.endswith("qkv")))
    heads = {path: _heads_of(net.get_submodule(path)) for path, count in parents.items() if count > 1}
    return {path: num for path, num in heads.items() if num}


def _heads_of(module: nn.Module) -> int:
    return next((n for name in _HEADS if isinstance(n := getattr(module, name, None), int)), 0)


def _correct_heads(net: nn.Module, changed: Collection[str], indices: Mapping[tuple[str, int], Ints]) -> None:
    """Tell attention modules which heads are left, while their layers still say how many rows they had."""
    for path, module in net.named_modules():
        if isinstance(module, Attention):
            layers = ((join_path(path, f"{name}.weight"), getattr(module, name)) for name in ("query", "value"))
            module.shrink(*(indices.get((name, 0), np.arange(layer.out_features)) for name, layer in layers))
    for path in count_heads(net, changed):
        parent: Any = net.get_submodule(path)
        layer = next(cast(nn.Linear, net.get_submodule(p)) for p in changed if p.rpartition(".")[0] == path)
        for name in (*_HEADS, "all_head_size"):
            if not isinstance(parent, Attention) and hasattr(parent, name):
                setattr(parent, name, getattr(parent, name) * len(layer.weight) // layer.out_features)


def _named_tensors(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.named_parameters()) | dict(net.named_buffers())


def _correct_attributes(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:  # whole groups leave
            module.groups = module.groups * module.weight.shape[0] // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        sizes = [len(t) for t in (module.weight, module.running_mean) if t is not None]
        module.num_features = sizes[0]


def _replace(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
    return root
