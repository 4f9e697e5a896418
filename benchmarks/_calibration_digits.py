"""Digits: what removing random groups does to the ELBO, labels without meaning, and inputs without meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.distributions import Delta

from pyrobc.batches import seeded
from pyrobc.bmr.pareto import khat_limit
from pyrobc.compare import measure_error
from pyrobc.compress import compress
from pyrobc.coverage import draw_log_ratios, ratio_khat
from pyrobc.demo import Digits, build_network, load_digits, train_dense
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.groups import Ints
from pyrobc.lift import lift
from pyrobc.models import mlp
from pyrobc.objective import fast_loss
from pyrobc.posterior import Posterior
from pyrobc.scores import score

__all__ = ["FITS", "measure_change", "measure_labels", "measure_noise"]

_SHARED = {"epochs": 240, "lr": 1e-2, "batch_size": 64}
FITS: dict[str, dict[str, Any]] = {
    "log_uniform": _SHARED | {"warmup_epochs": 0, "family_args": {"num_draws": 8, "gate_lr": 5.0}},
    "group_normal_jeffreys": _SHARED | {"warmup_epochs": 80, "family_args": {"num_draws": 8, "scale_lr": 3.0}},
}
"""Those of the demonstration when this study began; they stay, whatever it is tuned to later."""

DRAWS = 200  # of the posterior, for k-hat


def measure_change(seed: int, family: str, epochs: int, readapt: int, sets: list[int]) -> dict[str, Any]:
    r"""Sets of groups drawn at random, 1 to 64 of them: predicted and realised change of the ELBO.

    Two predictions before anything re-adapts: the sum of the groups' ΔF, which factorise under a mean-field guide, and
    the change of the ELBO from draws, in which groups meet in the likelihood and removed ones cost no divergence
    (``pyrobc.coverage``).  A third re-adapts for a twelfth of the epochs.  Realised is the ELBO of the network without
    them, less that of the whole network, both fitted on for as long.  A point has a density and no entropy, so that its
    log prior counts from its peak: removing a weight at zero then changes nothing, as removing one whose guide is its
    prior does.  k-hat: does the reduced posterior cover that of the reduced model?
    """
    digits, settings = load_digits(), FITS[family]
    warmup = min(settings["warmup_epochs"], epochs // 3)
    model = lift(
        build_network(seed), make_family(family, **settings["family_args"]), "categorical", digits.train[0][:1]
    )
    posterior = fit(
        model, digits.train, epochs=epochs, warmup_epochs=warmup, lr=settings["lr"], batch_size=settings["batch_size"],
        seed=seed, schedule=anneal(epochs), progress=False,
    )  # fmt: skip
    scored = score(posterior)
    blocks = scored.spec.blocks
    price, odds = (np.concatenate([part[b.name] for b in blocks]) for part in (scored.delta_f, scored.log_odds()))
    edges = np.cumsum([0, *(b.size for b in blocks)])
    lengths = (readapt, max(1, readapt // 12))
    whole = [_estimate_elbo(_continue(posterior.copy(), digits, seed, length), digits) for length in lengths]
    full = draw_log_ratios(posterior, *digits.train, scored.spec.everything(), num_draws=DRAWS)
    keys = ("size", "wanted", "delta_f", "elbo_gain", "elbo_gain_se", "realised", "early", "khat")
    found: dict[str, list[float]] = {key: [] for key in keys}
    for which in sets:
        generator = np.random.default_rng(1_000 * seed + which)
        chosen = generator.choice(len(price), 2 ** int(generator.integers(0, 7)), replace=False)
        kept: dict[str, Ints] = {
            b.name: np.setdiff1d(np.arange(b.size), chosen - edge) for b, edge in zip(blocks, edges, strict=False)
        }
        after = [_estimate_elbo(_continue(posterior.restricted(kept), digits, seed, n), digits) for n in lengths]
        realised, early = (a - b for a, b in zip(after, whole, strict=True))
        ratios = draw_log_ratios(posterior, *digits.train, kept, num_draws=DRAWS)
        gain, error = (ratios - full).mean(), (ratios - full).std(ddof=1) / np.sqrt(DRAWS)
        values = (len(chosen), (odds[chosen] > 0).sum(), price[chosen].sum(), gain, error, realised, early)
        for column, value in zip(found.values(), (*values, ratio_khat(ratios)), strict=True):
            column.append(float(value))
    return found | {"posterior_khat": ratio_khat(full), "good_k": khat_limit(DRAWS)}


def _continue(posterior: Posterior, digits: Digits, seed: int, epochs: int) -> Posterior:
    """As ``compress`` re-adapts after a cut, at a tenth of the learning rate of the fit."""
    return fit(
        posterior.model, digits.train, guide=posterior.guide, epochs=epochs, lr=1e-3, batch_size=64, seed=seed,
        schedule=anneal(epochs), progress=False,
    )  # fmt: skip


@torch.no_grad()
def _estimate_elbo(posterior: Posterior, digits: Digits, draws: int = 64) -> float:
    """Mean of single-draw estimates over all training rows, nats; log priors of points counted from their peaks."""
    loss = fast_loss(posterior.model, posterior.guide, posterior.num_data)
    priors = posterior.model.priors()
    peaks = sum(
        float(priors[site].log_prob(priors[site].mode).double().sum())
        for site, law in posterior.laws().items()
        if isinstance(law, Delta)
    )
    with seeded(0):
        return -float(np.mean([float(loss(*digits.train, 1.0)) for _ in range(draws)])) - peaks


def measure_labels(seed: int, family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What is left of the digits network where there is nothing to learn, and what the plan says."""
    x, y = load_digits().train
    with seeded(seed):
        y = y[torch.randperm(len(y))]
    result = compress(build_network(seed), (x, y), family=family, seed=seed, progress=False, **settings)
    groups = sum(block.size for block in result.plan.blocks)
    return {
        "left": result.plan.parameters[1] / result.plan.parameters[0],
        "widths": [after for _, after in result.plan.widths.values()],
        "abstained": result.plan.num_abstained / groups,
        "gain": [result.evidence.gain, result.evidence.gain_se],
        "notes": list(result.plan.notes),
    }


def measure_noise(seed: int, family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Noise inputs that leave, and errors on test rows in percent, beside a dense network with the same inputs."""
    with seeded(seed):
        wide = Digits(*((torch.cat([x, torch.rand(len(x), 64)], 1), y) for x, y in load_digits()))
        net = mlp.build(128, (300, 100), 10)
    epochs = settings["epochs"]
    dense = train_dense(net, wide.train, epochs + epochs // 4, seed=seed)
    with seeded(seed):
        net = mlp.build(128, (300, 100), 10)
    result = compress(net, wide.train, family=family, dense=dense, seed=seed, progress=False, **settings)
    kept = np.array(result.plan.kept()["input"])
    errors = [100 * measure_error(one, wide.test, "categorical")[0] for one in (dense, result.net)]
    return {
        "noise_pruned": 1 - int((kept >= 64).sum()) / 64,
        "signal_kept": int((kept < 64).sum()),
        "widths": [after for _, after in result.plan.widths.values()],
        "errors": errors,
    }
