"""What a plan is made of: decisions by block, slices by tensor, and networks of other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyrobc.plan_fields import as_tuples

__all__ = ["BlockPlan", "Level", "SlicePlan", "follow_block", "move_block", "read_level"]


@dataclass(frozen=True)
class BlockPlan:
    """Decisions on one block: per group an outcome, its reason, and the numbers behind it.

    ``delta_f`` and ``log_odds`` are in nats, unless the plan's rule names a baseline: then they are its own number and
    how far that lies above the block's cut.
    """

    name: str
    size: int
    outcomes: tuple[str, ...]
    reasons: tuple[str, ...]
    delta_f: tuple[float, ...]
    mcse: tuple[float, ...]
    log_odds: tuple[float, ...]

    @property
    def kept(self) -> list[int]:
        """Groups that stay: kept or undecided."""
        return [i for i, outcome in enumerate(self.outcomes) if outcome != "prune"]


@dataclass(frozen=True)
class SlicePlan:
    """Kept indices along one axis of one tensor; roles are those of members, and ``select`` reads network inputs."""

    tensor: str
    axis: int
    role: str
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """A network of another size on the same ranking: its kept groups by block, their slices, and what it costs."""

    kept: Mapping[str, tuple[int, ...]]
    slices: tuple[SlicePlan, ...]
    parameters: int
    macs: int


def read_level(data: Mapping[str, Any]) -> Level:
    """A level from what JSON gives."""
    slices = tuple(SlicePlan(**as_tuples(part)) for part in data["slices"])
    return Level(**{**data, "kept": as_tuples(data["kept"]), "slices": slices})


def move_block(block: BlockPlan, kept: tuple[int, ...], share: float) -> BlockPlan:
    """The block with other groups kept; those whose outcome changes say why."""
    stays, why = set(kept), f"the network of at most {share:g} of the parameters "
    outcomes, reasons = list(block.outcomes), list(block.reasons)
    for i, outcome in enumerate(block.outcomes):
        if (outcome != "prune") != (i in stays):
            outcomes[i], reasons[i] = ("keep", f"{why}has it") if i in stays else ("prune", f"{why}lacks it")
    return replace(block, outcomes=tuple(outcomes), reasons=tuple(reasons))


def follow_block(first: BlockPlan, later: BlockPlan) -> BlockPlan:
    """Survivors of the first decision take the later one's outcome and numbers."""
    columns = ("outcomes", "reasons", "delta_f", "mcse", "log_odds")
    merged: dict[str, list[Any]] = {name: list(getattr(first, name)) for name in columns}
    for position, group in enumerate(first.kept):
        for name in columns:
            merged[name][group] = getattr(later, name)[position]
    return BlockPlan(first.name, first.size, **{name: tuple(values) for name, values in merged.items()})
