r"""Groups: the slices of a network that live or die together.

A *block* is one channel dimension of a network (the outputs of a layer, with everything that a residual add, a batch
normalisation or a flatten ties to them); a *group* is one index of that dimension.  ``GroupSpec`` is plain frozen data:
what belongs to which group, as CSR arrays, and what each group costs.  It knows nothing of priors or scores.

A member's role says how it takes part:

* ``produce``: rows that compute the channel (a layer's output rows and bias, batch-norm affine and statistics);
* ``consume``: columns that read it.  Gates act here, after the nonlinearity, so that a zero gate is a removed channel.

Where no column reads a channel as it is, since a layer normalisation or a product with keys comes first, the gate acts
where the channel is made:

* ``emit``: rows that a gate multiplies, bias included, so that a zero gate makes a channel of zeros;
* ``read``: columns that read what is gated already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyrobc.errors import GroupError, suggest

__all__ = ["Block", "GroupSpec", "Kept", "Layer", "Member", "ParameterInfo", "Role"]

Ints = NDArray[np.int64]
Role = Literal["produce", "consume", "emit", "read"]
Kept = Mapping[str, Ints]
"""Kept group indices, ascending, by block name."""


@dataclass(frozen=True)
class Member:
    """One tensor axis coupled to a block: group ``g`` owns ``indices[ptr[g]:ptr[g + 1]]`` of ``parameter``'s ``axis``.

    ``parameter`` is a parameter or buffer path such as ``"features.0.weight"``.
    """

    parameter: str
    axis: int
    role: Role
    ptr: Ints
    indices: Ints

    @property
    def module(self) -> str:
        """Path of the layer the tensor belongs to."""
        return self.parameter.rpartition(".")[0]

    def owned_by(self, groups: Ints) -> Ints:
        """Indices along ``axis`` owned by these groups."""
        parts = [self.indices[self.ptr[g] : self.ptr[g + 1]] for g in groups]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def group_of_index(self) -> Ints:
        """For each owned index of the axis, in the order of ``sorted(indices)``, the group that owns it."""
        owner = np.repeat(np.arange(len(self.ptr) - 1), np.diff(self.ptr))
        return owner[np.argsort(self.indices, kind="stable")]


@dataclass(frozen=True)
class Block:
    """One prunable channel dimension, named after the layer that produces it, or ``"input"``."""

    name: str
    size: int
    members: tuple[Member, ...]
    origin: Ints | None = None
    """Number of each group in the network that was traced; None where none has been cut."""

    @property
    def is_input(self) -> bool:
        """Whether the channels are features of the network's input, which nothing inside it produces."""
        return all(m.role == "consume" for m in self.members)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read the channels, and where the gate acts."""
        return tuple(m for m in self.members if m.role == "consume")

    @property
    def readers(self) -> tuple[Member, ...]:
        """The members that read the channels."""
        return tuple(m for m in self.members if m.role in ("consume", "read"))

    @property
    def emitters(self) -> tuple[Member, ...]:
        """The members that make the channels, and where the gate acts."""
        return tuple(m for m in self.members if m.role == "emit")


@dataclass(frozen=True)
class ParameterInfo:
    """Shape and kind of a trainable parameter.

    ``weight`` and ``bias`` belong to linear and convolution layers, ``scale`` multiplies normalised channels.
    """

    shape: tuple[int, ...]
    kind: Literal["weight", "bias", "scale", "other"]


@dataclass(frozen=True)
class Layer:
    """Multiply-accumulates of one layer for one example, and the parameter with whose ``axes`` they scale.

    Products of queries and keys scale with the rows of the queries, those with values with the rows of the values.
    """

    weight: str
    macs: int
    calls: int = 1
    axes: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class GroupSpec:
    """The groups of a network, its trainable parameters and its costs; ``left_alone`` maps layers to reasons."""

    blocks: tuple[Block, ...]
    parameters: Mapping[str, ParameterInfo]
    layers: tuple[Layer, ...]
    left_alone: Mapping[str, str]
    tensors: Mapping[str, tuple[int, ...]]
    """Shapes of every parameter and persistent buffer, trainable or not: the identity of the network."""

    @property
    def num_groups(self) -> int:
        """Groups over all blocks."""
        return sum(block.size for block in self.blocks)

    @cached_property
    def by_name(self) -> dict[str, Block]:
        """Blocks by name."""
        return {block.name: block for block in self.blocks}

    def block(self, name: str) -> Block:
        """The block called ``name``.

        Raises:
            GroupError: there is none; the message suggests the nearest name.
        """
        if name not in self.by_name:
            raise GroupError(
                "block", got=repr(name), allowed=", ".join(map(repr, self.by_name)), fix=suggest(name, self.by_name)
            )
        return self.by_name[name]

    def labels(self) -> list[str]:
        """``block[index]`` for every group, in order."""
        return [f"{block.name}[{i}]" for block in self.blocks for i in range(block.size)]

    def everything(self) -> dict[str, Ints]:
        """The empty cut: all groups kept."""
        return {block.name: np.arange(block.size) for block in self.blocks}

    def kept_indices(self, kept: Kept) -> dict[tuple[str, int], Ints]:
        """What stays of every coupled axis: ``{(parameter, axis): ascending indices}``.

        Several blocks may share an axis (concatenation); each removes its own part.
        """
        removed: dict[tuple[str, int], list[Ints]] = {}
        for block in self.blocks:
            gone = np.setdiff1d(np.arange(block.size), kept[block.name])
            for member in block.members:
                removed.setdefault((member.parameter, member.axis), []).append(member.owned_by(gone))
        return {
            (name, axis): np.setdiff1d(np.arange(self.tensors[name][axis]), np.concatenate(gone))
            for (name, axis), gone in removed.items()
        }

    def emptied(self, kept: Kept) -> dict[tuple[str, int], list[tuple[str, int]]]:
        """Tensor axes that ``kept`` leaves without an index, with the groups ``(block, group)`` that own them.

        With concatenation a layer makes only part of a block, and can be emptied while the block is not.
        """
        lost = [key for key, index in self.kept_indices(kept).items() if len(index) == 0]
        return {
            key: [
                (block.name, int(group))
                for block in self.blocks
                for member in block.members
                if (member.parameter, member.axis) == key
                for group in np.flatnonzero(np.diff(member.ptr))
            ]
            for key in lost
        }

    def selecting(self) -> set[str]:
        """Weights whose columns read input features: their layers must select what is kept."""
        return {m.parameter for block in self.blocks if block.is_input for m in block.members}

    def restricted(self, kept: Kept) -> GroupSpec:
        """The groups that are left after a cut, in the numbering of the smaller network."""
        indices = self.kept_indices(kept)
        tensors = dict(self.tensors)
        for (name, axis), index in indices.items():
            tensors[name] = (*tensors[name][:axis], len(index), *tensors[name][axis + 1 :])
            if name in self.selecting() and axis == 1 and len(index) < self.tensors[name][1]:
                tensors[f"{name.removesuffix('weight')}index"] = (len(index),)
        blocks = []
        for block in self.blocks:
            groups = np.asarray(kept[block.name])
            members = []
            for member in block.members:
                sizes = np.diff(member.ptr)[groups]
                ptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
                left = indices[member.parameter, member.axis]
                members.append(replace(member, ptr=ptr, indices=np.searchsorted(left, member.owned_by(groups))))
            origin = groups if block.origin is None else block.origin[groups]
            blocks.append(Block(block.name, len(groups), tuple(members), origin))
        parameters = {name: replace(info, shape=tensors[name]) for name, info in self.parameters.items()}
        layers = []
        for layer in self.layers:
            full, small = (prod(shapes[layer.weight][a] for a in layer.axes) for shapes in (self.tensors, tensors))
            layers.append(replace(layer, macs=layer.macs * small // full))
        return GroupSpec(tuple(blocks), parameters, tuple(layers), self.left_alone, tensors)

    def forecast(self, kept: Kept) -> tuple[int, int]:
        """Parameters and MACs of the network after keeping ``kept``: exact, before anything is cut.

        Parameters are the trainable ones; MACs are per example, of linear and convolution layers and of attention's
        two products.
        """
        small = self.restricted(kept)
        return sum(prod(p.shape) for p in small.parameters.values()), sum(layer.macs for layer in small.layers)
