r"""Prune down to the smallest candidate that predicts about as well as the full network.

On the nested path of the evidence, with :math:`\Delta_k` the ELPD of candidate k minus that of the full network and
:math:`s` the standard error of the full network's ELPD, candidate k passes if

.. math:: \Delta_k \ge -c\, s

(the rule of Breiman et al. 1984 for choosing the simplest model that is as good as can be told).  The paired difference
and its own, smaller, error are reported too: on rows that were trained on, a difference can be many of *its* standard
errors and still be 0.004 nats a row.  A difference that is not a number never passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pyrobc.outcomes import Outcomes
from pyrobc.rules.odds import name_odds
from pyrobc.rules.rule import NestedEvidence, Rule, Verdict, check_setting, demand_evidence
from pyrobc.scores import Score

__all__ = ["Predictive", "step_back"]

_MANY_BAD_ROWS = 0.5


@dataclass(frozen=True)
class Predictive(Rule):
    """What the smallest passing candidate removes is pruned; about the rest the path says nothing.

    Attributes:
        max_worse: c, standard errors of the full network's ELPD by which a reduced one's may fall short.
    """

    max_worse: float = 2.0
    name: ClassVar[str] = "predictive"

    def __post_init__(self) -> None:
        is_fine = self.max_worse >= 0
        check_setting(self.name, "max_worse", self.max_worse, is_fine, "0 or more standard errors")

    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        """Read candidates and their order; the score says only where it is undefined."""
        path, notes = demand_evidence(self, evidence), list[str]()
        log_odds = score.log_odds(score.default_odds)
        outcomes: Outcomes = {
            name: [
                ("prune" if np.isfinite(odds) else "abstain", f"undefined: {name_odds(score)} of {odds}")
                for odds in values
            ]
            for name, values in log_odds.items()
        }
        checked = step_back(outcomes, path, self.max_worse, notes)
        found, full = checked["checked"], min(path.candidates, key=lambda c: c.num_removed)
        why = (
            f"one of {found['num_removed']} groups whose removal changes the ELPD by {found['diff']:.3g} nats, "
            f"not below -{self.max_worse:g} x SE {full.se:.3g}"
        )
        for rows in outcomes.values():
            rows[:] = [(outcome, why if outcome == "prune" else text) for outcome, text in rows]
        return Verdict(outcomes, log_odds, tuple(notes), checked)


def step_back(outcomes: Outcomes, evidence: NestedEvidence, max_worse: float, notes: list[str]) -> dict[str, Any]:
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
    if chosen.khat_bad > _MANY_BAD_ROWS:
        notes.append(f"leave-one-out is unreliable: k-hat is high on {chosen.khat_bad:.0%} of the rows checked")
    if evidence.posterior_khat > evidence.good_k:
        notes.append(
            f"the guide does not cover the posterior (k-hat {evidence.posterior_khat:.2f} > {evidence.good_k:.2f}): "
            "ELPD is that of the guide, and paired differences are its comparison"
        )
    return {"method": evidence.method, "posterior_khat": float(evidence.posterior_khat), "checked": vars(chosen)}
