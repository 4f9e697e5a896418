r"""From scores and evidence to a plan: prune, keep, or abstain, each with its reason.

A group is pruned if its posterior log odds of being negligible exceed ``z`` Monte Carlo standard errors.  It is left
undecided (and so kept) where the score is undefined or infinite, or where zero lies within those errors.  If held-in
evidence is given, the cut steps back along the nested path until the reduced network's ELPD is not worse than the full
one's by more than ``max_worse`` standard errors of the latter (the rule of Breiman et al. 1984 for choosing the
simplest model that is as good as can be told).  The paired difference and its own, smaller, error are reported too: on
rows that were trained on, a difference can be many of *its* standard errors and still be 0.004 nats a row.

A baseline (``Score.cuts``) is decided on in the same way, with its distance above the block's cut in place of log
odds; a block without a cut is left undecided as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrobc.errors import BudgetError, ConfigError, PlanError
from pyrobc.groups import GroupSpec, Ints
from pyrobc.outcomes import Outcomes, list_kept, make_plan
from pyrobc.plan import Plan
from pyrobc.scores import PriorOdds, Score

__all__ = ["decide"]

_MANY_BAD_ROWS = 0.5


class NestedEvidence(Protocol):
    """What a decision reads of the evidence."""

    @property
    def candidates(self) -> Sequence[Any]:
        """The nested path, the full network among it."""

    @property
    def order(self) -> Ints:
        """Groups from first to leave to last."""

    @property
    def method(self) -> str:
        """How the predictive density was estimated."""

    @property
    def posterior_khat(self) -> float:
        """k-hat of the guide against the posterior."""

    @property
    def good_k(self) -> float:
        """Its limit."""


def decide(
    score: Score,
    evidence: NestedEvidence | None = None,
    *,
    prior_odds: PriorOdds = "implied",
    z: float = 2.0,
    max_worse: float = 2.0,
    budget: int | None = None,
    count: int | None = None,
    empty_block: Literal["keep_best", "raise"] = "keep_best",
) -> Plan:
    """Choose what to prune.

    Args:
        score: log Bayes factors, or a baseline.
        evidence: nested candidates; without them the score alone decides, which the plan notes.
        prior_odds: see ``Score.log_odds``.
        z: Monte Carlo standard errors within which a group is left undecided.
        max_worse: standard errors of the full network's ELPD by which the reduced one's may fall short.
        budget: largest number of parameters; more groups leave in the order of their odds until it is met.
        count: how many groups leave, the least needed first and whatever their odds: for curves, not for decisions.
        empty_block: whether a block that would lose every group keeps its best one, or raises.

    Raises:
        BudgetError: the budget cannot be met.
        PlanError: a block would be emptied and ``empty_block="raise"``.
    """
    if not (z >= 0 and max_worse >= 0) or empty_block not in ("keep_best", "raise"):
        raise ConfigError(
            "decision rule",
            got=f"z={z}, max_worse={max_worse}, empty_block={empty_block!r}",
            allowed="z and max_worse from 0, empty_block 'keep_best' or 'raise'",
            fix="leave them out for the defaults",
        )
    log_odds = score.log_odds(prior_odds)
    outcomes = _judge(score, log_odds, z)
    notes: list[str] = []
    checked: dict[str, Any] = {}
    if evidence is None:
        notes.append("no held-in evidence was given: the score alone decided")
    else:
        checked = _step_back(score, outcomes, evidence, max_worse, notes)
    if count is not None:
        _take_first(outcomes, log_odds, count, notes)
    _refill(score.spec, log_odds, outcomes, empty_block, notes)
    if budget is not None:
        _meet_budget(score, log_odds, outcomes, budget, notes)
    temperature = score.provenance.get("temperature", 1.0)
    if temperature != 1.0:
        notes.append(f"the KL was weighted {temperature:g}: scores are log Bayes factors of a tempered likelihood")
    if score.provenance.get("kl_weights"):
        notes.append("the family weighed the KL of its sites: scores are log Bayes factors of tempered likelihoods")
    rule: dict[str, Any] = {
        "reduction": score.label,
        "epsilon": score.epsilon,
        "prior_odds": prior_odds,
        "z": z,
        "max_worse": max_worse,
        "budget": budget,
    }
    if score.cuts is not None:
        cuts = {name: None if np.isnan(cut) else cut for name, cut in score.cuts.items()}
        settings = {"max_worse": max_worse, "budget": budget}
        rule = {"baseline": score.label, "unit": score.unit, "cuts": cuts, **settings}
    if count is not None:
        rule["count"] = count
    return make_plan(score, log_odds, outcomes, rule, checked, notes)


def _judge(score: Score, log_odds: Mapping[str, NDArray[np.float64]], z: float) -> Outcomes:
    outcomes: Outcomes = {}
    words = _name_odds(score)
    negligible = " of being negligible" if score.cuts is None else ""
    for block in score.spec.blocks:
        rows = []
        for odds, mcse in zip(log_odds[block.name], score.mcse[block.name], strict=True):
            if np.isnan(odds) or odds == np.inf or not np.isfinite(mcse):
                why = score.reasons.get(block.name, "") or f"{words} of {odds}, MCSE {mcse}"
                rows.append(("abstain", f"undefined: {why}"))
            elif abs(odds) <= z * mcse:
                rows.append(("abstain", f"{words} {odds:.3g} within {z:g} x MCSE {mcse:.3g} of zero"))
            elif odds > 0:
                rows.append(("prune", f"{words}{negligible} {odds:.3g} > {z * mcse:.3g}"))
            else:
                rows.append(("keep", f"{words}{negligible} {odds:.3g} < 0"))
        outcomes[block.name] = rows
    return outcomes


def _name_odds(score: Score) -> str:
    return "log odds" if score.cuts is None else f"{score.label} minus its cut"


def _step_back(
    score: Score, outcomes: Outcomes, evidence: NestedEvidence, max_worse: float, notes: list[str]
) -> dict[str, Any]:
    """Undo the removals that no passing candidate covers, the least certain ones; return what was checked."""
    wanted = sum(row[0] == "prune" for rows in outcomes.values() for row in rows)
    path = sorted(evidence.candidates, key=lambda c: c.num_removed)
    full = path[0]
    # up to the first candidate that removes all that is wanted; a difference that is not a number never passes
    beyond = [c for c in path if c.num_removed >= wanted][:1]
    pool = [c for c in path if c.num_removed < wanted] + beyond
    passing = [full, *(c for c in pool if c.diff >= -max_worse * full.se)]
    chosen = max(passing, key=lambda c: c.num_removed)
    failing = next((c for c in pool if c.num_removed > chosen.num_removed), None)
    why = "kept back: no candidate that removes it was checked"
    if failing is not None:
        why = (
            f"kept back: removing {failing.num_removed} groups costs {-failing.diff:.3g} nats of ELPD, "
            f"not known to be within {max_worse:g} x SE {full.se:.3g}"
        )
    ranks = np.argsort(evidence.order)
    starts = dict(zip(outcomes, np.cumsum([0, *map(len, outcomes.values())]), strict=False))
    uncovered = [
        (name, i)
        for name, rows in outcomes.items()
        for i, (outcome, _) in enumerate(rows)
        if outcome == "prune" and ranks[starts[name] + i] >= chosen.num_removed
    ]
    for name, i in uncovered:
        outcomes[name][i] = ("abstain", why)
    if uncovered:
        notes.append(f"stepped back from {wanted} to {wanted - len(uncovered)} groups removed")
    if chosen.khat_bad > _MANY_BAD_ROWS:
        notes.append(f"leave-one-out is unreliable: k-hat is high on {chosen.khat_bad:.0%} of the rows checked")
    if evidence.posterior_khat > evidence.good_k:
        notes.append(
            f"the guide does not cover the posterior (k-hat {evidence.posterior_khat:.2f} > {evidence.good_k:.2f}): "
            "ELPD is that of the guide, and paired differences are its comparison"
        )
    return {"method": evidence.method, "posterior_khat": float(evidence.posterior_khat), "checked": vars(chosen)}


def _rank(log_odds: Mapping[str, NDArray[np.float64]]) -> list[tuple[float, str, int]]:
    """Groups from the least needed on, with their odds; undefined ones are not among them."""
    return sorted(
        ((odds, name, i) for name, values in log_odds.items() for i, odds in enumerate(values) if np.isfinite(odds)),
        reverse=True,
    )


def _take_first(outcomes: Outcomes, log_odds: Mapping[str, NDArray[np.float64]], count: int, notes: list[str]) -> None:
    for rank, (odds, name, i) in enumerate(_rank(log_odds)):
        outcome = "prune" if rank < count else "keep"
        if outcomes[name][i][0] != outcome:
            outcomes[name][i] = (outcome, f"number {rank + 1} of the least needed, of which {count} leave ({odds:.3g})")
    notes.append(f"the {count} least needed groups were asked for, whatever their odds")


def _meet_budget(
    score: Score, log_odds: Mapping[str, NDArray[np.float64]], outcomes: Outcomes, budget: int, notes: list[str]
) -> None:
    added = 0
    for odds, name, i in _rank(log_odds):
        if score.spec.forecast(list_kept(outcomes))[0] <= budget:
            break
        before = outcomes[name][i]
        if before[0] == "prune":
            continue
        outcomes[name][i] = ("prune", f"to meet the budget of {budget} parameters ({_name_odds(score)} {odds:.3g})")
        if score.spec.emptied(list_kept(outcomes)):
            outcomes[name][i] = before
        else:
            added += 1
    reached = score.spec.forecast(list_kept(outcomes))[0]
    if reached > budget:
        raise BudgetError(
            "budget",
            got=f"{budget} parameters",
            allowed=f"at least {reached}, with one group left in every layer",
            fix="raise the budget or lift a smaller network",
        )
    if added:
        notes.append(f"{added} groups were pruned only to meet the budget")


def _refill(
    spec: GroupSpec,
    log_odds: Mapping[str, NDArray[np.float64]],
    outcomes: Outcomes,
    empty_block: str,
    notes: list[str],
) -> None:
    """Give every layer that would lose all its channels its best group back."""
    while emptied := spec.emptied(list_kept(outcomes)):
        (tensor, _), owners = min(emptied.items())
        block = next((name for name, rows in outcomes.items() if all(row[0] == "prune" for row in rows)), None)
        subject = f"layer of {tensor!r}" if block is None else f"block {block!r}"
        owners = owners if block is None else [(block, i) for i in range(len(outcomes[block]))]
        if empty_block == "raise":
            raise PlanError(
                subject,
                got=f"all {len(owners)} groups pruned",
                allowed="at least one group left",
                fix="pass empty_block='keep_best', or check whether the fit learned anything",
            )
        name, best = min(owners, key=lambda owner: log_odds[owner[0]][owner[1]])
        outcomes[name][best] = ("keep", f"the best of a {subject} that would otherwise be empty")
        notes.append(f"every group of {subject} would have been pruned: its best one was kept")
