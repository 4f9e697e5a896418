"""The nested path of reduced networks: which are compared, and what each comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrobc.coverage import ratio_khat
from pyrobc.decision_rows import DecisionRows, estimate_total
from pyrobc.groups import GroupSpec, Ints

__all__ = ["Candidate", "choose_sizes", "compare_candidate", "count_wanted", "keep_all_but"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One reduced network of the nested path.

    Attributes:
        num_removed: groups removed, the first so many of the path's order.
        elpd: expected log predictive density, nats over the rows looked at; minus infinity where a row is impossible.
        se: its standard error.
        diff: elpd minus that of the full network, nats; negative says worse.
        diff_se: standard error of the paired difference.
        khat_bad: share of rows whose k-hat is above its limit (zero on held-out rows).
        parameters: trainable parameters left.
        macs: multiply-accumulates left.
        elpd_all: estimate of elpd over all rows of the data.
        subsampling_se: its standard error from having looked at a sample of them; zero where all were.
        cover_khat: k-hat of its reduced posterior against the posterior of the reduced model (``coverage``); NaN on
            held-out rows.
        elbo_gain: ELBO of its reduced posterior minus that of the full network, nats over all rows of the data; NaN on
            held-out rows.
        elbo_gain_se: its Monte Carlo standard error, from paired draws.
    """

    num_removed: int
    elpd: float
    se: float
    diff: float
    diff_se: float
    khat_bad: float
    parameters: int
    macs: int
    elpd_all: float
    subsampling_se: float
    cover_khat: float
    elbo_gain: float
    elbo_gain_se: float


def choose_sizes(log_odds: Floats, count: int) -> list[int]:
    """The full network, the score's own choice, and steps around it, all below the number of groups."""
    choice, total = count_wanted(log_odds), len(log_odds)
    shares = np.linspace(0.5, 1.0, max(count - 1, 1))
    beyond = choice + (total - choice) // 4
    return sorted({0, choice, min(beyond, total - 1), *(int(share * choice) for share in shares)})


def count_wanted(log_odds: Floats) -> int:
    """Groups that the score alone would prune."""
    return int((np.isfinite(log_odds) & (log_odds > 0)).sum())


def keep_all_but(spec: GroupSpec, removed: Ints) -> dict[str, Ints]:
    """Groups left by block, when those at the positions ``removed`` of ``spec.labels()`` leave."""
    keep = np.ones(spec.num_groups, dtype=bool)
    keep[removed] = False
    starts = np.cumsum([0, *(block.size for block in spec.blocks)])
    return {b.name: np.flatnonzero(keep[s : s + b.size]) for b, s in zip(spec.blocks, starts, strict=False)}


def compare_candidate(
    costs: tuple[int, int],
    removed: int,
    fit: tuple[Floats, Floats],
    full: Floats,
    good_k: float,
    rows: DecisionRows,
    ratios: tuple[Floats, Floats] | None,
) -> Candidate:
    """Densities and k-hats of every row, summed up and compared with those of the full network.

    ``ratios`` are ln r at draws of the reduced posterior and at those of the full one.
    """
    elpd_i, khat = fit
    numbers: Mapping[str, float] = dict.fromkeys(("se", "diff_se", "subsampling_se"), np.nan) | dict.fromkeys(
        ("elpd", "diff", "elpd_all"), -np.inf
    )
    if np.isfinite(elpd_i).all():
        gap, count = elpd_i - full, len(elpd_i)
        total, error = estimate_total(elpd_i, rows)
        numbers = {
            "elpd": float(elpd_i.sum()),
            "se": float(np.sqrt(count * elpd_i.var())),
            "diff": float(gap.sum()),
            "diff_se": float(np.sqrt(count * gap.var())),
            "elpd_all": total,
            "subsampling_se": error,
        }
    cover, gain, error = np.nan, np.nan, np.nan
    if ratios is not None:
        cover, change = ratio_khat(ratios[0]), ratios[0] - ratios[1]
        gain = float(change.mean())
        error = float(change.std(ddof=1) / np.sqrt(len(change))) if np.isfinite(gain) else np.nan
    parameters, macs = costs
    return Candidate(
        num_removed=removed,
        khat_bad=float((khat > good_k).mean()),
        parameters=parameters,
        macs=macs,
        cover_khat=cover,
        elbo_gain=gain,
        elbo_gain_se=error,
        **numbers,
    )
