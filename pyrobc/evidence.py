r"""Predictive checks of nested candidates, and the draws behind them, as an ArviZ ``DataTree``.

Candidates are a nested path: groups leave in the order of their log odds.  For each, the log likelihood of every row is
computed under draws of the posterior with removed groups' multipliers at zero.  On *training* rows the expected log
predictive density is PSIS leave-one-out.  Draws come from a variational q, so the weights carry the correction
:math:`p(\theta|y)/q(\theta)` (Magnusson et al. 2019); where the k-hat of that ratio itself is above its limit the
correction is worse than none, and q is taken as the posterior, which is said.  On *held-out* rows no leave-one-out is
needed: :math:`\mathrm{elpd}_i = \ln\frac1S\sum_s p(y_i|\theta_s)`.

The k-hat of each candidate is that of its reduced posterior against the posterior of its reduced model, its ELBO gain
what the reduction does to the ELBO before anything re-adapts (``coverage``); re-adapted candidates have that of their
own fit.
Each group's change of prior has a k-hat of its own, that of the weights :math:`\tilde p(z_s)/p(z_s)` at draws of its
multiplier: whether importance sampling would have found the score, infinite where no draw reaches the ROPE.  A closed
form does not need that: it says how far the reduction moves the posterior, not whether ΔF is right.

Whether the fit learned anything is asked as well: the ELPD of the full network beside that of a predictor that knows
the targets and not the inputs (``Likelihood.predict_constant``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyrobc.arviz_io import build_tree, diagnose_chains, find_hdi, to_arviz
from pyrobc.batches import move, seeded
from pyrobc.bmr.monte_carlo import estimate_reduction
from pyrobc.bmr.pareto import khat_limit
from pyrobc.calling import evaluating
from pyrobc.candidates import Candidate, choose_sizes, compare_candidate, count_wanted, keep_all_but
from pyrobc.coverage import log_ratio, ratio_khat
from pyrobc.decision_rows import DecisionRows, take_rows
from pyrobc.errors import ConfigError, DataError, ReductionError
from pyrobc.fit import fit
from pyrobc.groups import Ints, Kept
from pyrobc.kinds import check_kind
from pyrobc.leave_one_out import leave_one_out
from pyrobc.posterior import Posterior
from pyrobc.scores import PriorOdds, Score

__all__ = ["Candidate", "Evidence", "evidence"]

Floats = NDArray[np.float64]
Draws = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Evidence:
    """Candidates and the draws behind them.

    Attributes:
        tree: groups ``posterior`` and ``prior`` of the multipliers, ``log_likelihood`` and ``posterior_predictive`` of
            the full network, ``reduced`` (log likelihood of the network that the score alone would choose),
            ``observed_data``, ``bmr`` (ΔF, its MCSE, log odds, k-hat of the change of prior; R-hat and ESS where
            several fits were given), ``candidates``, and ``pointwise`` (ELPD and k-hat of each row under each).
        candidates: the nested path, the full network first.
        order: groups from first to leave to last, as positions in ``score.spec.labels()``.
        posterior_khat: k-hat of p(theta|y)/q(theta); how well q covers the posterior.
        good_k: its limit for this number of draws.
        method: how elpd was estimated, in words.
        gain: elpd of the full network minus that of a predictor that does not read the inputs, nats over the rows
            looked at; NaN where that has none.
        gain_se: standard error of this paired difference.
    """

    tree: xr.DataTree
    candidates: tuple[Candidate, ...]
    order: Ints
    posterior_khat: float
    good_k: float
    method: str
    gain: float = float("nan")
    gain_se: float = float("nan")

    def to_arviz(self, network: Literal["full", "reduced"] = "full") -> Any:
        """What the installed ArviZ takes, for the full network or the one that the score alone would choose.

        Raises:
            ConfigError: another network.
            MissingExtraError: ArviZ is not installed.
        """
        if network not in ("full", "reduced"):
            raise ConfigError("network", got=repr(network), allowed="'full' or 'reduced'", fix="leave it out")
        return to_arviz(self.tree, network)

    def hdi(self, probability: float) -> Floats:
        """Highest-density interval of every group's multiplier, ``[groups, 2]``."""
        draws: Any = self.tree["posterior"]["multiplier"].to_numpy()
        return find_hdi(draws[0], probability)

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
    others: Sequence[Posterior] = (),
    readapt: Mapping[str, Any] | None = None,
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
        max_rows: rows looked at; of more than that, a random sample, from which ``Candidate.elpd_all`` is estimated.
        others: fits of the same network from other seeds: further chains, for R-hat and ESS.  Hidden units have no
            order that two fits would share, so that only inputs can be expected to agree.
        readapt: arguments of ``fit`` (``data``, ``epochs``, ``lr``) with which each reduced network is fitted on before
            it is compared; None compares them as they are cut.
        seed: seed of the draws.
        progress: show a progress bar for each candidate.

    Raises:
        DataError: no rows, too few draws, rows that the full network holds impossible, or fits of another network.
    """
    check_kind(posterior, Posterior, "posterior", "what bc.fit returns", "pass evidence(posterior, score, data)")
    check_kind(score, Score, "score", "what bc.score returns", "pass evidence(posterior, score, data)")
    if num_draws < 25:
        raise DataError(
            "posterior draws for the evidence",
            got=str(num_draws),
            allowed="25 or more: Pareto smoothing fits a tail of at least 5",
            fix="pass num_draws=200",
        )
    if any(other.model.spec.tensors != posterior.model.spec.tensors for other in others):
        raise DataError(
            "other fits", got="another network", allowed="the same network from other seeds",
            fix="fit lift(net, ...) again with seed=1",
        )  # fmt: skip
    spec = score.spec
    rows = take_rows(posterior, data, max_rows, seed)
    log_odds = _flat(score, score.log_odds(score.default_odds if prior_odds is None else prior_odds))
    order = np.argsort(np.where(np.isfinite(log_odds), -log_odds, np.inf), kind="stable")
    fits = [posterior, *others]
    chains = [[one.draw(seed * 100_003 + s) for s in range(num_draws)] for one in fits]
    full_log_lik, predicted = _predict_full(fits, chains, rows, seed, progress)
    method, khat, good_k = "mean over draws on held-out rows", float("nan"), float("nan")
    densities: dict[int, tuple[Floats, Floats]] = {}
    ratios: dict[int, Floats] = {}
    is_corrected = False
    for removed in choose_sizes(log_odds, num_candidates):
        kept = keep_all_but(spec, order[:removed])
        judged, draws, left = posterior, chains[0], kept
        if removed and readapt and not spec.emptied(kept):  # a layer without channels can be masked, not cut
            judged = _readapt(posterior, kept, readapt, seed)
            draws, left = [judged.draw(seed * 100_003 + s) for s in range(num_draws)], judged.model.spec.everything()
        log_lik = full_log_lik[0] if removed == 0 else _compute_log_lik(judged, rows, draws, left, removed, progress)
        if not is_training_data:
            elpd_i = np.logaddexp.reduce(log_lik, axis=0) - np.log(num_draws)
            densities[removed] = elpd_i, np.zeros(len(elpd_i))
        else:
            ratio = log_ratio(judged, draws, left) + posterior.num_data / len(rows.targets) * log_lik.sum(1)
            ratios[removed] = ratio
            if removed == 0:
                khat, good_k = ratio_khat(ratio), khat_limit(num_draws)
                is_corrected = khat <= good_k
                method = "PSIS-LOO, corrected for q" if is_corrected else "PSIS-LOO, q taken as the posterior"
            use = is_corrected and bool(np.isfinite(ratio).any())
            densities[removed] = leave_one_out(log_lik, ratio if use else np.zeros(num_draws))
        if removed == count_wanted(log_odds):
            chosen_log_lik = log_lik
    full = densities[0][0]
    candidates = tuple(
        compare_candidate(
            spec.forecast(keep_all_but(spec, order[:n])), n, found, full, good_k, rows,
            (ratios[n], ratios[0]) if n in ratios else None,
        )
        for n, found in densities.items()
    )  # fmt: skip
    multipliers = np.stack([_read_multipliers(one, draws) for one, draws in zip(fits, chains, strict=True)])
    scales = posterior.presence()
    with seeded(seed):
        prior = [scales[b.name].prior.sample(torch.Size((num_draws,))).cpu().numpy() for b in spec.blocks]
    bmr = {"delta_f": _flat(score, score.delta_f), "mcse": _flat(score, score.mcse), "log_odds": log_odds}
    bmr["threshold"], bmr["rank"] = _flat(score, score.threshold), np.argsort(order).astype(np.float64)
    bmr["khat"] = _change_khats(posterior, score, max(num_draws, 1000), seed)
    if others:
        bmr["rhat"], bmr["ess"] = diagnose_chains(multipliers)
    gain = _measure_gain(posterior, rows, full)
    tree = build_tree(
        multipliers=multipliers,
        prior=np.concatenate(prior, axis=1)[None],
        log_lik=full_log_lik,
        reduced=chosen_log_lik[None],
        predicted=predicted,
        observed=rows.targets.cpu().numpy(),
        groups=spec.labels(),
        bmr=bmr,
        candidates={k: np.array([vars(c)[k] for c in candidates]) for k in vars(candidates[0])},
        pointwise={k: np.stack([found[i] for found in densities.values()]) for i, k in enumerate(("elpd", "khat"))},
        attributes={"family": posterior.model.family.name, "seed": posterior.seed, "label": score.label,
                    "method": method, "posterior_khat": khat, "good_k": good_k, "gain": gain[0], "gain_se": gain[1]},
    )  # fmt: skip
    return Evidence(tree, candidates, order, khat, good_k, method, *gain)


def _predict_full(
    fits: list[Posterior], chains: list[Draws], rows: DecisionRows, seed: int, progress: bool
) -> tuple[Floats, NDArray[Any]]:
    """Log likelihoods and predicted targets of the full network, chain by chain.

    Raises:
        DataError: a row is impossible under a draw.
    """
    log_lik, predicted = [], []
    is_impossible = np.zeros(len(rows.targets), dtype=bool)
    with seeded(seed):
        for one, draws in zip(fits, chains, strict=True):
            laws = one.predictions(rows.inputs, draws, one.model.spec.everything())
            for law in tqdm(laws, "evidence, full network", len(draws), disable=not progress, unit="draw"):
                found = law.log_prob(rows.targets).double().cpu().numpy()
                is_impossible |= ~np.isfinite(found)
                if not is_impossible.any():
                    log_lik.append(found)
                    predicted.append(law.sample().cpu().numpy())
    if is_impossible.any():
        raise DataError(
            "log likelihood of the full network",
            got=f"-inf or NaN on {is_impossible.sum()} of {len(is_impossible)} rows",
            allowed="finite numbers: draws that hold an observed row possible",
            fix="check those targets, or fit longer or with a smaller lr",
        )
    shape = len(fits), len(chains[0])
    return np.stack(log_lik).reshape(*shape, -1), np.stack(predicted).reshape(*shape, *predicted[0].shape)


def _measure_gain(posterior: Posterior, rows: DecisionRows, full: Floats) -> tuple[float, float]:
    """ELPD of the full network minus that of a predictor that knows the other rows' targets only, and its error."""
    model = posterior.model
    with torch.no_grad(), evaluating(model):
        outputs = model.run(posterior.mean(), move(model.example_inputs, model.anchor))
    constant = model.likelihood.predict_constant(rows.targets, outputs.shape[-1])
    gap = full - constant.double().cpu().numpy()
    return float(gap.sum()), float(np.sqrt(len(gap) * gap.var()))


def _compute_log_lik(
    posterior: Posterior, rows: DecisionRows, draws: Draws, kept: Kept, removed: int, progress: bool
) -> Floats:
    laws = posterior.predictions(rows.inputs, draws, kept)
    bar = tqdm(laws, f"evidence, {removed} groups removed", len(draws), disable=not progress, unit="draw")
    return np.stack([law.log_prob(rows.targets).double().cpu().numpy() for law in bar])


def _readapt(posterior: Posterior, kept: Kept, settings: Mapping[str, Any], seed: int) -> Posterior:
    small = posterior.restricted(kept)
    return fit(small.model, **({"seed": seed, "progress": False} | dict(settings)), guide=small.guide)


def _change_khats(posterior: Posterior, score: Score, num_draws: int, seed: int) -> Floats:
    """k-hat of every group's change of prior; NaN for a point, whose ratio has no density, and for a baseline."""
    reduction = posterior.model.family.reduced().get(score.label)
    generator = torch.Generator().manual_seed(seed)
    scales, columns = posterior.presence(), []
    for block in score.spec.blocks:
        scale, threshold = scales[block.name], torch.as_tensor(score.threshold[block.name])
        khat = np.full(block.size, np.nan)
        if reduction is not None and reduction.event is not None:
            reduced = reduction.of(scale.prior, threshold)
            try:
                found = estimate_reduction(
                    scale.posterior, scale.prior, reduced, num_draws=num_draws, generator=generator
                )
                is_unseen = found.delta_f.isneginf()  # no draw in the ROPE: nothing is known, though no weight is large
                khat[:] = torch.where(is_unseen, torch.inf, cast(Tensor, found.khat)).cpu().numpy()
            except ReductionError:  # a law that draws cannot price
                pass
        columns.append(khat)
    return np.concatenate(columns)


def _read_multipliers(posterior: Posterior, draws: Draws) -> Floats:
    """``[draw, group]``."""
    spec = posterior.model.spec
    gates = [posterior.model.family.combine(values, spec).gates for values in draws]
    return np.stack([np.concatenate([g[b.name].detach().double().cpu().numpy() for b in spec.blocks]) for g in gates])


def _flat(score: Score, values: Mapping[str, Floats]) -> Floats:
    return np.concatenate([values[block.name] for block in score.spec.blocks])
