"""From an outcome for every group to a plan for the network: what stays of each tensor, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrobc.groups import GroupSpec, Ints, Kept
from pyrobc.plan import BlockPlan, Plan, SlicePlan
from pyrobc.scores import Score

__all__ = ["Outcomes", "list_kept", "make_plan", "remove_groups"]

Outcomes = dict[str, list[tuple[str, str]]]
"""``prune``, ``keep`` or ``abstain``, and the reason, for every group of every block."""


def list_kept(outcomes: Outcomes) -> dict[str, Ints]:
    """Groups that are not pruned, by block."""
    return {name: np.flatnonzero([row[0] != "prune" for row in rows]) for name, rows in outcomes.items()}


def make_plan(
    score: Score,
    log_odds: Mapping[str, NDArray[np.float64]],
    outcomes: Outcomes,
    rule: Mapping[str, Any],
    checked: Mapping[str, Any],
    notes: list[str],
) -> Plan:
    """The plan that the outcomes amount to."""
    spec, kept = score.spec, list_kept(outcomes)
    before, after = spec.forecast(spec.everything()), spec.forecast(kept)
    blocks = tuple(
        BlockPlan(
            name=b.name,
            size=b.size,
            outcomes=tuple(row[0] for row in outcomes[b.name]),
            reasons=tuple(row[1] for row in outcomes[b.name]),
            delta_f=tuple(score.delta_f[b.name].tolist()),
            mcse=tuple(score.mcse[b.name].tolist()),
            log_odds=tuple(log_odds[b.name].tolist()),
        )
        for b in spec.blocks
    )
    return Plan(
        network=dict(spec.tensors),
        blocks=blocks,
        slices=_make_slices(spec, kept),
        parameters=(before[0], after[0]),
        macs=(before[1], after[1]),
        bits=dict.fromkeys(spec.tensors, 32),
        rule=dict(rule),
        evidence=dict(checked),
        provenance=dict(score.provenance),
        left_alone=dict(spec.left_alone),
        notes=tuple(notes),
    )


def remove_groups(plan: Plan, spec: GroupSpec, kept: Kept, reason: str) -> Plan:
    """``plan`` with further groups removed for one reason: those that are not among ``kept``.

    Args:
        plan: for the network of ``spec``.
        spec: its groups.
        kept: groups that stay, by block; all of them groups that the plan keeps.
        reason: why the others leave.
    """
    blocks = []
    for block in plan.blocks:
        gone = set(block.kept) - {int(group) for group in kept[block.name]}
        outcomes = tuple("prune" if i in gone else outcome for i, outcome in enumerate(block.outcomes))
        reasons = tuple(reason if i in gone else text for i, text in enumerate(block.reasons))
        blocks.append(replace(block, outcomes=outcomes, reasons=reasons))
    left = {block.name: np.asarray(block.kept) for block in blocks}
    parameters, macs = spec.forecast(left)
    return replace(
        plan, blocks=tuple(blocks), slices=_make_slices(spec, left), parameters=(plan.parameters[0], parameters),
        macs=(plan.macs[0], macs), levels=(),
    )  # fmt: skip


def _make_slices(spec: GroupSpec, kept: dict[str, Ints]) -> tuple[SlicePlan, ...]:
    selecting = spec.selecting()
    roles = {(m.parameter, m.axis): m.role for block in spec.blocks for m in block.members}
    slices = []
    for (tensor, axis), index in spec.kept_indices(kept).items():
        role = "select" if axis == 1 and tensor in selecting else roles[tensor, axis]
        slices.append(SlicePlan(tensor, axis, role, tuple(index.tolist())))
    return tuple(slices)
