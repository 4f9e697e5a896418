"""Blocks that a dependency graph proposes, in a form that can be cut: the only file that touches Torch-Pruning.

Torch-Pruning's graph (Fang et al. 2023, "DepGraph") says which channels residual adds, batch norms, flattens and
products tie together, one by one.  Some can only leave together:

* a grouped convolution loses whole groups, with the channels that they read and those that they make.  Equal numbers
  from every group would be exact too, but tie channels that have nothing to do with each other;
* attention loses whole heads.

So channels of one unit are merged into one group, across blocks where a grouped convolution has both sides.  Single
dimensions of heads are two blocks of their own: those of the values, and those that queries share with keys.

The residual stream of a transformer is read through layer normalisations, which mix its channels.  So it is gated where
it is made: embeddings, output rows, and scale and shift of the normalisations, which then count zeros for what is gone.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from pyrobc.attention import Attention
from pyrobc.errors import GroupError
from pyrobc.groups import Block, Ints, Member, Role
from pyrobc.slicing import count_heads, is_depthwise, join_path

__all__ = ["LIFTABLE", "TIED_ALONG", "connect", "list_rows", "make_member", "propose_blocks"]

LIFTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
TIED_ALONG = (nn.BatchNorm1d, nn.BatchNorm2d)
_HEADS = ": heads"
_RESIDUAL = "a layer normalisation or a parameter outside any layer has part in it; prune_residual=True prunes it"
_SOURCES = (*LIFTABLE, *TIED_ALONG, nn.Embedding, nn.Parameter)


@dataclass(frozen=True)
class Proposal:
    """A block, a reason to refuse it or none, and the units of its groups: ``(what, groups, unit of each)``."""

    block: Block
    reason: str = ""
    units: list[tuple[str, Ints, Ints]] = field(default_factory=list)


def propose_blocks(
    net: nn.Module, example_inputs: Any, *, prune_inputs: bool, prune_residual: bool, head_dims: bool
) -> Iterable[tuple[Block, str]]:
    """What the dependency graph proposes, each with a reason to refuse it or an empty string.

    Args:
        net: a network in evaluation mode, all of its parameters trainable.
        example_inputs: inputs, first axis the examples.
        prune_inputs: whether features that linear layers read straight from the input are groups.
        prune_residual: whether channels that pass layer normalisations are.
        head_dims: whether single dimensions of heads are, in place of heads, in ``Attention``.

    Raises:
        GroupError: the graph cannot be built.
    """
    import torch_pruning as tp

    names = {module: name for name, module in net.named_modules()}
    with warnings.catch_warnings(), torch.enable_grad():  # the graph is read off autograd's
        warnings.simplefilter("ignore")
        try:
            graph = tp.DependencyGraph().build_dependency(net, example_inputs=example_inputs)
            groups = list(graph.get_all_groups(root_module_types=list(LIFTABLE)))
        except Exception as error:
            raise GroupError(
                "tracing the network",
                got=f"{type(error).__name__}: {error}",
                allowed="networks whose forward pass autograd can follow",
                fix="keep the forward pass in torch operations, without detach or data-dependent branches",
            ) from error
    if prune_inputs:
        yield from _input_blocks(graph, names)
    order = {name: i for i, name in enumerate(names.values())}
    read = [_read_group(net, graph, group, names, prune_residual) for group in groups]
    split = [part for proposal in read for part in (_split_heads(net, proposal) if head_dims else [proposal])]
    for proposal in sorted(_merge(split), key=lambda p: order[p.block.name]):
        is_read = any((*proposal.block.readers, *proposal.block.emitters))
        yield proposal.block, proposal.reason or ("" if is_read else "nothing prunable reads it")


def make_member(parameter: str, axis: int, role: Role, groups: Any, index: Any, size: int) -> Member:
    """The member in which ``groups[i]`` owns ``index[i]``."""
    order = np.lexsort((index, groups))
    ptr = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=size))]).astype(np.int64)
    return Member(parameter, axis, role, ptr, np.asarray(index)[order].astype(np.int64))


def list_rows(path: str, module: nn.Module, groups: Any, index: Any, size: int) -> list[Member]:
    """The members of a module that makes or normalises channels: all of its tensors, along their first axis."""
    names = ("weight", "bias", "running_mean", "running_var")
    return [
        make_member(join_path(path, name), 0, "produce", groups, index, size)
        for name in names
        if getattr(module, name, None) is not None
    ]


def connect(edges: Ints, size: int) -> tuple[int, Ints]:
    """Connected components of nodes ``0 .. size - 1``: how many, and the number of each node's."""
    ones = np.ones(len(edges), dtype=np.int8)
    num, labels = connected_components(coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(size, size)), False)
    return int(num), labels


def _input_blocks(graph: Any, names: Mapping[nn.Module, str]) -> Iterable[tuple[Block, str]]:
    # A weight's own transpose shows as an input node that has no inputs itself; real inputs have a module behind them.
    def has_upstream(node: Any) -> bool:
        return any(isinstance(i.module, _SOURCES) or has_upstream(i) for i in node.inputs)

    roots = [
        m for m, node in graph.module2node.items() if isinstance(m, nn.Linear) and m in names and not has_upstream(node)
    ]
    is_plain = len(roots) == 1 and "input" not in names.values()
    for module in roots:
        size = module.in_features
        name = "input" if is_plain else f"input:{names[module]}"
        member = make_member(join_path(names[module], "weight"), 1, "consume", np.arange(size), np.arange(size), size)
        yield Block(name, size, (member,)), ""


def _read_group(
    net: nn.Module, graph: Any, group: Any, names: Mapping[nn.Module, str], prune_residual: bool
) -> Proposal:
    members: list[Member] = []
    producers: dict[str, tuple[Ints, Ints]] = {}
    units: list[tuple[str, Ints, Ints]] = []
    reason, is_emitted = "", False
    parameters = {parameter: name for name, parameter in net.named_parameters()}
    order = {name: i for i, name in enumerate(names.values())}
    size = 1 + max(max(item.root_idxs) for item in group)
    for item in group:
        module, handler = item.dep.target.module, item.dep.handler
        is_output_side = bool(graph.is_out_channel_pruning_fn(handler))
        if is_output_side and not item.dep.target.outputs:
            reason = "it makes the network's output"
        groups, index = np.asarray(item.root_idxs), np.asarray(item.idxs)
        if isinstance(module, nn.Parameter):
            is_emitted = True
            axis = max((a for a, length in enumerate(module.shape) if length > 1), default=0)
            members.append(make_member(parameters[module], axis, "emit", groups, index, size))
            continue
        if module not in names:
            continue
        name = names[module]
        if isinstance(module, nn.Embedding):
            is_emitted = True
            members.append(make_member(join_path(name, "weight"), 1, "emit", groups, index, size))
            continue
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine and len(module.normalized_shape) == 1:
            is_emitted = True
            members += list_rows(name, module, groups, index, size)
            continue
        if isinstance(module, LIFTABLE):
            num_units = getattr(module, "groups", 1)
            if num_units > 1 and not is_depthwise(module):
                channels = module.out_channels if is_output_side else module.in_channels
                units.append((name, groups, index * num_units // channels))
                if not is_output_side:
                    continue
            if not is_output_side and not is_depthwise(module):
                members.append(make_member(join_path(name, "weight"), 1, "consume", groups, index, size))
                continue
            if not is_depthwise(module):
                producers[name] = groups, index
        elif not isinstance(module, TIED_ALONG):
            reason = reason or f"it is tied to {name} ({type(module).__name__}), which cannot be cut exactly"
            continue
        members += list_rows(name, module, groups, index, size)
    if is_emitted:
        reason = reason or ("" if prune_residual else _RESIDUAL)
        members = [_gate_where_made(member) for member in members]
    name = min(producers, key=order.__getitem__) if producers else names.get(group[0].dep.target.module, "?")
    for path, heads in count_heads(net, producers).items():
        name = path
        for layer in (layer for layer in producers if layer.rpartition(".")[0] == path):
            groups, index = producers[layer]
            units.append((path + _HEADS, groups, index * heads // (1 + int(index.max()))))
    return Proposal(Block(name, size, tuple(members)), reason, units)


def _gate_where_made(member: Member) -> Member:
    if member.role == "produce" and not member.parameter.endswith(("running_mean", "running_var")):
        return replace(member, role="emit")
    return replace(member, role="read") if member.role == "consume" else member


def _split_heads(net: nn.Module, proposal: Proposal) -> Iterable[Proposal]:
    """The dimensions of values, and those of queries and keys, if the block is one of ``Attention``."""
    path, block = proposal.block.name, proposal.block
    if proposal.reason or not isinstance(net.get_submodule(path), Attention):
        return [proposal]
    query, key, value = (join_path(path, name) for name in ("query", "key", "value"))
    products = [replace(m, role="emit") for m in block.members if m.module == query]
    products += [m for m in block.members if m.module == key]
    values = [m for m in block.members if m.module == value or m.role == "consume"]
    return [Proposal(Block(query, block.size, tuple(products))), Proposal(Block(value, block.size, tuple(values)))]


def _merge(proposals: list[Proposal]) -> Iterable[Proposal]:
    """Groups that share a unit become one, and blocks that share one too."""
    starts = np.cumsum([0, *(p.block.size for p in proposals)])
    nodes: dict[tuple[str, int], list[int]] = {}
    for start, proposal in zip(starts, proposals, strict=False):
        for what, groups, units in proposal.units:
            for group, unit in zip(groups, units, strict=True):
                nodes.setdefault((what, int(unit)), []).append(int(start + group))
    edges = np.array([(group, owners[0]) for owners in nodes.values() for group in owners]).reshape(-1, 2)
    blocks = np.array([(np.searchsorted(starts, node, "right") - 1) for node in edges.ravel()]).reshape(-1, 2)
    _, group_of = connect(edges, int(starts[-1]))
    num_sets, set_of = connect(blocks, len(proposals))
    for number in range(num_sets):
        tied = [i for i, owner in enumerate(set_of) if owner == number]
        if not any(proposals[i].units for i in tied):
            yield from (proposals[i] for i in tied)
            continue
        merged = np.unique(np.concatenate([group_of[starts[i] : starts[i + 1]] for i in tied]))
        members = []
        for i in tied:
            for member in proposals[i].block.members:
                index = np.sort(member.indices)
                groups = np.searchsorted(merged, group_of[starts[i] + member.group_of_index()])
                members.append(make_member(member.parameter, member.axis, member.role, groups, index, len(merged)))
        first = proposals[tied[-1]].block.name
        sides = Counter(what for i in tied for what, _, _ in proposals[i].units if not what.endswith(_HEADS))
        reason = next((proposals[i].reason for i in tied if proposals[i].reason), "")
        if 1 in sides.values():
            reason = reason or "grouped convolution that reads what cannot be cut"
        yield Proposal(Block(first, len(merged), tuple(members)), reason)
