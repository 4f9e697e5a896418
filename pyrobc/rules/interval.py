r"""Prune where the highest-density interval of the multiplier lies inside the ROPE, keep where outside.

A group is negligible while its multiplier z satisfies :math:`|z| < t_g` (``negligible``): the ROPE.  With
:math:`[l, u]` the shortest interval that holds a share p of the posterior draws of z,

.. math:: -t_g < l,\; u < t_g: \text{prune}; \qquad l \ge t_g \text{ or } u \le -t_g: \text{keep};
    \qquad\text{else abstain}.

Unlike posterior odds this ignores the prior's mass in the ROPE only as far as the posterior has forgotten it, and it
asks for a margin: a group is left undecided while a share of about 1 - p of its draws could speak for the other side.

References:
    Kruschke (2018), Rejecting or accepting parameter values in Bayesian estimation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pyrobc.outcomes import Outcomes
from pyrobc.rules.rule import NestedEvidence, Rule, Verdict, check_setting, demand_evidence
from pyrobc.scores import Score

__all__ = ["HighestDensity"]


@dataclass(frozen=True)
class HighestDensity(Rule):
    """The interval that holds ``probability`` of the multiplier's posterior, against the ROPE of the score.

    Attributes:
        probability: posterior mass of the interval.
    """

    probability: float = 0.95
    name: ClassVar[str] = "HDI and ROPE"

    def __post_init__(self) -> None:
        is_fine = 0 < self.probability < 1
        check_setting(self.name, "probability", self.probability, is_fine, "a number between 0 and 1")

    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        """Intervals come from the posterior draws of the evidence."""
        bounds = demand_evidence(self, evidence).hdi(self.probability)
        outcomes: Outcomes = {}
        start = 0
        for block in score.spec.blocks:
            rows = []
            for (low, high), edge in zip(bounds[start:][: block.size], score.threshold[block.name], strict=True):
                says = f"{self.probability:.0%} HDI [{low:.3g}, {high:.3g}] of the multiplier"
                if not np.isfinite([low, high, edge]).all():
                    rows.append(("abstain", f"undefined: {says}, ROPE {edge:.3g}"))
                elif -edge < low and high < edge:
                    rows.append(("prune", f"{says} inside the ROPE of {edge:.3g}"))
                elif low >= edge or high <= -edge:
                    rows.append(("keep", f"{says} outside the ROPE of {edge:.3g}"))
                else:
                    rows.append(("abstain", f"{says} across the edge of the ROPE of {edge:.3g}"))
            outcomes[block.name] = rows
            start += block.size
        return Verdict(outcomes, score.log_odds(score.default_odds))
