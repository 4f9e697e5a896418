r"""Iterated reduction of weights: delete, cut what has become useless, fit again, until a density or a fixed point.

With a number to keep, :math:`n + (n_0 - n)(1 - t)^3` weights are left at fraction ``t`` of the steps (the cubic of Zhu
and Gupta 2017): most leave early, when many are alike, and the last ones a few at a time; a round is then only where
the prior is fitted again and dead units are cut.  Without one, each round deletes what has posterior odds above one,
and the rounds end when none does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyrobc.dead_units import remove_dead_units
from pyrobc.errors import ConfigError
from pyrobc.fit import anneal, fit
from pyrobc.folding import refit_prior
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.posterior import Posterior
from pyrobc.supports import find_planes, price_supports
from pyrobc.weights import count_weights, prune_weights

__all__ = ["WeightCount", "check_support_weight", "sparsify"]

_DELETIONS_PER_EPOCH = 8
Price = Callable[[Posterior], dict[str, Tensor] | None]


@dataclass(frozen=True)
class WeightCount:
    """Weights and biases left after one round, of how many in the network that is left, and how many were deleted."""

    round: int
    kept: int
    total: int
    deleted: int


@dataclass
class _Cubic:
    """Deletes weights along the cubic, some times an epoch; at its start too, so that resuming changes nothing."""

    posterior: Posterior
    start: int
    keep: int
    first: float
    length: float
    epochs: int
    price: Price
    tick: int = -1

    def __call__(self, guide: MeanFieldGuide, done: float) -> None:
        tick = int(done * self.epochs * _DELETIONS_PER_EPOCH + 1e-6)
        if tick > self.tick:
            self.tick = tick
            left = max(0.0, 1 - self.first - self.length * done) ** 3
            at = replace(self.posterior, guide=guide)
            prune_weights(at, round(self.keep + max(self.start - self.keep, 0) * left), prior=self.price(at))


def sparsify(
    posterior: Posterior,
    data: Any,
    *,
    keep: int | None = None,
    rounds: int = 12,
    epochs: int = 2,
    settle_epochs: int = 0,
    support_weight: float = 0.0,
    seed: int = 0,
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
        support_weight: of a prior that learns where weights are and lets those amid others stay (``pyrobc.supports``):
            masks become cheaper, at some cost in accuracy where what is needed lies anywhere; 0 leaves it out.
        seed: of all randomness; every round draws its own from it.
        checkpoint: directory for the checkpoint of each round; an interrupted call resumes from it.
        on_round: called after each round.
        settings: of ``fit``.
    """
    check_support_weight(support_weight, keep or "odds")
    posterior = posterior.copy()
    start = count_weights(posterior)[0]
    history: list[dict[str, float]] = []

    def refit(number: int, length: int, **more: Any) -> Posterior:
        support = f"_support_{support_weight:g}" if support_weight else ""
        name = (
            f"{start}_to_{keep or 'odds'}_{number}_of_{rounds}{support}.pt"  # no run of other settings resumes from it
        )
        file = None if checkpoint is None else Path(checkpoint) / name
        more["seed"] = int(
            np.random.SeedSequence((seed, number)).generate_state(1)[0]
        )  # no round repeats another's noise
        fitted = fit(
            posterior.model, data, epochs=length, guide=posterior.guide, checkpoint=file, **{**settings, **more}
        )
        fitted.seed = seed
        history.extend(fitted.history)
        return fitted

    for number in range(rounds):
        refit_prior(posterior)
        before = count_weights(posterior)[0]
        price = _make_price(posterior, support_weight)
        if keep is None:
            if prune_weights(posterior, prior=price(posterior)) == 0:
                break
            posterior = refit(number, epochs)
        else:
            posterior = refit(
                number, epochs, on_step=_Cubic(posterior, start, keep, number / rounds, 1 / rounds, epochs, price)
            )
        posterior = remove_dead_units(posterior, data)
        if on_round is not None:
            kept, total = count_weights(posterior)
            on_round(WeightCount(number, kept, total, before - kept))
    if keep is not None:  # what the last steps of the cubic left over
        prune_weights(posterior, keep, prior=_make_price(posterior, support_weight)(posterior))
        posterior = remove_dead_units(posterior, data)
    if settle_epochs:
        refit_prior(posterior)
        posterior = refit(rounds, settle_epochs, schedule=anneal(settle_epochs))
    posterior.history = history or posterior.history
    return posterior


def check_support_weight(weight: float, keep_weights: object) -> None:
    """Refuse a weight that no prior has, or one where no weights leave."""
    if not 0 <= weight < math.inf or (weight and keep_weights is None):
        raise ConfigError(
            "support_weight", got=f"{weight} with keep_weights={keep_weights}",
            allowed="0, or a positive number together with keep_weights", fix="pass 0.3 and keep_weights=0.05",
        )  # fmt: skip


def _make_price(posterior: Posterior, weight: float) -> Price:
    """Prior log odds of the weights of networks of this size."""
    if not weight:
        return lambda at: None
    planes = find_planes(posterior)
    return lambda at: price_supports(at, planes, weight)
