"""The only file that touches ArviZ: its diagnostics, and the tree that its functions take.

Inside is a ``DataTree`` by ``arviz-base`` and ``arviz-stats``, which speak the same on all versions; ``to_arviz`` turns
it into what the installed ``arviz`` plots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import arviz_base
import arviz_stats
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyrobc.errors import MissingExtraError

__all__ = ["build_tree", "diagnose_chains", "find_hdi", "to_arviz"]

Floats = NDArray[np.float64]
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
    if int(arviz.__version__.split(".")[0]) < 1:  # asked first: ArviZ 1 warns of whoever looks for the class
        return arviz.InferenceData(**groups)  # type: ignore[arg-type]
    return xr.DataTree.from_dict(groups)
