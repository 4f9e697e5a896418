r"""Prune as much as keeps the expected share of needed groups among the pruned at a level: Bayesian FDR.

Let :math:`\rho_g = \Pr(g \text{ is needed} \mid y) = \sigma(-L_g)` from the posterior log odds :math:`L_g` of being
negligible.  If ``S`` is pruned, a share of it is pruned falsely, and the expectation of that share given the data is

.. math:: E\Big[\frac{\#\{g \in S: g \text{ needed}\}}{|S|} \,\Big|\, y\Big] = \frac{1}{|S|} \sum_{g \in S} \rho_g,

whatever the dependence between groups, because expectation is linear.  The largest ``S`` with at most
:math:`\alpha` is a run of the smallest :math:`\rho`; groups with :math:`\rho_g \ge 1/2` stay out of it, though their
company could pay for them, which only lowers the share.  As the bound holds given any data, it holds on average: the
realised false-prune rate (zero where nothing is pruned) is at most :math:`\alpha` if the probabilities are calibrated.
A log odds with Monte Carlo error enters ``z`` of its standard errors lower.

Learned prior odds make :math:`\rho` the inclusion probability under a Beta-Bernoulli rate (``bmr.learn_inclusion``),
which adapts to how many groups are needed and so corrects for their number.

References:
    Newton, Noueiry, Sarkar, Ahlquist (2004), Detecting differential gene expression with a semiparametric
    hierarchical mixture method: the direct posterior probability approach.
    Mueller, Parmigiani, Robert, Rousseau (2004), Optimal sample size for multiple testing.
    Scott, Berger (2010), Bayes and empirical-Bayes multiplicity adjustment in the variable-selection problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import expit

from pyrobc.errors import ReductionError
from pyrobc.outcomes import Outcomes
from pyrobc.rules.odds import explain_undefined
from pyrobc.rules.rule import NestedEvidence, Rule, Verdict, check_setting, is_prior_odds
from pyrobc.scores import PriorOdds, Score

__all__ = ["FalsePruneRate"]


@dataclass(frozen=True)
class FalsePruneRate(Rule):
    """Expected share of needed groups among the pruned at most ``level``, over the whole network.

    Attributes:
        level: the largest share, alpha.
        prior_odds: ``implied``, ``learned`` or a probability (``Score.log_odds``).
        z: Monte Carlo standard errors by which log odds are lowered.
    """

    level: float = 0.05
    prior_odds: PriorOdds = "implied"
    z: float = 2.0
    name: ClassVar[str] = "false-prune rate"

    def __post_init__(self) -> None:
        check_setting(self.name, "level", self.level, 0 < self.level < 1, "a share between 0 and 1")
        check_setting(self.name, "z", self.z, self.z >= 0, "0 or more standard errors")
        is_odds = is_prior_odds(self.prior_odds) and self.prior_odds != "none"
        check_setting(self.name, "prior_odds", self.prior_odds, is_odds, "'implied', 'learned', or a probability")

    def check(self, label: str, is_baseline: bool) -> None:
        """A baseline has no probabilities."""
        if is_baseline:
            raise ReductionError(
                f"false-prune rate of the baseline {label!r}", got="no probabilities",
                allowed="a score made by a reduction", fix="use BeyondCut(), or score by a reduction",
            )  # fmt: skip

    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        """Evidence is not read."""
        self.check(score.label, score.cuts is not None)
        log_odds = score.log_odds(self.prior_odds)
        odds, mcse = (np.concatenate([part[b.name] for b in score.spec.blocks]) for part in (log_odds, score.mcse))
        is_known = ~np.isnan(odds) & (odds < np.inf) & np.isfinite(mcse)
        needed = np.where(is_known, expit(self.z * np.where(is_known, mcse, 0) - odds), np.nan)
        order = np.argsort(np.where(is_known, needed, np.inf), kind="stable")
        share = np.empty(len(odds))
        share[order] = np.cumsum(needed[order]) / np.arange(1, len(odds) + 1)
        leaves = is_known & (needed < 0.5) & (share <= self.level)
        count, mean = leaves.sum(), needed[leaves].mean() if leaves.any() else 0.0
        outcomes: Outcomes = {}
        start = 0
        for block in score.spec.blocks:
            rows = []
            for g in range(start, start + block.size):
                says = f"probability of being needed {needed[g]:.3g}"
                if not is_known[g]:
                    rows.append(("abstain", explain_undefined(score, block.name, odds[g], mcse[g])))
                elif leaves[g]:
                    rows.append(("prune", f"{says}, on average {mean:.3g} <= {self.level:g} over the {count} pruned"))
                elif needed[g] >= 0.5:
                    rows.append(("keep", f"{says} >= 0.5"))
                else:
                    rows.append(("abstain", f"{says}: with it the average would be {share[g]:.3g} > {self.level:g}"))
            outcomes[block.name] = rows
            start += block.size
        return Verdict(outcomes, log_odds)
