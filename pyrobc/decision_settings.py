"""Settings of scoring, evidence and decision that make sense, and go together: asked before a fit, not after it."""

from __future__ import annotations

from pyrobc.baselines import list_baselines
from pyrobc.errors import ConfigError, suggest
from pyrobc.family import Family
from pyrobc.kinds import is_real, is_whole
from pyrobc.rules import OnScore, Rule
from pyrobc.rules.rule import is_prior_odds
from pyrobc.scores import PriorOdds
from pyrobc.thinning import KeepWeights

__all__ = ["check_decision"]


def check_decision(
    family: Family,
    rule: Rule | None,
    *,
    reduction: str | None,
    epsilon: float,
    prior_odds: PriorOdds,
    max_worse: float,
    budget: int | None,
    round_to: int,
    num_draws: int,
    evidence_rows: int,
    readapt_epochs: int | None,
    rounds: int,
    prune_each_epoch: bool,
    keep_weights: KeepWeights,
) -> None:
    """Refuse what ``score``, ``evidence`` or ``decide`` would refuse after the fit.

    Raises:
        ConfigError: a setting that makes no sense, or two that do not go together.
        ReductionError: a rule that has nothing to say about this kind of score.
    """
    known, baselines = [*family.reduced(), *list_baselines(family)], list_baselines(family)
    is_baseline = reduction in baselines and reduction not in family.reduced()
    rules = (
        ("reduction", reduction, reduction is None or reduction in known, ", ".join(known)),
        ("epsilon", epsilon, is_real(epsilon) and 0 < epsilon < 1, "a share between 0 and 1"),
        ("prior_odds", prior_odds, is_prior_odds(prior_odds),
         "implied, learned, none, or a probability between 0 and 1"),
        ("prior_odds", prior_odds, not is_baseline or prior_odds == "implied", "none for a baseline, which has a cut"),
        ("num_draws", num_draws, is_whole(num_draws, 25), "a whole number from 25"),
        ("evidence_rows", evidence_rows, is_whole(evidence_rows, 2), "a whole number from 2"),
        ("readapt_epochs", readapt_epochs, readapt_epochs is None or is_whole(readapt_epochs),
         "a whole number from 0, or None"),
        ("rounds", rounds, is_whole(rounds, 1), "a whole number from 1"),
        ("max_worse", max_worse, is_real(max_worse) and max_worse >= 0, "0 or more standard errors"),
        ("round_to", round_to, is_whole(round_to, 1), "a whole number of channels from 1"),
        ("budget", budget, budget is None or is_whole(budget, 1), "a whole number of parameters, or None"),
    )  # fmt: skip
    for name, value, is_fine, allowed in rules:
        if not is_fine:
            fix = suggest(str(value), known) if name == "reduction" else "leave it out for the default"
            raise ConfigError(name, got=repr(value), allowed=allowed, fix=fix)
    if round_to > 1 and (prune_each_epoch or keep_weights is not None):
        other = "prune_each_epoch" if prune_each_epoch else "keep_weights"
        raise ConfigError(
            "round_to", got=f"{round_to} beside {other}, which removes channels when widths are not looked at",
            allowed="one of the two", fix="leave one out",
        )  # fmt: skip
    label = reduction or family.default_reduction
    asked = [prior_odds] if rule is None else [getattr(part, "prior_odds", None) for part in rule.parts()]
    if label in family.reduced() and family.reduced()[label].event is None and "implied" in asked:
        raise ConfigError(
            f"prior odds for the reduction {label!r}", got="'implied'",
            allowed="'learned' or a probability: a point has no prior mass under the full prior",
            fix="pass prior_odds='learned'",
        )  # fmt: skip
    if rule is not None:
        _check_rule(rule, label, is_baseline, prune_each_epoch)
        given = {"prior_odds": prior_odds != "implied", "max_worse": max_worse != 2.0, "budget": budget is not None}
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ConfigError(
                "rule", got=f"{rule!r} beside {names}", allowed="a rule, or the settings of the default one",
                fix="give the settings to rules: posterior_odds (prior_odds, z), predictive (max_worse), budget",
            )  # fmt: skip


def _check_rule(rule: Rule, label: str, is_baseline: bool, prune_each_epoch: bool) -> None:
    if prune_each_epoch:
        raise ConfigError(
            "rule", got=f"{rule!r} beside prune_each_epoch, by which the default one decides after every epoch",
            allowed="one of the two", fix="leave prune_each_epoch out",
        )  # fmt: skip
    if any(isinstance(part, OnScore) for part in rule.parts()):
        raise ConfigError(
            "rule", got=f"{rule!r}, on the score of a fit made before", allowed="rules on the scores of this run",
            fix="leave .on(score) out, or call fit, score, evidence and decide one by one",
        )  # fmt: skip
    rule.check(label, is_baseline)
