r"""Iterated Bayesian model reduction: prune, let the rest re-adapt, price again, until nothing more is pruned.

A price :math:`\Delta F_g` says what deleting group ``g`` *alone* is worth, with the rest as it is.  Deleting many
at once adds up these prices, which over-promises: what two groups share is counted as spare twice (of two copies of
one predictor, each is worthless given the other).  Refitting after every round corrects the rest (Beckers et al. 2024);
``most=1`` never deletes two groups at once and is backward elimination.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pyrobc.errors import ReductionError

__all__ = ["IteratedReduction", "Round", "reduce_iteratively"]

_Fit = TypeVar("_Fit")


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        kept: groups present when it was priced, boolean, shape (groups,).
        delta_f: their prices in nats, shape (groups,).
        pruned: groups that left at its end, boolean, shape (groups,).
    """

    kept: Tensor
    delta_f: Tensor
    pruned: Tensor


@dataclass(frozen=True)
class IteratedReduction(Generic[_Fit]):
    """Where the rounds ended.

    Attributes:
        kept: groups left, boolean, shape (groups,).
        fit: what ``refit`` returned for them.
        rounds: all rounds; the last one prunes nothing if ``is_converged``.
        is_converged: False where ``max_rounds`` stopped it.
    """

    kept: Tensor
    fit: _Fit
    rounds: tuple[Round, ...]
    is_converged: bool


def reduce_iteratively(
    refit: Callable[[Tensor], _Fit],
    price: Callable[[_Fit, Tensor], Tensor],
    num_groups: int,
    *,
    threshold: float = 0.0,
    most: int | None = None,
    max_rounds: int = 100,
) -> IteratedReduction[_Fit]:
    """Alternate ``refit`` and ``price`` until no kept group is priced above ``threshold``.

    Args:
        refit: fits the model with the groups marked in its argument, boolean (groups,); the fit is passed on untouched.
        price: ΔF in nats, shape (groups,), of deleting each group from that fit; entries of groups already gone are
            ignored, NaN and infinities never prune.
        num_groups: how many groups there are.
        threshold: prune above it, nats.
        most: prune at most this many groups per round, the highest prices first; None for all.
        max_rounds: rounds before giving up.

    Raises:
        ReductionError: ``most`` or ``max_rounds`` below 1, or prices of another shape.
    """
    if max_rounds < 1 or (most is not None and most < 1):
        raise ReductionError(
            "iterated reduction",
            got=f"most={most}, max_rounds={max_rounds}",
            allowed="at least 1, or most=None",
            fix="most=1 deletes one group a round",
        )
    kept = torch.ones(num_groups, dtype=torch.bool)
    rounds: list[Round] = []
    fit = refit(kept)
    while len(rounds) < max_rounds:
        delta_f = price(fit, kept)
        if delta_f.shape != (num_groups,):
            raise ReductionError(
                "prices",
                got=f"shape {tuple(delta_f.shape)}",
                allowed=f"({num_groups},), one per group",
                fix="return NaN for the groups that are gone",
            )
        pruned = kept & delta_f.isfinite() & (delta_f > threshold)
        if most is not None and int(pruned.sum()) > most:
            order = torch.where(pruned, delta_f, -torch.inf).argsort(descending=True, stable=True)
            pruned = torch.zeros_like(pruned).index_fill(0, order[:most], True)
        rounds.append(Round(kept, delta_f, pruned))
        if not pruned.any():
            return IteratedReduction(kept, fit, tuple(rounds), True)
        kept = kept & ~pruned
        fit = refit(kept)
    return IteratedReduction(kept, fit, tuple(rounds), False)
