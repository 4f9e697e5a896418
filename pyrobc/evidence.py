r"""Predictive checks of nested candidates, as an ArviZ ``DataTree``: the only file that touches ArviZ.

Candidates are a nested path: groups leave in the order of their log odds.  For each, the log likelihood of every row is
computed under draws of the posterior with removed groups' multipliers at zero.  On *training* rows the expected log
predictive density is PSIS leave-one-out.  Draws come from a variational q, so the weights carry the correction
:math:`p(\theta|y)/q(\theta)` (Magnusson et al. 2019); where the k-hat of that ratio itself is above its limit the
correction is worse than none, and q is taken as the posterior, which is said.  On *held-out* rows no leave-one-out is
needed: :math:`\mathrm{elpd}_i = \ln\frac1S\sum_s p(y_i|\theta_s)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import arviz_base
import arviz_stats
import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Independent
from tqdm.auto import tqdm

from pyrobc.batches import as_loader, move, repeatable
from pyrobc.dependency import first_tensor
from pyrobc.errors import DataError
from pyrobc.groups import Ints, Kept
from pyrobc.meanfield import slice_site
from pyrobc.posterior import Posterior
from pyrobc.scores import PriorOdds, Score

__all__ = ["Candidate", "Evidence", "evidence"]

Floats = NDArray[np.float64]
_SHORTEST_TAIL = 5  # ratios to which a Pareto tail is fitted at least


@dataclass(frozen=True)
class Candidate:
    """One reduced network of the nested path.

    Attributes:
        num_removed: groups removed, the first so many of the path's order.
        elpd: expected log predictive density, nats over all rows.
        se: its standard error.
        diff: elpd minus that of the full network, nats; negative says worse.
        diff_se: standard error of the paired difference.
        khat_bad: share of rows whose k-hat is above its limit (zero on held-out rows).
        parameters: trainable parameters left.
        macs: multiply-accumulates left.
    """

    num_removed: int
    elpd: float
    se: float
    diff: float
    diff_se: float
    khat_bad: float
    parameters: int
    macs: int


@dataclass(frozen=True)
class Evidence:
    """Candidates and the draws behind them.

    Attributes:
        tree: groups ``posterior``, ``log_likelihood`` (full network), ``reduced`` (log likelihood of the network that
            the score alone would choose), ``observed_data``, ``bmr`` and ``candidates``.
        candidates: the nested path, the full network first.
        order: groups from first to leave to last, as positions in ``score.spec.labels()``.
        posterior_khat: k-hat of p(theta|y)/q(theta); how well q covers the posterior.
        good_k: its limit for this number of draws.
        method: how elpd was estimated, in words.
    """

    tree: xr.DataTree
    candidates: tuple[Candidate, ...]
    order: Ints
    posterior_khat: float
    good_k: float
    method: str

    def to_arviz(self) -> Any:
        """What the installed ArviZ plots: the tree itself, or ``InferenceData`` for ArviZ below 1."""
        import arviz

        if hasattr(arviz, "InferenceData") and int(arviz.__version__.split(".")[0]) < 1:
            keep = ("posterior", "log_likelihood", "observed_data")
            groups = {name: self.tree[name].to_dataset() for name in keep}
            return arviz.InferenceData(**groups)  # type: ignore[arg-type]
        return self.tree

    def to_frame(self) -> Any:
        """The candidates as a pandas table."""
        import pandas as pd

        return pd.DataFrame([vars(c) for c in self.candidates])


def evidence(
    posterior: Posterior,
    score: Score,
    data: Any,
    *,
    is_training_data: bool = True,
    prior_odds: PriorOdds | None = None,
    num_draws: int = 200,
    num_candidates: int = 6,
    max_rows: int = 10_000,
    seed: int = 0,
    progress: bool = False,
) -> Evidence:
    """Compare the full network with nested reduced ones on rows that decisions may use.

    Args:
        posterior: the fitted network.
        score: log odds that order the groups.
        data: loader or pair of arrays; never the test set.
        is_training_data: whether the fit saw these rows; then leave-one-out corrects for it.
        prior_odds: those that ``decide`` will use (``Score.log_odds``); ``implied`` if None, ``learned`` for a point.
        num_draws: posterior draws.
        num_candidates: reduced networks besides the full one; the score's own choice is always among them.
        max_rows: rows used at most.
        seed: seed of the draws.
        progress: show a progress bar for each candidate.

    Raises:
        DataError: no rows, or too few draws.
    """
    if num_draws < 25:
        raise DataError(
            "posterior draws for the evidence",
            got=str(num_draws),
            allowed="25 or more: Pareto smoothing fits a tail of at least 5",
            fix="pass num_draws=200",
        )
    with repeatable(data, seed):  # a loader that shuffles gives the same rows again
        inputs, targets = _take_rows(data, posterior.model.anchor, max_rows)
    odds: PriorOdds = ("implied" if _has_implied(score) else "learned") if prior_odds is None else prior_odds
    log_odds = _flat(score, score.log_odds(odds))
    order = np.argsort(np.where(np.isfinite(log_odds), -log_odds, np.inf), kind="stable")
    draws = [posterior.draw(seed * 100_003 + s) for s in range(num_draws)]
    weight = posterior.num_data / len(targets)
    sizes = _candidate_sizes(log_odds, num_candidates)
    method, khat, good_k = "mean over draws on held-out rows", float("nan"), float("nan")
    fits: dict[int, tuple[Floats, Floats]] = {}
    corrected = False
    for removed in sizes:
        kept = _keep_all_but(score, order[:removed])
        rows = posterior.log_likelihoods(inputs, targets, draws, kept)
        bar = tqdm(rows, f"evidence, {removed} groups removed", num_draws, disable=not progress, unit="draw")
        log_lik = torch.stack(list(bar)).double().cpu().numpy()
        if not is_training_data:
            elpd_i = np.logaddexp.reduce(log_lik, axis=0) - np.log(num_draws)
            fits[removed] = elpd_i, np.zeros(len(elpd_i))
        else:
            ratio = _log_ratio(posterior, draws, kept) + weight * log_lik.sum(1)
            if removed == 0:
                khat, good_k = _ratio_khat(ratio, num_draws)
                corrected = khat <= good_k
                method = "PSIS-LOO, corrected for q" if corrected else "PSIS-LOO, q taken as the posterior"
            fits[removed] = _leave_one_out(log_lik, ratio if corrected else np.zeros(num_draws))
        if removed == 0:
            full_log_lik = log_lik
        if removed == _choice(log_odds):
            chosen_log_lik = log_lik
    candidates = tuple(_compare(score, order, n, fits[n], fits[0][0], good_k) for n in sizes)
    tree = _build_tree(posterior, score, draws, full_log_lik, chosen_log_lik, targets, candidates, log_odds)
    return Evidence(tree, candidates, order, khat, good_k, method)


def _take_rows(data: Any, anchor: Tensor, max_rows: int) -> tuple[Any, Tensor]:
    inputs, targets, rows = [], [], 0
    for batch in as_loader(data, batch_size=max_rows, shuffle=False):
        inputs.append(move(batch[0], anchor))
        targets.append(move(batch[1], anchor))
        rows += len(targets[-1])
        if rows >= max_rows:
            break
    if rows == 0:
        raise DataError("evidence rows", got="none", allowed="at least two rows", fix="pass the training loader")
    first = inputs[0]
    if isinstance(first, Tensor):
        joined: Any = torch.cat(inputs)[:max_rows]
    elif isinstance(first, Mapping):
        joined = {k: torch.cat([part[k] for part in inputs])[:max_rows] for k in first}
    else:
        joined = tuple(torch.cat(parts)[:max_rows] for parts in zip(*inputs, strict=True))
    return joined, torch.cat(targets)[: len(first_tensor(joined))]


def _candidate_sizes(log_odds: Floats, count: int) -> list[int]:
    """The full network, the score's own choice, and steps around it, all below the number of groups."""
    choice, total = _choice(log_odds), len(log_odds)
    shares = np.linspace(0.5, 1.0, max(count - 1, 1))
    beyond = choice + (total - choice) // 4
    return sorted({0, choice, min(beyond, total - 1), *(int(share * choice) for share in shares)})


def _choice(log_odds: Floats) -> int:
    return int((np.isfinite(log_odds) & (log_odds > 0)).sum())


def _keep_all_but(score: Score, removed: Ints) -> dict[str, Ints]:
    keep = np.ones(score.spec.num_groups, dtype=bool)
    keep[removed] = False
    starts = np.cumsum([0, *(block.size for block in score.spec.blocks)])
    return {b.name: np.flatnonzero(keep[s : s + b.size]) for b, s in zip(score.spec.blocks, starts, strict=False)}


def _log_ratio(posterior: Posterior, draws: list[dict[str, Tensor]], kept: Kept) -> Floats:
    """Log prior minus log guide of the kept sites at each draw; points are constant and left out."""
    model = posterior.model
    priors, laws = model.priors(), posterior.laws()
    indices = model.spec.kept_indices(kept)
    total = np.zeros(len(draws))
    with torch.no_grad():
        for site, law in laws.items():
            if isinstance(law, Delta):
                continue
            q, p = (d.base_dist if isinstance(d, Independent) else d for d in (law, priors[site]))
            for s, values in enumerate(draws):
                term = (p.log_prob(values[site]) - q.log_prob(values[site])).double().expand(values[site].shape)
                total[s] += float(slice_site(site, term, model.spec, kept, indices).sum())
    return total


def _ratio_khat(ratio: Floats, num_draws: int) -> tuple[float, float]:
    _, khat = arviz_stats.base.array_stats.psislw(ratio - ratio.max())  # type: ignore[attr-defined]
    return float(khat), min(1 - 1 / np.log10(num_draws), 0.7)


def _leave_one_out(log_lik: Floats, ratio: Floats) -> tuple[Floats, Floats]:
    r"""Expected log density of every row left out, and the k-hat of its importance ratios.

    Ratios that cannot be smoothed are used as they are,
    :math:`\ln\sum_s r_s - \ln\sum_s r_s/p(y_i|\theta_s)`.  Where the largest of them are equal (every draw predicts
    the row with certainty) they are bounded, and k-hat is minus infinity; where the fit of the tail fails, infinity.
    """
    log_ratios = np.sort(ratio[:, None] - log_lik, axis=0)
    is_bounded = log_ratios[-_SHORTEST_TAIL:][0] == log_ratios[-1]  # ArviZ refuses a tail that is all ties
    elpd_i = np.logaddexp.reduce(ratio) - np.logaddexp.reduce(log_ratios, axis=0)
    khat = np.full(len(elpd_i), -np.inf)
    if not is_bounded.all():
        left = log_lik[:, ~is_bounded]
        tree = arviz_base.from_dict({"posterior": {"_": ratio[None]}, "log_likelihood": {"y": left[None]}})
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # high k-hats are counted and reported, not printed
            warnings.simplefilter("ignore", UserWarning)
            estimate: Any = arviz_stats.loo_approximate_posterior  # type: ignore[attr-defined]
            loo = estimate(tree, ratio, np.zeros_like(ratio), pointwise=True, var_name="y")
        smoothed, fitted = (np.array(v, dtype=np.float64).ravel() for v in (loo.elpd_i, loo.pareto_k))
        is_undefined = np.isnan(smoothed) | np.isnan(fitted)
        elpd_i[~is_bounded] = np.where(is_undefined, elpd_i[~is_bounded], smoothed)
        khat[~is_bounded] = np.where(is_undefined, np.inf, fitted)
    return elpd_i, khat


def _compare(
    score: Score, order: Ints, removed: int, fit: tuple[Floats, Floats], full: Floats, good_k: float
) -> Candidate:
    elpd_i, khat = fit
    parameters, macs = score.spec.forecast(_keep_all_but(score, order[:removed]))
    gap = elpd_i - full
    rows = len(elpd_i)
    return Candidate(
        num_removed=removed,
        elpd=float(elpd_i.sum()),
        se=float(np.sqrt(rows * elpd_i.var())),
        diff=float(gap.sum()),
        diff_se=float(np.sqrt(rows * gap.var())),
        khat_bad=float((khat > good_k).mean()),
        parameters=parameters,
        macs=macs,
    )


def _build_tree(
    posterior: Posterior,
    score: Score,
    draws: list[dict[str, Tensor]],
    full: Floats,
    chosen: Floats,
    targets: Tensor,
    candidates: tuple[Candidate, ...],
    log_odds: Floats,
) -> xr.DataTree:
    spec = score.spec
    gates = [posterior.model.family.combine(d, spec).gates for d in draws]
    multipliers = np.stack([np.concatenate([g[b.name].double().cpu().numpy() for b in spec.blocks]) for g in gates])
    observed = targets.cpu().numpy()
    rows = ["row", *(f"output_{i}" for i in range(1, observed.ndim))]
    tree: xr.DataTree = arviz_base.from_dict(
        {
            "posterior": {"multiplier": multipliers[None]},
            "log_likelihood": {"y": full[None]},
            "observed_data": {"y": observed},
        },
        coords={"group": spec.labels(), "row": np.arange(len(observed))},
        dims={"multiplier": ["group"], "y": rows},
    )
    log_lik = tree["log_likelihood"].to_dataset()
    tree["reduced"] = xr.DataTree(log_lik.assign(y=log_lik["y"].copy(data=chosen[None])))
    bmr = {"delta_f": _flat(score, score.delta_f), "mcse": _flat(score, score.mcse), "log_odds": log_odds}
    columns = {k: ("group", v) for k, v in bmr.items()}
    tree["bmr"] = xr.DataTree(xr.Dataset(columns, coords={"group": spec.labels()}))
    fields = {k: ("candidate", np.array([vars(c)[k] for c in candidates])) for k in vars(candidates[0])}
    tree["candidates"] = xr.DataTree(xr.Dataset(fields))
    tree.attrs |= {"family": posterior.model.family.name, "seed": posterior.seed, "label": score.label}
    return tree


def _flat(score: Score, values: Mapping[str, Floats]) -> Floats:
    return np.concatenate([values[block.name] for block in score.spec.blocks])


def _has_implied(score: Score) -> bool:
    return not all(np.isnan(value).all() for value in score.implied.values())
