"""The Bayesian road of the MNIST benchmark: groups, then weights, then grids, each a change of prior and a refit.

1. A family with group scales is fitted from the dense network; groups leave by the posterior odds of a ROPE, and what
   is left is fitted again and decided on again, under a KL of more weight.
2. Scales are folded into Normal weights under a Laplace prior that is held tight, without which a network of so few
   weights makes them large and fits its training rows too closely; single weights leave by their own log Bayes factor,
   level by level, while the network re-adapts (``pyrobc.sparsify``), inputs dropped at a rate.
3. At each level a side branch gets a Laplace prior, settles at the ELBO proper without dropped inputs, moves to grids
   of some posterior widths and re-adapts.

The KL is weighted by a temperature below one throughout: with 55,000 rows the ELBO itself would trade some accuracy for
bits (a bit is worth 0.69 nats in all, 1.3e-5 a row), and less than the error asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks._mnist import DroppedRows, Rows
from pyrobc.batches import TensorLoader
from pyrobc.decide import decide
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.folding import fold_scales, refit_prior
from pyrobc.gridding import move_to_grid
from pyrobc.lift import lift
from pyrobc.posterior import Posterior
from pyrobc.scores import score
from pyrobc.sparsify import sparsify

__all__ = ["Road", "Stop", "compress_bayesian", "thin_to_levels"]


@dataclass(frozen=True)
class Road:
    """Settings; ``levels`` are numbers of weights to leave, with how many posterior widths a grid's step has there.

    ``group_rounds`` are temperature and epochs of every fit of groups, ``budget`` the most parameters that the last one
    may leave; ``trunk_scale`` is that of the Laplace prior while weights leave; ``first`` and ``later`` are rounds,
    epochs a round, and epochs of falling rate, to the first level and to each later one.
    """

    levels: Mapping[int, tuple[float, ...]]
    temperature: float = 0.3
    trunk_scale: float = 0.08
    group_rounds: tuple[tuple[float, int], ...] = ((1.0, 8),)
    group_lr: float = 2e-3
    budget: int | None = None
    max_scale: float | None = 0.2
    drop: float = 0.2
    lr: float = 4e-3
    first: tuple[int, int, int] = (10, 4, 8)
    later: tuple[int, int, int] = (2, 8, 6)
    settle_epochs: int = 12
    settle_lr: float = 3e-3
    settle_temperature: float = 1.0
    grid_epochs: int = 16
    grid_lr: float = 7e-4
    batch_size: int = 128
    settle_batch_size: int = 256


@dataclass(frozen=True)
class Stop:
    """A compact network on the way: its level, its grid's coarseness, and the network."""

    level: int
    coarseness: float
    net: nn.Module


def compress_bayesian(
    net: nn.Module,
    train: Rows,
    family: str,
    road: Road,
    seed: int,
    folder: Path,
    skip: set[str],
    watch: Callable[[str, Posterior], None] = lambda name, posterior: None,
) -> Iterator[Stop]:
    """Networks from the largest to the smallest; ``folder`` holds checkpoints, ``skip`` names stops not to repeat."""
    noisy = DroppedRows(train, road.drop, road.batch_size)
    posterior = _fit_groups(net, train, noisy, family, road, seed, folder)
    yield from thin_to_levels(posterior, train, road, seed, folder, skip, watch)


def thin_to_levels(
    posterior: Posterior,
    train: Rows,
    road: Road,
    seed: int,
    folder: Path,
    skip: set[str],
    watch: Callable[[str, Posterior], None] = lambda name, posterior: None,
) -> Iterator[Stop]:
    """From a folded posterior on: delete weights to each level, settle, move to grids; level 0 deletes none."""
    plain = TensorLoader(*train, batch_size=road.settle_batch_size)
    noisy = DroppedRows(train, road.drop, road.batch_size)
    refit_prior(posterior, "laplace", scale=road.trunk_scale)
    for number, (level, coarsenesses) in enumerate(road.levels.items()):
        shared: dict[str, Any] = {"seed": 1000 * seed + number, "temperature": road.temperature, "progress": False}
        rounds, epochs, pause = road.later if number else road.first
        if level:
            posterior = sparsify(
                posterior, noisy, keep=level, rounds=rounds, epochs=epochs, settle_epochs=pause, lr=road.lr,
                checkpoint=folder / f"level_{level}", **shared,
            )  # fmt: skip
        watch(f"trunk {level}", posterior)
        wanted = [c for c in coarsenesses if f"{level}-{c:g}" not in skip]
        if not wanted:
            continue
        branch = posterior.copy()
        shared["temperature"] = road.settle_temperature
        refit_prior(branch, "laplace")
        branch = fit(
            branch.model, plain, epochs=road.settle_epochs, lr=road.settle_lr, guide=branch.guide,
            schedule=anneal(road.settle_epochs), checkpoint=folder / f"settle_{level}.pt", **shared,
        )  # fmt: skip
        watch(f"settled {level}", branch)
        for coarseness in wanted:
            gridded = refit_prior(move_to_grid(branch, coarseness))
            gridded = fit(
                gridded.model, plain, epochs=road.grid_epochs, lr=road.grid_lr, guide=gridded.guide,
                schedule=anneal(road.grid_epochs), checkpoint=folder / f"grid_{level}_{coarseness:g}.pt", **shared,
            )  # fmt: skip
            yield Stop(level, coarseness, gridded.to_module())


def _fit_groups(
    net: nn.Module, train: Rows, data: object, family: str, road: Road, seed: int, folder: Path
) -> Posterior:
    """The folded posterior of what the family's groups keep."""
    law = make_family(family, max_scale=road.max_scale, num_draws=8)
    posterior: Posterior | None = None
    for number, (temperature, epochs) in enumerate(road.group_rounds):
        model = lift(net, law, "categorical", train[0][:1]) if posterior is None else posterior.model
        posterior = fit(
            model, data, epochs=epochs, lr=road.group_lr, seed=1000 * seed + number, temperature=temperature,
            warmup_epochs=0 if number else epochs // 2, guide=posterior and posterior.guide,
            checkpoint=folder / f"groups_{number}.pt", progress=False,
        )  # fmt: skip
        is_last = number == len(road.group_rounds) - 1
        plan = decide(score(posterior), budget=road.budget if is_last else None)
        print("groups", plan.widths, flush=True)
        posterior = posterior.restricted({name: np.asarray(groups) for name, groups in plan.kept().items()})
    assert posterior is not None
    return fold_scales(posterior)
