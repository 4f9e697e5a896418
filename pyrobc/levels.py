"""Networks of many sizes from one fit: the ranking of one score, cut at several sizes, stored in one plan.

Groups leave in the order of their posterior odds, so each network lies inside the larger ones, and nothing is fitted
again: ``bc.apply(plan.at(0.1), posterior)`` is the network of at most a tenth of the parameters.  The idea is that of
compressible subspaces (one training, the level chosen at deployment); there the network is trained at all levels at
once, which is not done here.  What a level costs in accuracy is for held-out rows to say.

References:
    Nunez, Horton, Prabhu, Ranjan, Farhadi, Rastegari (2021), LCS: learning compressible subspaces for adaptive
    network compression at inference time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pyrobc.decide import decide
from pyrobc.errors import BudgetError, PlanError
from pyrobc.kinds import check_kind
from pyrobc.plan import Level, Plan
from pyrobc.rules.budget import rank_groups
from pyrobc.scores import PriorOdds, Score

__all__ = ["add_levels"]


def add_levels(plan: Plan, score: Score, shares: Sequence[float], *, prior_odds: PriorOdds = "implied") -> Plan:
    """``plan`` with a network of at most each share of the parameters, for ``plan.at(share)``.

    Args:
        plan: what ``decide`` made of ``score``.
        score: of the groups.
        shares: of the parameters, above 0 and at most 1.
        prior_odds: see ``Score.log_odds``.

    Raises:
        PlanError: the plan is for another network.
        BudgetError: a share cannot be met with a group left in every layer.
    """
    check_kind(shares, Sequence, "shares", "several shares of the parameters", "pass (0.5, 0.2), or (0.5,) for one")
    if dict(score.spec.tensors) != dict(plan.network):
        raise PlanError(
            "plan to store levels in", got="a plan for another network", allowed="what decide made of this score",
            fix="pass the score that the plan was made of",
        )  # fmt: skip
    ranked = len(rank_groups(score.log_odds(prior_odds)))
    least = decide(score, prior_odds=prior_odds, count=ranked).parameters[1] / plan.parameters[0]
    found = []
    for share in sorted(set(shares), reverse=True):
        if not least <= share <= 1:
            raise BudgetError(
                "level of a plan", got=f"{share:g} of the parameters",
                allowed=f"from {least:.3g} to 1, with a group left in every layer", fix="ask for a larger share",
            )  # fmt: skip
        low, high = 0, ranked
        while low < high:  # the fewest groups whose removal is enough
            middle = (low + high) // 2
            fits = decide(score, prior_odds=prior_odds, count=middle).parameters[1] <= share * plan.parameters[0]
            low, high = (low, middle) if fits else (middle + 1, high)
        chosen = decide(score, prior_odds=prior_odds, count=low)
        kept = {name: tuple(groups) for name, groups in chosen.kept().items()}
        found.append(Level(kept, chosen.slices, chosen.parameters[1], chosen.macs[1]))
    return replace(plan, levels=tuple(found))
