r"""From scores and evidence to a plan: prune, keep, or abstain, each with its reason.

A rule (``pyrobc.rules``) judges every group.  By default that is posterior odds, or the cut of a baseline, and then, if
held-in evidence is given, the cut steps back along the nested path until the reduced network predicts about as well as
the full one (``rules.predictive``).  No layer is left empty, whatever the rule.

Evidence also tells whether there is anything to keep: a full network whose ELPD is not more than ``max_worse`` standard
errors above that of a predictor that never reads the inputs has learnt nothing that can be told from chance, and the
plan notes that the fit is worthless.  Its groups are still judged as the rule judges them: of labels in random order
the right network is a near-empty one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from pyrobc.errors import BudgetError, ConfigError, PlanError
from pyrobc.groups import GroupSpec
from pyrobc.kinds import check_kind
from pyrobc.outcomes import Outcomes, list_kept, make_plan
from pyrobc.plan import Plan
from pyrobc.rounding import round_up
from pyrobc.rules.budget import meet_budget, rank_groups
from pyrobc.rules.odds import BeyondCut, PosteriorOdds
from pyrobc.rules.predictive import step_back
from pyrobc.rules.rule import NestedEvidence, Odds, Rule
from pyrobc.scores import PriorOdds, Score

__all__ = ["decide"]


def decide(
    score: Score,
    evidence: NestedEvidence | None = None,
    rule: Rule | None = None,
    *,
    prior_odds: PriorOdds = "implied",
    z: float = 2.0,
    max_worse: float = 2.0,
    budget: int | None = None,
    count: int | None = None,
    empty_block: Literal["keep_best", "raise"] = "keep_best",
    round_to: int = 1,
) -> Plan:
    """Choose what to prune.

    Args:
        score: log Bayes factors, or a baseline.
        evidence: nested candidates; without them the score alone decides, which the plan notes.
        rule: one of ``pyrobc.rules``, or several composed; None for the default, which the next five settings describe.
        prior_odds: see ``Score.log_odds``.
        z: Monte Carlo standard errors within which a group is left undecided.
        max_worse: standard errors of the full network's ELPD by which the reduced one's may fall short.
        budget: largest number of parameters; more groups leave in the order of their odds until it is met.
        count: how many groups leave, the least needed first and whatever their odds: for curves, not for decisions.
        empty_block: whether a block that would lose every group keeps its best one, or raises.
        round_to: channels that each block keeps a multiple of, 8 for most hardware; groups come back for it.

    Raises:
        BudgetError: the budget cannot be met, or not with rounded widths.
        ConfigError: settings of the default rule beside a rule of its own.
        PlanError: a block would be emptied and ``empty_block="raise"``.

    Example:
        >>> plan = decide(score, evidence, PosteriorOdds() & FalsePruneRate(0.05))  # doctest: +SKIP
    """
    check_kind(score, Score, "score", "what bc.score returns", "pass decide(score, evidence)")
    if not (z >= 0 and max_worse >= 0) or empty_block not in ("keep_best", "raise"):
        raise ConfigError(
            "decision rule",
            got=f"z={z}, max_worse={max_worse}, empty_block={empty_block!r}",
            allowed="z and max_worse from 0, empty_block 'keep_best' or 'raise'",
            fix="leave them out for the defaults",
        )
    settings = {"prior_odds": prior_odds, "z": z, "max_worse": max_worse, "budget": budget}
    first = _check_rule(rule, settings | {"count": count}) if rule else _choose_first(score, prior_odds, z)
    verdict = first.judge(score, evidence)
    outcomes, log_odds, notes, checked = verdict.outcomes, verdict.log_odds, list(verdict.notes), dict(verdict.checked)
    if evidence is None:
        notes.append("no held-in evidence was given: the score alone decided")
    elif rule is None:
        wanted = _count_pruned(outcomes)
        checked = step_back(outcomes, evidence, max_worse, notes)
        if (left := _count_pruned(outcomes)) < wanted:
            notes.append(f"stepped back from {wanted} to {left} groups removed")
    if evidence is not None and evidence.gain <= max_worse * evidence.gain_se:
        notes.append(
            f"the fit is worthless: its ELPD is {evidence.gain:.3g} nats (SE {evidence.gain_se:.3g}) above that of a "
            "predictor that does not read the inputs; fit longer, with another lr, or check that the targets belong"
        )
    if count is not None:
        _take_first(outcomes, log_odds, count, notes)
    _refill(score.spec, log_odds, outcomes, empty_block, notes)
    if budget is not None and (added := meet_budget(score, log_odds, outcomes, {"parameters": budget})):
        notes.append(f"{added} groups were pruned only to meet the budget")
    if back := round_up(score.spec, log_odds, outcomes, round_to):
        notes.append(f"{back} groups came back to make widths multiples of {round_to}")
        reached = score.spec.forecast(list_kept(outcomes))[0]
        if budget is not None and reached > budget:
            raise BudgetError(
                "budget", got=f"{budget} parameters", allowed=f"at least {reached} with round_to={round_to}",
                fix="raise the budget, or lower round_to",
            )  # fmt: skip
    temperature = score.provenance.get("temperature", 1.0)
    if temperature != 1.0:
        notes.append(f"the KL was weighted {temperature:g}: scores are log Bayes factors of a tempered likelihood")
    if score.provenance.get("kl_weights"):
        notes.append("the family weighed the KL of its sites: scores are log Bayes factors of tempered likelihoods")
    used: dict[str, Any] = {"reduction": score.label, "epsilon": score.epsilon}
    if score.cuts is not None:
        cuts = {name: None if np.isnan(cut) else cut for name, cut in score.cuts.items()}
        used = {"baseline": score.label, "unit": score.unit, "cuts": cuts}
        settings = {"max_worse": max_worse, "budget": budget}
    used |= settings if rule is None else {"by": repr(rule)}
    if count is not None:
        used["count"] = count
    if round_to > 1:
        used["round_to"] = round_to
    return make_plan(score, log_odds, outcomes, used, checked, notes)


def _check_rule(rule: Rule, settings: Mapping[str, Any]) -> Rule:
    check_kind(rule, Rule, "rule", "a rule of pyrobc.rules", "build it first, for instance PosteriorOdds()")
    defaults = inspect.signature(decide).parameters
    if given := [name for name, value in settings.items() if value != defaults[name].default]:
        raise ConfigError(
            "decision rule", got=f"{', '.join(given)} beside {rule!r}", allowed="a rule, or the default one's settings",
            fix="give the settings to rules: PosteriorOdds(prior_odds, z), Predictive(max_worse), Budget(parameters)",
        )  # fmt: skip
    return rule


def _choose_first(score: Score, prior_odds: PriorOdds, z: float) -> Rule:
    """The default for this kind of score; a baseline refuses prior odds."""
    if score.cuts is None:
        return PosteriorOdds(prior_odds, z)
    score.log_odds(prior_odds)
    return BeyondCut()


def _count_pruned(outcomes: Outcomes) -> int:
    return sum(row[0] == "prune" for rows in outcomes.values() for row in rows)


def _take_first(outcomes: Outcomes, log_odds: Odds, count: int, notes: list[str]) -> None:
    for rank, (odds, name, i) in enumerate(rank_groups(log_odds)):
        outcome = "prune" if rank < count else "keep"
        if outcomes[name][i][0] != outcome:
            outcomes[name][i] = (outcome, f"number {rank + 1} of the least needed, of which {count} leave ({odds:.3g})")
    notes.append(f"the {count} least needed groups were asked for, whatever their odds")


def _refill(
    spec: GroupSpec,
    log_odds: Odds,
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
        name, best = min(owners, key=lambda owner: np.nan_to_num(log_odds[owner[0]][owner[1]], nan=-np.inf))
        outcomes[name][best] = ("keep", f"the best of a {subject} that would otherwise be empty")
        notes.append(f"every group of {subject} would have been pruned: its best one was kept")
