"""The only file that touches ArviZ: its smoothing and diagnostics, and the tree that its functions take.

Inside is a ``DataTree`` by ``arviz-base`` and ``arviz-stats``, which speak the same on all versions; ``to_arviz`` turns
it into what the installed ``arviz`` plots.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import arviz_base
import arviz_stats
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyrobc.errors import MissingExtraError

__all__ = ["build_tree", "diagnose_chains", "find_hdi", "leave_one_out", "to_arviz"]

Floats = NDArray[np.float64]
_SHORTEST_TAIL = 5  # ratios to which a Pareto tail is fitted at least
_PLOTTED = ("posterior", "prior", "log_likelihood", "posterior_predictive", "observed_data")

_stats: Any = arviz_stats.base.array_stats  # type: ignore[attr-defined]


def find_hdi(draws: Floats, probability: float) -> Floats:
    """Highest-density interval of every column of ``[draws, groups]``: ``[groups, 2]``."""
    return np.asarray(_stats.hdi(draws, prob=probability, axis=0))


def diagnose_chains(draws: Floats) -> tuple[Floats, Floats]:
    """R-hat and bulk ESS of every group, from ``[chains, draws, groups]``; NaN where no draw differs from another."""
    rhat, ess = np.full((2, draws.shape[2]), np.nan)
    varies = np.ptp(draws, axis=1).min(0) > 0
    if varies.any():
        rhat[varies], ess[varies] = (
            f(draws[:, :, varies], chain_axis=0, draw_axis=1) for f in (_stats.rhat, _stats.ess)
        )
    return rhat, ess


def leave_one_out(log_lik: Floats, ratio: Floats) -> tuple[Floats, Floats]:
    r"""Expected log density of every row left out, and the k-hat of its importance ratios.

    Ratios that cannot be smoothed are used as they are,
    :math:`\ln\sum_s r_s - \ln\sum_s r_s/p(y_i|\theta_s)`.  Where the largest of them are equal (every draw predicts
    the row with certainty) they are bounded, and k-hat is minus infinity; where the fit of the tail fails, or a draw
    gives the row no probability at all, infinity.

    Args:
        log_lik: of every draw and row, nats, ``[draws, rows]``.
        ratio: log of posterior over guide at every draw, nats up to a constant.
    """
    log_ratios = np.sort(ratio[:, None] - log_lik, axis=0)
    is_impossible = ~np.isfinite(log_lik).all(0)
    is_bounded = log_ratios[-_SHORTEST_TAIL:][0] == log_ratios[-1]  # ArviZ refuses a tail that is all ties
    elpd_i = np.logaddexp.reduce(ratio) - np.logaddexp.reduce(log_ratios, axis=0)
    khat = np.where(is_impossible, np.inf, -np.inf)
    is_smooth = ~is_bounded & ~is_impossible
    if is_smooth.any():
        left = log_lik[:, is_smooth]
        tree = arviz_base.from_dict({"posterior": {"_": ratio[None]}, "log_likelihood": {"y": left[None]}})
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # high k-hats are counted and reported, not printed
            warnings.simplefilter("ignore", UserWarning)
            estimate: Any = arviz_stats.loo_approximate_posterior  # type: ignore[attr-defined]
            loo = estimate(tree, ratio, np.zeros_like(ratio), pointwise=True, var_name="y")
        smoothed, fitted = (np.array(v, dtype=np.float64).ravel() for v in (loo.elpd_i, loo.pareto_k))
        is_undefined = np.isnan(smoothed) | np.isnan(fitted)
        elpd_i[is_smooth] = np.where(is_undefined, elpd_i[is_smooth], smoothed)
        khat[is_smooth] = np.where(is_undefined, np.inf, fitted)
    return elpd_i, khat


def build_tree(
    *,
    multipliers: Floats,
    prior: Floats,
    log_lik: Floats,
    reduced: Floats,
    predicted: NDArray[Any],
    observed: NDArray[Any],
    groups: list[str],
    bmr: Mapping[str, Floats],
    candidates: Mapping[str, NDArray[Any]],
    pointwise: Mapping[str, Floats],
    attributes: Mapping[str, Any],
) -> xr.DataTree:
    """All of the evidence under ArviZ's names: draws are ``[chain, draw, ...]``, the rest has a value per group or row.

    Args:
        multipliers: posterior draws, ``[chain, draw, group]``; a chain is a fit from another seed.
        prior: prior draws of the same.
        log_lik: of the full network, ``[chain, draw, row]``.
        reduced: of the network that the score alone would choose, ``[1, draw, row]``.
        predicted: targets drawn from the full network, shaped as ``log_lik`` and then as a target.
        observed: the targets.
        groups: labels.
        bmr: columns by group.
        candidates: columns by candidate.
        pointwise: columns by candidate and row, ``[candidate, row]``.
        attributes: of the tree.
    """
    rows = ["row", *(f"output_{i}" for i in range(1, observed.ndim))]
    tree: xr.DataTree = arviz_base.from_dict(
        {
            "posterior": {"multiplier": multipliers},
            "prior": {"multiplier": prior},
            "log_likelihood": {"y": log_lik},
            "posterior_predictive": {"y": predicted},
            "observed_data": {"y": observed},
        },
        coords={"group": groups, "row": np.arange(len(observed))},
        dims={"multiplier": ["group"], "y": rows},
    )
    tree["reduced"] = xr.DataTree(
        tree["log_likelihood"].to_dataset().isel(chain=[0]).assign(y=(("chain", "draw", "row"), reduced))
    )
    tree["bmr"] = xr.DataTree(xr.Dataset({k: ("group", v) for k, v in bmr.items()}, coords={"group": groups}))
    tree["candidates"] = xr.DataTree(xr.Dataset({k: ("candidate", v) for k, v in candidates.items()}))
    tree["pointwise"] = xr.DataTree(xr.Dataset({k: (("candidate", "row"), v) for k, v in pointwise.items()}))
    tree.attrs |= dict(attributes)
    return tree


def to_arviz(tree: xr.DataTree, network: str) -> Any:
    """What the installed ArviZ takes: a tree, or ``InferenceData`` for ArviZ below 1.

    Raises:
        MissingExtraError: ArviZ is not installed.
    """
    try:
        import arviz
    except ImportError as error:
        raise MissingExtraError.of("arviz", "plots", "ArviZ's plots and tables") from error
    groups = {name: tree[name].to_dataset() for name in _PLOTTED}
    if network == "reduced":
        own = ("prior", "observed_data")  # its draws are those of the first chain; it was not asked for predictions
        groups = {name: groups[name] for name in own}
        groups |= {
            "posterior": tree["posterior"].to_dataset().isel(chain=[0]),
            "log_likelihood": tree["reduced"].to_dataset(),
        }
    if hasattr(arviz, "InferenceData") and int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData(**groups)  # type: ignore[arg-type]
    return xr.DataTree.from_dict(groups)
