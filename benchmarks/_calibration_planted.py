"""Fits of planted data: which inputs a rule removes, what NUTS says of them, and how many units a teacher leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer import MCMC, NUTS
from scipy.special import expit
from torch import Tensor, nn

from benchmarks._planted import Planted, draw_regression, draw_teacher
from pyrobc.batches import seeded
from pyrobc.compare import measure_error
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.lift import lift
from pyrobc.negligible import DEFAULT_EPSILON
from pyrobc.posterior import Posterior
from pyrobc.rules import FalsePruneRate, PosteriorOdds, Rule
from pyrobc.scores import Score, score

__all__ = ["FAMILIES", "LEVELS", "measure_nuts", "measure_regression", "measure_teacher"]

LEVELS = (0.01, 0.05, 0.1)
RULES: dict[str, Rule] = {"default": PosteriorOdds()} | {f"fdr {level:g}": FalsePruneRate(level) for level in LEVELS}
FAMILIES: dict[str, dict[str, Any]] = {
    "log_uniform": {"gate_lr": 3.0},
    "group_normal_jeffreys": {},
    "group_horseshoe": {},
    "spike_and_slab_horseshoe": {"inclusion": 0.05},
    "spike_and_slab_lasso": {"inclusion": 0.05},
}
"""Settings besides the defaults; inclusion as in the published recovery of a teacher of three units."""
STEPS = 20  # full-batch steps to a pass, after which ``fit`` looks at the network


class FullBatches:
    """All rows at once, several times a pass."""

    def __init__(self, data: Planted) -> None:
        self.data, self.dataset = data, range(len(data.x))

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(self.data.x, self.data.y)] * STEPS)


def measure_regression(seed: int, rows: int, family: str, steps: int) -> dict[str, Any]:
    """One planted regression: inputs removed by each rule, and their log odds."""
    data = draw_regression(seed, rows)
    scored = score(_fit_regression(data, seed, family, steps))
    return {"active": sorted(data.active), "rules": _judge(scored, data.active), "log_odds": _list_odds(scored)}


def measure_nuts(seed: int, rows: int, family: str, steps: int, draws: int, chain: int) -> dict[str, Any]:
    r"""One chain of NUTS on the lifted model: every input's mass of the ROPE and its slope, beside SVI's.

    Under NUTS the weights vary too, so that the ROPE is that of the effect,
    :math:`|z_j w_j| < \epsilon T / r_j`: the same event as SVI's :math:`z_j < \epsilon T / (r_j |w_j|)` at its weights.
    """
    data = draw_regression(seed, rows)
    posterior = _fit_regression(data, seed, family, steps)
    scored, mean = score(posterior), posterior.mean()
    rms = posterior.input_rms["weight"].double()
    slope = (mean.gates["input"] * mean.parameters["weight"][0]).double()
    bound = DEFAULT_EPSILON * (slope * rms).square().sum().sqrt() / rms
    model = posterior.model.double()
    with seeded(1_000 * seed + chain):
        sampler = MCMC(
            NUTS(model, max_tree_depth=6, target_accept_prob=0.9), num_samples=draws, warmup_steps=draws,
            disable_progbar=True,
        )  # fmt: skip
        sampler.run(data.x.double(), data.y.double())
    samples, slopes = sampler.get_samples(), []
    for s in range(draws):
        effective = model.family.combine({name: values[s] for name, values in samples.items()}, model.spec)
        slopes.append(effective.gates["input"] * effective.parameters["weight"][0])
    drawn = torch.stack(slopes).double()
    is_inside = drawn.abs() < bound
    return {
        "active": sorted(data.active),
        "inside": is_inside.double().mean(0).tolist(),
        "slopes": drawn.mean(0).tolist(),
        "spreads": drawn.std(0).tolist(),
        "svi_inside": expit(np.array(_list_odds(scored))).tolist(),
        "svi_slopes": slope.tolist(),
    }


def measure_teacher(seed: int, family: str, steps: int) -> dict[str, Any]:
    """How many of sixteen units stay where three taught, and the error on fresh rows."""
    data, fresh = draw_teacher(seed), draw_teacher(seed + 1_000_000, noise=0.0)
    with seeded(seed):
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    model = lift(net, make_family(family, **FAMILIES[family]), "normal", data.x[:1], prune_inputs=False)
    posterior = fit(model, FullBatches(data), epochs=max(1, steps // STEPS), lr=2e-2, seed=seed, progress=False)
    outcomes = [row[0] for row in RULES["default"].judge(score(posterior)).outcomes["0"]]
    error = measure_error(posterior.to_module(), (fresh.x, fresh.y), "normal")[0]
    return {"kept": 16 - outcomes.count("prune"), "rmse": error**0.5}


def _fit_regression(data: Planted, seed: int, family: str, steps: int) -> Posterior:
    with seeded(seed):
        net = nn.Linear(40, 1)
    model = lift(net, make_family(family, **FAMILIES[family]), "normal", data.x[:1])
    passes = max(1, steps // STEPS)
    return fit(
        model, FullBatches(data), epochs=passes, lr=5e-2, seed=seed, schedule=anneal(passes), progress=False
    )  # fmt: skip


def _judge(scored: Score, active: Iterable[int]) -> dict[str, list[int]]:
    """Active and inactive inputs pruned, and inputs left undecided, by rule."""
    is_active: NDArray[np.bool_] = np.isin(np.arange(scored.spec.block("input").size), list(active))
    found = {}
    for name, rule in RULES.items():
        outcomes = np.array([row[0] for row in rule.judge(scored).outcomes["input"]])
        masks = ((outcomes == "prune") & is_active, (outcomes == "prune") & ~is_active, outcomes == "abstain")
        found[name] = [int(mask.sum()) for mask in masks]
    return found


def _list_odds(scored: Score) -> list[float]:
    values: list[float] = scored.log_odds()["input"].tolist()
    return values
