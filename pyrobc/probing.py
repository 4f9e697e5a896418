"""Blocks found by disturbing channels, for networks that the dependency graph cannot read or misreads.

One channel of one layer is replaced by noise, every other linear and convolution layer repeats what it gave before, and
what then changes is what the channel reaches: columns of the layers that read it, batch norms, the network's output.
Channels that reach the same place can only leave together.  The channels of a layer are disturbed in one batch, each in
an example of its own.  Concatenation, flattening and whatever else moves channels need no rule then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyrobc.calling import call_network, map_tensors, tensors_of
from pyrobc.groups import Block, Ints
from pyrobc.proposals import LIFTABLE, TIED_ALONG, connect, list_rows, make_member
from pyrobc.slicing import is_depthwise, join_path

__all__ = ["probe_blocks"]

_SIZES = (10.0, -10.0, 1.0)  # of both signs, for nonlinearities that are flat on one side
_ROWS = 64  # channels disturbed in one run
_OUTPUT = "the network's output"
Reach = dict[str, NDArray[np.bool_]]
"""Which channels of a layer reach which inputs of each module: ``[channels, inputs]``."""


def probe_blocks(net: nn.Module, example_inputs: Any, layers: Collection[str]) -> Iterator[tuple[Block, str]]:
    """Blocks that ``layers`` make, each with a reason to refuse it or an empty string.

    Args:
        net: a network in evaluation mode; hooks are set and removed.
        example_inputs: inputs, first axis the examples, of which the first is used.
        layers: linear and convolution layers that are called once.
    """
    modules = dict(net.named_modules())
    reaches = {name: _find_reach(net, name, example_inputs) for name in modules if name in layers}
    sizes = [_num_rows(modules[name]) for name in reaches]
    starts = dict(zip(reaches, np.cumsum([0, *sizes]), strict=False))
    owners: dict[tuple[str, int], list[int]] = {}
    for name, reach in reaches.items():
        for target, touched in reach.items():
            for channel, index in np.argwhere(touched).tolist():
                owners.setdefault((target, index), []).append(int(starts[name]) + channel)
    edges = [(channel, channels[0]) for channels in owners.values() for channel in channels]
    _, group_of = connect(np.array(edges).reshape(-1, 2), sum(sizes))
    layer_of = np.repeat(np.arange(len(sizes)), sizes)
    ties = np.stack([layer_of, layer_of[_first_of(group_of)]], 1)
    num_sets, set_of = connect(ties.reshape(-1, 2), len(sizes))
    for number in range(num_sets):
        tied = [name for name, owner in zip(reaches, set_of, strict=True) if owner == number]
        yield _make_block(modules, tied, {n: group_of[starts[n] :][: _num_rows(modules[n])] for n in tied}, reaches)


def _make_block(
    modules: dict[str, nn.Module], tied: list[str], group_of: dict[str, Ints], reaches: dict[str, Reach]
) -> tuple[Block, str]:
    labels = np.unique(np.concatenate(list(group_of.values())))
    groups = {name: np.searchsorted(labels, found) for name, found in group_of.items()}
    size, reason = len(labels), "" if len(labels) > 1 else "its channels can only leave together"
    members = [m for n in tied for m in list_rows(n, modules[n], groups[n], np.arange(len(groups[n])), size)]
    for target in dict.fromkeys(t for name in tied for t in reaches[name]):
        pairs = [(groups[n][c], i) for n in tied if target in reaches[n] for c, i in np.argwhere(reaches[n][target])]
        owner, index = np.unique(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=0).T
        if not len(index):
            continue
        if target == _OUTPUT:
            reason = "it makes the network's output"
            continue
        module = modules[target]
        if isinstance(module, TIED_ALONG) or is_depthwise(module):
            members += list_rows(target, module, owner, index, size)
        elif isinstance(module, LIFTABLE) and getattr(module, "groups", 1) == 1:
            members.append(make_member(join_path(target, "weight"), 1, "consume", owner, index, size))
        else:
            reason = reason or f"it is tied to {target} ({type(module).__name__}), which cannot be cut exactly"
    if not any(member.role == "consume" for member in members):
        reason = reason or "nothing prunable reads it"
    return Block(tied[0], size, tuple(members)), reason


def _first_of(labels: Ints) -> Ints:
    """For each entry, the first one with the same label."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


def _num_rows(layer: nn.Module) -> int:
    return len(cast(Tensor, layer.weight))


def _find_reach(net: nn.Module, layer: str, example_inputs: Any) -> Reach:
    count = _num_rows(net.get_submodule(layer))
    found: dict[str, list[NDArray[np.bool_]]] = {}
    for start in range(0, count, _ROWS):
        rows = min(_ROWS, count - start)
        one = torch.zeros(rows, dtype=torch.long)
        inputs = map_tensors(example_inputs, partial(torch.index_select, dim=0, index=one))
        calm = _Run(net, layer)
        calm(inputs)
        touched: dict[str, NDArray[np.bool_]] = {}
        for size in _SIZES:
            run = _Run(net, layer, calm, size, start)
            run(inputs)
            for name, values in run.seen.items():
                for a, b in zip(values, calm.seen[name], strict=True):
                    changed = _reduce(a != b, net, name, rows)
                    touched[name] = touched[name] | changed if name in touched else changed
        for name, changed in touched.items():
            found.setdefault(name, []).append(changed)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _reduce(changed: Tensor, net: nn.Module, name: str, rows: int) -> NDArray[np.bool_]:
    """``[rows, inputs]`` of a module; one input where channels do not matter."""
    module = None if name == _OUTPUT else net.get_submodule(name)
    if not isinstance(module, LIFTABLE + TIED_ALONG):
        return changed.reshape(rows, -1).any(1, keepdim=True).numpy()
    channel = -1 if isinstance(module, nn.Linear) else 1
    flat = changed.movedim(channel, -1).reshape(rows, -1, changed.shape[channel])
    return flat.any(1).numpy()


class _Run:
    """One forward pass: what each module with tensors of its own was given, call by call.

    Given an earlier run, linear and convolution layers repeat its outputs, and row ``i`` of what ``layer`` gives has
    noise in channel ``start + i``.
    """

    def __init__(
        self, net: nn.Module, layer: str, earlier: _Run | None = None, size: float = 0.0, start: int = 0
    ) -> None:
        self.net, self.layer, self.earlier, self.size, self.start = net, layer, earlier, size, start
        self.generator = torch.Generator().manual_seed(start)
        self.seen: dict[str, list[Tensor]] = {}
        self.given: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, inputs: Any) -> None:
        handles = []
        for name, module in self.net.named_modules():
            if isinstance(module, TIED_ALONG) or any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_hook(self._make_hook(name)))
        try:
            self.seen[_OUTPUT] = tensors_of(call_network(self.net, inputs))
        finally:
            for handle in handles:
                handle.remove()

    def _make_hook(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> Any:
            self.seen.setdefault(name, []).extend(tensors_of(args))
            if isinstance(module, TIED_ALONG):
                return args[0]  # its scale and shift could send all that comes to where a ReLU is flat
            if not isinstance(module, LIFTABLE) or is_depthwise(module):
                return None
            calls = self.given.setdefault(name, [])
            if self.earlier is not None:
                output = self.earlier.given[name][len(calls)]
                output = self._disturb(output, -1 if isinstance(module, nn.Linear) else 1, name)
            calls.append(output)
            return output

        return record

    def _disturb(self, output: Tensor, channel: int, name: str) -> Tensor:
        if name != self.layer:
            return output
        moved = output.clone().movedim(channel, 1)
        rows = torch.arange(len(moved))
        noise = torch.randn(moved[rows, self.start + rows].shape, generator=self.generator)
        moved[rows, self.start + rows] = self.size * noise.abs().to(moved)
        return moved.movedim(1, channel)
