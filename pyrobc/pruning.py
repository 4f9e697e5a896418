"""Pruning along the way and afterwards: groups leave while a network is fitted, or in steps from one that is.

Both remove groups physically: what leaves is gone from the network, the KL and the optimiser's state, and the steps
that follow cost what the smaller network costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyrobc.baselines import Cut
from pyrobc.decide import decide
from pyrobc.fit import fit
from pyrobc.groups import Kept
from pyrobc.negligible import DEFAULT_EPSILON
from pyrobc.outcomes import remove_groups
from pyrobc.plan import Plan
from pyrobc.posterior import Posterior
from pyrobc.scores import PriorOdds, score

__all__ = ["PruneEachEpoch", "PruningStep", "prune_in_steps"]


@dataclass
class PruneEachEpoch:
    """Continuous pruning: pass one as ``fit(prune=...)``, and groups leave after every epoch.

    Attributes:
        reduction: reduced prior or baseline; the family's default if None.
        prior_odds: see ``Score.log_odds``.
        epsilon: see ``score``.
        cut: of a baseline, see ``score``.
        stop_after: number of the last epoch after which groups may leave; the rest re-adapts.  None: every one.
        plan: everything that has been decided so far, for the network at the start.
    """

    reduction: str | None = None
    prior_odds: PriorOdds = "implied"
    epsilon: float = DEFAULT_EPSILON
    cut: Cut = "gap"
    stop_after: int | None = None
    plan: Plan | None = field(default=None, repr=False)

    def __call__(self, posterior: Posterior) -> Kept | None:
        """The groups that stay."""
        if self.stop_after is not None and len(posterior.history) > self.stop_after:
            return None
        scored = score(posterior, self.reduction, epsilon=self.epsilon, cut=self.cut)
        step = decide(scored, prior_odds=self.prior_odds)
        self.plan = step if self.plan is None else self.plan.then(step)
        return _to_arrays(step)

    def state_dict(self) -> dict[str, str]:
        """For a checkpoint."""
        return {} if self.plan is None else {"plan": self.plan.to_json()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """From a checkpoint."""
        self.plan = Plan.from_json(state["plan"]) if "plan" in state else None


@dataclass(frozen=True)
class PruningStep:
    """A network on the way.

    Attributes:
        plan: for the network at the start.
        posterior: of the smaller network, re-adapted.
        is_wanted: whether the score itself prunes all that has left; afterwards it only ranks.
    """

    plan: Plan
    posterior: Posterior
    is_wanted: bool


def prune_in_steps(
    posterior: Posterior,
    data: Any,
    reduction: str | None = None,
    *,
    counts: list[int] | None = None,
    steps: int = 10,
    epochs: int = 1,
    prior_odds: PriorOdds = "implied",
    epsilon: float = DEFAULT_EPSILON,
    cut: Cut = "gap",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> Iterator[PruningStep]:
    """Post-training pruning: rank once, remove the least needed groups step by step, re-adapt after each.

    Args:
        posterior: what ``fit`` returned; not changed.
        data: training data.
        reduction: reduced prior or baseline; the family's default if None.
        counts: groups removed after each step, rising; None stops where the score does, after ``steps`` equal steps.
        steps: their number.
        epochs: epochs of fitting after each step; 0 for none.
        prior_odds: see ``Score.log_odds``.
        epsilon: see ``score``.
        cut: of a baseline, see ``score``.
        seed: of the fits.
        checkpoint: directory for the checkpoint of each step.
        settings: of ``fit``.
    """
    scored = score(posterior, reduction, epsilon=epsilon, cut=cut)
    odds = np.concatenate(list(scored.log_odds(prior_odds).values()))
    wanted = int((np.isfinite(odds) & (odds > 0)).sum())
    if counts is None:
        counts = sorted({round(wanted * (i + 1) / steps) for i in range(steps)})
    current, spec = posterior.copy(), posterior.model.spec
    kept = spec.everything()
    for count in counts:
        plan = decide(scored, prior_odds=prior_odds, count=count)
        wished = {name: np.intersect1d(kept[name], groups) for name, groups in _to_arrays(plan).items()}
        plan = remove_groups(plan, spec, wished, "it left in an earlier step")
        current = current.restricted({name: np.searchsorted(kept[name], left) for name, left in wished.items()})
        kept = wished
        if epochs:
            file = None if checkpoint is None else Path(checkpoint) / f"{scored.label}_{count}.pt"
            current = fit(
                current.model, data, epochs=epochs, guide=current.guide, seed=seed, checkpoint=file, **settings
            )
        yield PruningStep(plan, current, count <= wanted)


def _to_arrays(plan: Plan) -> dict[str, Any]:
    return {name: np.asarray(groups, dtype=np.int64) for name, groups in plan.kept().items()}
