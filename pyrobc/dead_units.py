r"""Cut the groups that weight-level pruning has left without a reader or without an input.

A group whose columns are all deleted is read by nobody: removing it changes nothing.  A group whose rows are all
deleted emits a constant :math:`c`, that of its bias, whatever the input: each reader's bias takes over
:math:`W_{:,g}\,c` (for a convolution, summed over the kernel), and removing it changes nothing either.  It stays where
a reader pads its input, as the border would then see zeros in place of :math:`c`, or has no bias of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc.batches import as_loader, first_batch, move, repeatable
from pyrobc.calling import evaluating
from pyrobc.groups import Block, Ints, Member
from pyrobc.lift import LiftedModel
from pyrobc.lifted_layers import LiftedLayer
from pyrobc.meanfield import NormalFactor
from pyrobc.posterior import Posterior

__all__ = ["remove_dead_units"]

Shifts = list[tuple[str, Tensor]]
"""Biases by site, and what is added to each."""


@torch.no_grad()
def remove_dead_units(posterior: Posterior, data: Any) -> Posterior:
    """The posterior of the network without dead groups; the same one if there are none.  Each layer keeps a channel.

    Args:
        posterior: folded, some of its weights deleted.
        data: rows for the constants; one batch is read.
    """
    current = posterior
    while True:
        kept, shifts = _find_alive(current, data)
        if all(len(kept[block.name]) == block.size for block in current.model.spec.blocks):
            return current
        if shifts:
            current = current.copy()
            _shift_biases(current, shifts)
        current = current.restricted(kept)


def _find_alive(posterior: Posterior, data: Any) -> tuple[dict[str, Ints], Shifts]:
    """Groups that stay, by block, and what the biases of their readers take over from the others."""
    spec, sites = posterior.model.spec, posterior.guide.by_site()
    masks = {n: f.kept for n in spec.parameters if isinstance(f := sites[n], NormalFactor)}
    constants: dict[str, Tensor] | None = None
    kept: dict[str, Ints] = {}
    shifts: dict[tuple[str, int], Shifts] = {}
    for block in spec.blocks:
        is_read = np.zeros(block.size, dtype=np.bool_)
        for member in block.consumers:
            is_read |= _any_kept(masks.get(member.parameter), member, block)
        feeds = [m for m in block.members if m.role == "produce" and len(spec.tensors[m.parameter]) > 1]
        is_fed = np.zeros(block.size, dtype=np.bool_) | (not feeds)
        for member in feeds:
            is_fed |= _any_kept(masks.get(member.parameter), member, block)
        silent = np.flatnonzero(is_read & ~is_fed)
        if len(silent):
            constants = _measure_constants(posterior, data) if constants is None else constants
            for group in silent.tolist():
                found = _find_shifts(posterior, block, group, constants)
                is_fed[group] = found is None
                shifts[block.name, group] = found or []
        kept[block.name] = np.flatnonzero(is_read & is_fed)
    while emptied := spec.emptied(kept):  # a layer keeps a channel, if only a dead one
        name, group = next(iter(emptied.values()))[0]
        kept[name] = np.union1d(kept[name], [group])
        shifts.pop((name, group), None)
    return kept, [change for changes in shifts.values() for change in changes]


def _any_kept(mask: Tensor | None, member: Member, block: Block) -> Any:
    """For each group of ``block``, whether any of its entries of this member is left."""
    if mask is None:
        return np.ones(block.size, dtype=np.bool_)
    lines = mask.transpose(0, member.axis).flatten(1).any(1).cpu().numpy()
    return np.array([lines[member.owned_by(np.array([g]))].any() for g in range(block.size)])


def _find_shifts(posterior: Posterior, block: Block, group: int, constants: dict[str, Tensor]) -> Shifts | None:
    """What each reader's bias has to take over when ``group`` leaves; None if one of them cannot."""
    sites, layers = posterior.guide.by_site(), _lifted(posterior.model)
    found: Shifts = []
    for member in block.consumers:
        index = torch.as_tensor(member.owned_by(np.array([group])))
        weight, bias = sites.get(member.parameter), f"{member.module}.bias".lstrip(".")
        emitted = constants[member.parameter][index]
        pads = _pads(layers[member.parameter]) and bool((emitted != 0).any())
        if pads or bool(emitted.isnan().any()) or not isinstance(weight, NormalFactor):
            return None
        columns = weight.mean().index_select(1, index.to(weight.loc.device))
        shift = (columns.flatten(2).sum(2) if columns.dim() > 2 else columns) @ emitted.to(columns)
        if bool((shift != 0).any()):
            if type(sites.get(bias)) is not NormalFactor:  # none, or one that can only hold multiples of a step
                return None
            found.append((bias, shift))
    return found


def _shift_biases(posterior: Posterior, shifts: Shifts) -> None:
    """A deleted bias comes back with what it has to carry."""
    sites = posterior.guide.by_site()
    for name, shift in shifts:
        bias = sites[name]
        assert isinstance(bias, NormalFactor)
        bias.loc.data.add_(shift)
        bias.kept |= shift != 0
        bias.keep_(bias.kept)


def _lifted(model: LiftedModel) -> dict[str, LiftedLayer]:
    named = model.net.named_modules()
    return {(f"{p}.weight" if p else "weight"): m for p, m in named if isinstance(m, LiftedLayer)}


def _pads(layer: LiftedLayer) -> bool:
    padding = () if layer.convolution is None else layer.convolution.padding
    return padding == "same" or (not isinstance(padding, str) and any(padding))


def _measure_constants(posterior: Posterior, data: Any) -> dict[str, Tensor]:
    """What each input channel of each layer always is in the mean network, by weight; NaN where it varies."""
    model = posterior.model
    constants: dict[str, Tensor] = {}
    handles: list[Any] = []

    def watch(name: str, layer: LiftedLayer) -> None:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            h = args[0] if layer.select is None else args[0].index_select(-1, layer.select)
            lines = h.transpose(0, 1 if layer.convolution is not None else -1).flatten(1)
            low, high = lines.amin(1), lines.amax(1)
            is_constant = high - low <= 1e-6 * high.abs().clamp_min(1.0)
            value = torch.where(is_constant, (low + high) / 2, torch.nan)
            if name in constants:  # a layer that is called again, on what may be other values
                value = torch.where(value == constants[name], value, torch.nan)
            constants[name] = value

        handles.append(layer.register_forward_pre_hook(record))

    for name, layer in _lifted(model).items():
        watch(name, layer)
    try:
        loader = as_loader(data, shuffle=False)
        with evaluating(model), repeatable(loader, posterior.seed):
            inputs = first_batch(loader)[0]
            model.run(posterior.mean(), move(inputs, model.anchor))
    finally:
        for handle in handles:
            handle.remove()
    return constants
