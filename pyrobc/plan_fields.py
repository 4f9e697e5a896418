"""The fields of a plan that was read: lists as tuples, types as annotated, numbers that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from pyrobc.errors import PlanError

__all__ = ["FORMAT", "OUTCOMES", "as_tuples", "check_plan", "conforms", "refuse"]

FORMAT = 1
OUTCOMES = ("keep", "prune", "abstain")


def conforms(value: Any, hint: Any) -> bool:
    """Whether JSON data, lists as tuples, has the annotated type; a bool is no number, an int will do for a float."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return len(hints) == len(value) and all(map(conforms, value, hints))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(conforms(part, parts[1]) for part in value.values())
    if hint is Any:
        return True
    return isinstance(value, int | float if hint is float else hint) and not isinstance(value, bool)


def as_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same, its lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def check_plan(plan: Any, source: str) -> None:
    """Raise a ``PlanError`` where fields have other types, or numbers that do not belong together."""
    for part in (plan, *plan.blocks, *plan.slices, *plan.levels):
        for name, hint in get_type_hints(type(part)).items():
            if not conforms(getattr(part, name), hint):
                raise refuse(source, f"{name} {repr(getattr(part, name))[:60]}")
    places = [(part.tensor, part.axis) for part in plan.slices]
    if len(set(places)) < len(places) or len(plan.widths) < len(plan.blocks):
        raise refuse(source, "a block or a slice that is there twice")
    for block in plan.blocks:
        columns = (block.outcomes, block.reasons, block.delta_f, block.mcse, block.log_odds)
        if any(len(column) != block.size for column in columns):
            raise refuse(source, f"block {block.name!r} with {block.size} groups but columns of other lengths")
        if not set(block.outcomes) <= set(OUTCOMES):
            raise refuse(source, f"block {block.name!r} with outcomes {sorted(set(block.outcomes) - set(OUTCOMES))}")
    for part in plan.slices:
        shape = plan.network.get(part.tensor)
        if shape is None or not 0 <= part.axis < len(shape):
            raise refuse(source, f"a slice of {part.tensor!r}, axis {part.axis}, which the network does not have")
        kept = np.asarray(part.kept)
        is_sorted = kept.size > 0 and kept.dtype.kind == "i" and bool((np.diff(kept) > 0).all())
        if not is_sorted or kept[0] < 0 or kept[-1] >= shape[part.axis]:
            raise refuse(source, f"kept indices of {part.tensor!r} that are empty, not ascending or out of range")
    if not plan.blocks or not plan.slices:
        raise refuse(source, "no blocks or no slices")
    if not (1 <= plan.parameters[1] <= plan.parameters[0] and 0 <= plan.macs[1] <= plan.macs[0]):
        raise refuse(source, f"parameters {plan.parameters} and MACs {plan.macs}, which do not fall")


def refuse(source: str, got: str) -> PlanError:
    """The error of a plan that is not one."""
    return PlanError(
        source,
        got=got,
        allowed=f"a plan of format {FORMAT}, as written",
        fix="write it again with decide() or compress",
    )
