"""The plan: what to keep, why, and where it came from.  Frozen, JSON, replayable, diffable; no torch modules, no Pyro.

A plan is self-contained.  It names the kept indices of every tensor axis, so that applying it needs neither tracing nor
the posterior, and the shapes of the network it belongs to, so that it refuses any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pyrobc.errors import PlanError, suggest
from pyrobc.json_numbers import decode_numbers, encode_numbers
from pyrobc.plan_fields import FORMAT, as_tuples, check_plan, refuse
from pyrobc.plan_parts import BlockPlan, Level, SlicePlan, follow_block, move_block, read_level

__all__ = ["BlockPlan", "Level", "Plan", "SlicePlan", "read_plan"]

_IN_WORDS = "baseline budget by count epsilon level max_worse prior_odds reduction round_to steps z".split()


@dataclass(frozen=True)
class Plan:
    """What ``decide`` returns.

    Attributes:
        network: shape of every tensor of the network the plan belongs to.
        blocks: decisions.
        slices: what they mean for each tensor.
        parameters: trainable parameters before and after.
        macs: multiply-accumulates per example before and after.
        bits: bits per stored number, by tensor; 32 is float32, fewer a grid of ``bits.stored_step``.
        rule: the decision rule and its settings.
        evidence: held-in predictive checks that the decision used.
        provenance: family, settings, seed, versions, references.
        left_alone: layers without groups, and why.
        notes: what a reader should know.
        levels: networks of other sizes that ``at`` can choose, from large to small, each inside the one before.
    """

    network: Mapping[str, tuple[int, ...]]
    blocks: tuple[BlockPlan, ...]
    slices: tuple[SlicePlan, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    bits: Mapping[str, int]
    rule: Mapping[str, Any]
    evidence: Mapping[str, Any]
    provenance: Mapping[str, Any]
    left_alone: Mapping[str, str]
    notes: tuple[str, ...] = ()
    format: int = field(default=FORMAT)
    levels: tuple[Level, ...] = ()

    @property
    def compression_ratio(self) -> float:
        """Parameters before over parameters after."""
        return self.parameters[0] / self.parameters[1]

    @property
    def baseline(self) -> str | None:
        """The baseline that the decision used in place of a log Bayes factor, if any."""
        return self.rule.get("baseline")

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Groups before and after, by block."""
        return {block.name: (block.size, len(block.kept)) for block in self.blocks}

    @property
    def num_abstained(self) -> int:
        """Groups kept because no decision could be made."""
        return sum(block.outcomes.count("abstain") for block in self.blocks)

    def kept(self) -> dict[str, list[int]]:
        """Kept groups by block."""
        return {block.name: block.kept for block in self.blocks}

    def explain(self, group: str) -> str:
        """Why one group, named ``block[index]``, was kept, pruned or left undecided."""
        labels = {f"{b.name}[{i}]": (b, i) for b in self.blocks for i in range(b.size)}
        if group not in labels:
            raise PlanError("group", got=repr(group), allowed="block[index]", fix=suggest(group, labels))
        block, i = labels[group]
        score, odds = ("dF", "log odds") if self.baseline is None else (self.baseline, "minus its cut")
        unit = " nats" if self.baseline is None else ""
        numbers = f"{score} = {block.delta_f[i]:.4g}{unit}, {odds} = {block.log_odds[i]:.4g}"
        return f"{group}: {block.outcomes[i]}: {block.reasons[i]} ({numbers}) by {self.describe_rule()}"

    def describe_rule(self) -> str:
        """The decision rule as it is written in Python, and what it looked at."""
        rule, text = self.rule, self.rule.get("by")
        if text is None:
            odds, z = (rule.get(key) for key in ("prior_odds", "z"))
            text = "BeyondCut()" if self.baseline else f"PosteriorOdds(prior_odds={odds!r}, z={z!r})"
            if self.evidence:
                text += f" & Predictive(max_worse={rule.get('max_worse')!r})"
            if rule.get("budget") is not None:
                text = f"({text}) | Budget(parameters={rule['budget']})"
        for key in ("count", "round_to", "level"):
            text += f", {key}={rule[key]}" if key in rule else ""
        return f"{text} on {self.baseline or rule.get('reduction')}" + (
            "" if self.baseline else f" with epsilon={rule.get('epsilon')}"
        )

    def other_settings(self) -> dict[str, Any]:
        """What ``describe_rule`` leaves out: cuts of a baseline, and what was done to single weights."""
        return {key: value for key, value in self.rule.items() if key not in _IN_WORDS}

    def diff(self, other: Plan) -> list[str]:
        """Where two plans for the same network differ, one line each.

        Raises:
            PlanError: they are for different networks.
        """
        if dict(self.network) != dict(other.network):
            raise PlanError(
                "plan to compare with",
                got="a plan for another network",
                allowed="a plan for the same network",
                fix="compare the two networks instead",
            )
        lines = []
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            for i, (a, b) in enumerate(zip(mine.outcomes, theirs.outcomes, strict=True)):
                if a != b:
                    lines.append(f"{mine.name}[{i}]: {a} -> {b}")
        for old, new in ((self.rule, other.rule), (self.provenance, other.provenance)):
            changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            lines += [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
        return lines

    def at(self, share: float) -> Plan:
        """The plan for the largest stored network of at most this share of the parameters (``add_levels`` stores them).

        Raises:
            PlanError: no stored network is as small.
        """
        fits = [level for level in self.levels if level.parameters <= share * self.parameters[0]]
        if not fits:
            shares = ", ".join(f"{level.parameters / self.parameters[0]:.3g}" for level in self.levels)
            raise PlanError(
                "level of a plan", got=f"{share:g} of the parameters", allowed=f"at least one of {shares or 'none'}",
                fix="store more with add_levels(plan, score, shares)",
            )  # fmt: skip
        chosen = self._moved_to(max(fits, key=lambda level: level.parameters), share)
        note = f"the network of at most {share:g} of the parameters was asked for, whatever the odds"
        return replace(chosen, levels=self.levels, rule={**self.rule, "level": share}, notes=(*self.notes, note))

    def _moved_to(self, level: Level, share: float) -> Plan:
        blocks = tuple(move_block(block, level.kept[block.name], share) for block in self.blocks)
        parameters, macs = (self.parameters[0], level.parameters), (self.macs[0], level.macs)
        return replace(self, blocks=blocks, slices=level.slices, parameters=parameters, macs=macs, levels=())

    def network_left(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the network that applying the plan leaves, selected features included."""
        shapes = {name: list(shape) for name, shape in self.network.items()}
        for part in self.slices:
            shapes[part.tensor][part.axis] = len(part.kept)
            if part.role == "select" and len(part.kept) < self.network[part.tensor][part.axis]:
                shapes[f"{part.tensor.removesuffix('weight')}index"] = [len(part.kept)]
        return {name: tuple(shape) for name, shape in shapes.items()}

    def check_left(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ``PlanError`` where a tensor of a network has another shape than applying the plan leaves."""
        left = self.network_left()
        for name, shape in shapes.items():
            if name in left and shape != left[name]:
                raise PlanError(
                    "network", got=f"{name} of shape {shape}",
                    allowed=f"the network that its plan leaves, with {left[name]} there",
                    fix="pass what bc.apply(plan, net) returns, or the net of bc.compress's result",
                )  # fmt: skip

    def then(self, later: Plan) -> Plan:
        """This plan followed by a plan for the network it leaves: one plan for the original network."""
        if self.network_left() != dict(later.network):
            raise PlanError(
                "plan to follow",
                got="a plan for another network",
                allowed="a plan for the network that the first plan leaves",
                fix="decide on the re-adapted posterior of the cut network",
            )
        blocks = tuple(follow_block(a, b) for a, b in zip(self.blocks, later.blocks, strict=True))
        kept = {(part.tensor, part.axis): part.kept for part in later.slices}
        slices = tuple(
            replace(part, kept=tuple(part.kept[i] for i in kept[part.tensor, part.axis])) for part in self.slices
        )
        return replace(
            later,
            network=self.network,
            blocks=blocks,
            slices=slices,
            parameters=(self.parameters[0], later.parameters[1]),
            macs=(self.macs[0], later.macs[1]),
            notes=tuple(dict.fromkeys((*self.notes, *later.notes))),
            levels=(),
        )

    def to_json(self) -> str:
        """Deterministic JSON text."""
        return json.dumps(encode_numbers(asdict(self)), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Read back what ``to_json`` wrote.

        Raises:
            PlanError: not JSON, another format, or fields that are missing, unknown or inconsistent.
        """
        try:
            data = decode_numbers(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise refuse(source, f"text that is not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise refuse(source, f"format {got!r}")
        try:
            blocks = tuple(BlockPlan(**as_tuples(block)) for block in data.pop("blocks"))
            slices = tuple(SlicePlan(**as_tuples(part)) for part in data.pop("slices"))
            network = {name: tuple(shape) for name, shape in data.pop("network").items()}
            levels = tuple(read_level(level) for level in data.pop("levels", ()))
            plan = cls(blocks=blocks, slices=slices, network=network, levels=levels, **as_tuples(data))
            check_plan(plan, source)
            for level in levels:
                check_plan(plan._moved_to(level, 1.0), source)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise refuse(source, f"wrong fields ({error})") from error
        return plan


def read_plan(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: it cannot be read or is corrupted.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(str(path), f"{type(error).__name__}: {error}") from error
    return Plan.from_json(text, str(path))
