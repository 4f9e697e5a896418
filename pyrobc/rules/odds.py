r"""Prune where the posterior log odds of being negligible exceed their Monte Carlo error; baselines: beyond their cut.

With ΔF of the reduction and of its complement in nats, and π the prior probability of the reduced model
(``Score.log_odds``),

.. math:: L_g = \Delta F_g - \Delta F_{c,g} + \ln\frac{\pi}{1 - \pi}.

Pruning is the choice with the smaller expected loss, if a needed group lost costs as much as a useless one kept, where
:math:`L_g > 0`.  :math:`L_g` is known up to its Monte Carlo standard error: within ``z`` of those of zero, and where it
is undefined or plus infinity, nothing is decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pyrobc.errors import ReductionError
from pyrobc.outcomes import Outcomes
from pyrobc.rules.rule import NestedEvidence, Odds, Rule, Verdict, check_setting, is_prior_odds
from pyrobc.scores import PriorOdds, Score

__all__ = ["BeyondCut", "PosteriorOdds", "explain_undefined", "name_odds"]


@dataclass(frozen=True)
class PosteriorOdds(Rule):
    """The default: posterior log odds above ``z`` Monte Carlo standard errors.

    Attributes:
        prior_odds: ``implied`` by the sparsity prior, ``learned``, a probability, or ``none`` (``Score.log_odds``).
        z: standard errors within which a group is left undecided.
    """

    prior_odds: PriorOdds = "implied"
    z: float = 2.0
    name: ClassVar[str] = "posterior odds"

    def __post_init__(self) -> None:
        check_setting(self.name, "z", self.z, self.z >= 0, "0 or more standard errors")
        allowed = "'implied', 'learned', 'none', or a probability"
        check_setting(self.name, "prior_odds", self.prior_odds, is_prior_odds(self.prior_odds), allowed)

    def check(self, label: str, is_baseline: bool) -> None:
        """A baseline has no odds."""
        if is_baseline:
            raise ReductionError(
                f"posterior odds of the baseline {label!r}", got="no log Bayes factor",
                allowed="a score made by a reduction", fix="use BeyondCut(), or score by a reduction",
            )  # fmt: skip

    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        """Evidence is not read."""
        self.check(score.label, score.cuts is not None)
        log_odds = score.log_odds(self.prior_odds)
        return Verdict(_compare_with_zero(score, log_odds, self.z), log_odds)


@dataclass(frozen=True)
class BeyondCut(Rule):
    """Of a baseline: above the block's cut is pruned, a block without a cut is left undecided as a whole."""

    name: ClassVar[str] = "cut"

    def check(self, label: str, is_baseline: bool) -> None:
        """A reduction has no cut."""
        if not is_baseline:
            raise ReductionError(
                f"cut of the reduction {label!r}", got="a log Bayes factor, which has none",
                allowed="a baseline", fix="use PosteriorOdds(), or score(posterior, 'magnitude')",
            )  # fmt: skip

    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        """Evidence is not read."""
        self.check(score.label, score.cuts is not None)
        above = score.log_odds()
        return Verdict(_compare_with_zero(score, above, 0.0), above)


def _compare_with_zero(score: Score, log_odds: Odds, z: float) -> Outcomes:
    outcomes: Outcomes = {}
    words = name_odds(score)
    negligible = " of being negligible" if score.cuts is None else ""
    for block in score.spec.blocks:
        rows = []
        for odds, mcse in zip(log_odds[block.name], score.mcse[block.name], strict=True):
            if np.isnan(odds) or odds == np.inf or not np.isfinite(mcse):
                rows.append(("abstain", explain_undefined(score, block.name, odds, mcse)))
            elif abs(odds) <= z * mcse:
                rows.append(("abstain", f"{words} {odds:.3g} within {z:g} x MCSE {mcse:.3g} of zero"))
            elif odds > 0:
                rows.append(("prune", f"{words}{negligible} {odds:.3g} > {z * mcse:.3g}"))
            else:
                rows.append(("keep", f"{words}{negligible} {odds:.3g} < 0"))
        outcomes[block.name] = rows
    return outcomes


def explain_undefined(score: Score, block: str, odds: float, mcse: float) -> str:
    """Why there is no number to decide on."""
    return f"undefined: {score.reasons.get(block, '') or f'{name_odds(score)} of {odds}, MCSE {mcse}'}"


def name_odds(score: Score) -> str:
    """What the number that is compared is called."""
    return "log odds" if score.cuts is None else f"{score.label} minus its cut"
