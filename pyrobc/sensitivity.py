r"""How many groups stay where the ROPE is set elsewhere: the decision that was taken, asked again.

:math:`\epsilon` is the largest share of the next layer's input that a negligible group may carry (``negligible``).  The
same posterior is scored anew at every :math:`\epsilon` of a grid, and the same rule decides.  (Against the prior odds
no new score is needed: moving them by t nats moves every log odds by t.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pyrobc.outcomes import list_kept
from pyrobc.posterior import Posterior
from pyrobc.rules.odds import PosteriorOdds
from pyrobc.rules.rule import NestedEvidence, Rule
from pyrobc.scores import Score, score

__all__ = ["Sensitivity", "measure_sensitivity"]

_LARGEST = 0.5


@dataclass(frozen=True)
class Sensitivity:
    """Groups that stay, kept or undecided.

    Attributes:
        chosen: the epsilon that was decided with.
        epsilon: ascending, ``chosen`` among them.
        kept: groups that stay at each, by block.
    """

    chosen: float
    epsilon: tuple[float, ...]
    kept: Mapping[str, tuple[int, ...]]


def measure_sensitivity(
    posterior: Posterior,
    scored: Score,
    evidence: NestedEvidence | None = None,
    rule: Rule | None = None,
    *,
    steps: int = 4,
    seed: int = 0,
) -> Sensitivity | None:
    """Decide at epsilons from a hundredth of the chosen one to a hundred times it, below one half.

    Args:
        posterior: what was scored.
        scored: at the chosen epsilon.
        evidence: for rules that look at it.
        rule: posterior odds if None.
        steps: epsilons for every factor of ten.
        seed: of scores that need draws.

    Returns:
        None where the score does not look at epsilon: for a baseline, or a reduction to a point.
    """
    reduction = posterior.model.family.reduced().get(scored.label)
    if scored.cuts is not None or reduction is None or reduction.event is None:
        return None
    judge = rule or PosteriorOdds(scored.default_odds)
    factors = 10.0 ** (np.arange(-2 * steps, 2 * steps + 1) / steps)
    grid = [float(e) for e in scored.epsilon * factors if e == scored.epsilon or e < _LARGEST]
    kept: dict[str, list[int]] = {block.name: [] for block in scored.spec.blocks}
    for epsilon in grid:
        again = score(posterior, scored.label, epsilon=epsilon, seed=seed)
        for name, groups in list_kept(judge.judge(again, evidence).outcomes).items():
            kept[name].append(len(groups))
    return Sensitivity(scored.epsilon, tuple(grid), {name: tuple(counts) for name, counts in kept.items()})
