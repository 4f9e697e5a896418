r"""Prune the least needed groups until the network costs no more than it may.

Groups leave in the order of falling log odds, one after the other, until every limit holds; the last group of a layer
never leaves.  Costs are forecasts of ``GroupSpec``: exact, nothing is cut.  Bytes are those of all stored numbers as
float32, without headers; a coded file takes fewer.  Latency is no limit here: it is a measurement on one machine, not a
property of a plan.

``PosteriorOdds() | Budget(parameters=5_000)`` removes what the odds remove, and more if that is not enough; with ``&``
a group must also be negligible, and the budget may not be met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from pyrobc.errors import BudgetError, ConfigError
from pyrobc.groups import GroupSpec, Kept
from pyrobc.outcomes import Outcomes, list_kept
from pyrobc.rules.odds import explain_undefined, name_odds
from pyrobc.rules.rule import NestedEvidence, Odds, Rule, Verdict
from pyrobc.scores import PriorOdds, Score

__all__ = ["Budget", "meet_budget", "rank_groups"]

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Budget(Rule):
    """The least needed groups leave until each of the limits that are given holds.

    Attributes:
        parameters: trainable parameters at most.
        macs: multiply-accumulates per example at most.
        bytes: bytes of all numbers, buffers included, as float32 at most.
        prior_odds: those that rank the groups; the score's default if None.
    """

    parameters: int | None = None
    macs: int | None = None
    bytes: int | None = None
    prior_odds: PriorOdds | None = None
    name: ClassVar[str] = "budget"

    def __post_init__(self) -> None:
        if not self.limits or min(self.limits.values()) <= 0:
            raise ConfigError(
                "budget", got=f"{self!r}", allowed="at least one positive limit: parameters, macs, bytes",
                fix="pass Budget(parameters=5_000), for instance",
            )  # fmt: skip

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are given, by what they limit."""
        limits = {"parameters": self.parameters, "macs": self.macs, "bytes": self.bytes}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        """Evidence is not read.

        Raises:
            BudgetError: a limit cannot be met.
        """
        log_odds = score.log_odds(score.default_odds if self.prior_odds is None else self.prior_odds)
        stays = ("keep", f"the budget of {_name_limits(self.limits)} is met without its removal")
        outcomes: Outcomes = {}
        for name, values in log_odds.items():
            rows = zip(values, score.mcse[name], strict=True)
            outcomes[name] = [
                ("abstain", explain_undefined(score, name, odds, mcse)) if np.isnan(odds) or odds == np.inf else stays
                for odds, mcse in rows
            ]
        meet_budget(score, log_odds, outcomes, self.limits)
        return Verdict(outcomes, log_odds)


def rank_groups(log_odds: Odds) -> list[tuple[float, str, int]]:
    """Groups from the least needed on, with their odds; undefined ones are not among them."""
    return sorted(
        ((odds, name, i) for name, values in log_odds.items() for i, odds in enumerate(values) if np.isfinite(odds)),
        reverse=True,
    )


def meet_budget(score: Score, log_odds: Odds, outcomes: Outcomes, limits: Mapping[str, int]) -> int:
    """Prune further groups, the least needed first, until the limits hold; return how many.

    Raises:
        BudgetError: they cannot be met.
    """
    limit_words = _name_limits(limits)
    ranked = [group for group in rank_groups(log_odds) if outcomes[group[1]][group[2]][0] != "prune"]
    first, added = _count_safe(score.spec, outcomes, ranked, limits), 0
    for number, (odds, name, i) in enumerate(ranked):
        is_checked = number >= first  # before that the limits do not hold yet, and no layer loses its last group
        if is_checked and not _find_excess(score.spec, outcomes, limits):
            break
        before = outcomes[name][i]
        outcomes[name][i] = ("prune", f"to meet the budget of {limit_words} ({name_odds(score)} {odds:.3g})")
        if is_checked and score.spec.emptied(list_kept(outcomes)):
            outcomes[name][i] = before
        else:
            added += 1
    for unit, reached in _find_excess(score.spec, outcomes, limits).items():
        raise BudgetError(
            "budget",
            got=f"{limits[unit]} {unit}",
            allowed=f"at least {reached}, with one group left in every layer",
            fix="raise the budget or lift a smaller network",
        )
    return added


def _count_safe(
    spec: GroupSpec, outcomes: Outcomes, ranked: Sequence[tuple[float, str, int]], limits: Mapping[str, int]
) -> int:
    """How many leave in any case: removals before the first that meets the limits or empties a layer, by bisection."""
    stays = {name: np.array([row[0] != "prune" for row in rows]) for name, rows in outcomes.items()}
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        left = {name: mask.copy() for name, mask in stays.items()}
        for _, name, i in ranked[:middle]:
            left[name][i] = False
        kept = {name: np.flatnonzero(mask) for name, mask in left.items()}
        if spec.emptied(kept) or not _compare(spec, kept, limits):
            high = middle
        else:
            low = middle + 1
    return max(0, low - 1)


def _find_excess(spec: GroupSpec, outcomes: Outcomes, limits: Mapping[str, int]) -> dict[str, int]:
    """What is over its limit, and what it costs now."""
    return _compare(spec, list_kept(outcomes), limits)


def _compare(spec: GroupSpec, kept: Kept, limits: Mapping[str, int]) -> dict[str, int]:
    """What is over its limit, and what it costs now."""
    costs = dict(zip(("parameters", "macs"), spec.forecast(kept), strict=True))
    if "bytes" in limits:
        costs["bytes"] = _FLOAT_BYTES * sum(map(prod, spec.restricted(kept).tensors.values()))
    return {unit: costs[unit] for unit, limit in limits.items() if costs[unit] > limit}


def _name_limits(limits: Mapping[str, int]) -> str:
    return " and ".join(f"{limit} {unit}" for unit, limit in limits.items())
