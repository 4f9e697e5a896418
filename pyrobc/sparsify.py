r"""Iterated reduction of weights: delete, cut what has become useless, fit again, until a density or a fixed point.

With a number to keep, round ``r`` of ``R`` leaves :math:`n + (n_0 - n)(1 - r/R)^3` weights (the cubic of Zhu and Gupta
2017): most leave early, when many are alike, and the last ones one by one.  Without one, each round deletes what has
posterior odds above one, and the rounds end when none does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrobc.dead_units import remove_dead_units
from pyrobc.fit import anneal, fit
from pyrobc.folding import refit_prior
from pyrobc.posterior import Posterior
from pyrobc.weights import count_weights, prune_weights

__all__ = ["WeightCount", "sparsify"]


@dataclass(frozen=True)
class WeightCount:
    """Weights and biases left after one round, of how many in the network that is left, and how many were deleted."""

    round: int
    kept: int
    total: int
    deleted: int


def sparsify(
    posterior: Posterior,
    data: Any,
    *,
    keep: int | None = None,
    rounds: int = 12,
    epochs: int = 2,
    settle_epochs: int = 0,
    checkpoint: str | Path | None = None,
    on_round: Callable[[WeightCount], None] | None = None,
    **settings: Any,
) -> Posterior:
    """Delete weights and fit again, round after round (iterated BMR); units that nothing reads or feeds are cut.

    Args:
        posterior: what ``fold_scales`` returned; not changed.
        data: training data.
        keep: weights and biases left at the end; None deletes by posterior odds until nothing changes.
        rounds: rounds of deletion, at most.
        epochs: epochs of fitting after each.
        settle_epochs: epochs after the last one, with the learning rate annealed to zero.
        checkpoint: directory for the checkpoint of each round; an interrupted call resumes from it.
        on_round: called after each round.
        settings: of ``fit``.
    """
    posterior = posterior.copy()
    start = count_weights(posterior)[0]
    history: list[dict[str, float]] = []

    def refit(number: int, length: int, **more: Any) -> Posterior:
        file = None if checkpoint is None else Path(checkpoint) / f"round_{number}.pt"
        fitted = fit(
            posterior.model, data, epochs=length, guide=posterior.guide, checkpoint=file, **{**settings, **more}
        )
        history.extend(fitted.history)
        return fitted

    for number in range(rounds):
        refit_prior(posterior)
        left = (1 - (number + 1) / rounds) ** 3
        deleted = prune_weights(posterior, None if keep is None else round(keep + max(start - keep, 0) * left))
        if keep is None and deleted == 0:
            break
        posterior = remove_dead_units(posterior, data)
        posterior = refit(number, epochs)
        if on_round is not None:
            on_round(WeightCount(number, *count_weights(posterior), deleted))
    if settle_epochs:
        refit_prior(posterior)
        posterior = refit(rounds, settle_epochs, schedule=anneal(settle_epochs))
    posterior.history = history or posterior.history
    return posterior
