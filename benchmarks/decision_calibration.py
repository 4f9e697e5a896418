"""Can the decisions be trusted?  Planted truth, and predicted against realised changes of the ELBO.

Parts, in the order in which they run; ``--parts`` chooses:

* ``regression``: 40 correlated inputs of which 6 are active, 60 to 400 rows; active inputs kept, inactive ones pruned,
  and the realised false-prune rate of the rule that bounds it;
* ``nuts``: the same lifted model under NUTS beside SVI, on the first seed with 100 rows;
* ``teacher``: three tanh units taught to sixteen;
* ``change``: on the digits MLP, 40 random sets of groups, predicted log evidence against the change of the ELBO after
  re-adapting, both fitted on for as long;
* ``labels``: digits with labels in random order; ``noise``: digits beside 64 pixels of noise.

Every run is kept in ``runs/decision_calibration`` and not repeated; ``--report`` writes what is there.  Settings are
the first ones tried, on other seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from scipy.stats import spearmanr
from torch import nn

from benchmarks._planted import Planted, draw_regression, draw_teacher
from benchmarks._record import fingerprint, write_result
from pyrobc.batches import seeded
from pyrobc.compare import measure_error
from pyrobc.compress import compress
from pyrobc.demo import DEFAULT_FAMILY, DEMO_SETTINGS, Digits, build_network, load_digits, train_dense
from pyrobc.evidence import evidence
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.lift import lift
from pyrobc.models import mlp
from pyrobc.objective import fast_loss
from pyrobc.posterior import Posterior
from pyrobc.rules import FalsePruneRate, PosteriorOdds, Rule
from pyrobc.scores import Score, score

RUNS = Path("runs/decision_calibration")
FIRST_SEED, NUM_SEEDS = 1000, 20
ROWS = (60, 100, 200, 400)
PARTS = ["regression", "nuts", "teacher", "change", "labels", "noise"]
LEVELS = (0.01, 0.05, 0.1)
RULES: dict[str, Rule] = {"default": PosteriorOdds()} | {f"fdr {level:g}": FalsePruneRate(level) for level in LEVELS}
FAMILIES: dict[str, dict[str, Any]] = {
    "log_uniform": {"gate_lr": 3.0},
    "group_normal_jeffreys": {},
    "group_horseshoe": {},
}

Row = dict[str, Any]


def run_once(part: str, measure: Callable[..., Row], **settings: Any) -> None:
    """Measure and keep, unless that was done before."""
    identity = {"part": part} | settings
    path = RUNS / f"{fingerprint(identity)}.json"
    if path.exists():
        return
    row = identity | measure(**settings)
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1))
    print({key: value for key, value in row.items() if key not in ("sets", "log_odds")}, flush=True)


def read_runs(part: str, **wanted: Any) -> list[Row]:
    """All that was measured of a part."""
    rows = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]
    return [r for r in rows if r["part"] == part and all(r[k] == v for k, v in wanted.items())]


def fit_planted(data: Planted, net: nn.Module, family: str, epochs: int, seed: int, **lifting: Any) -> Posterior:
    """Full-batch SVI through the public interface."""
    model = lift(net, make_family(family, **FAMILIES[family]), "normal", data.x[:1], **lifting)
    return fit(
        model, (data.x, data.y), epochs=epochs, lr=5e-2, batch_size=len(data.x), seed=seed, schedule=anneal(epochs),
        progress=False,
    )  # fmt: skip


def judge(scored: Score, active: Iterable[int]) -> dict[str, list[int]]:
    """Active and inactive inputs pruned, and inputs left undecided, by rule."""
    is_active = np.isin(np.arange(scored.spec.block("input").size), list(active))
    found = {}
    for name, rule in RULES.items():
        outcomes = np.array([row[0] for row in rule.judge(scored).outcomes["input"]])
        masks = ((outcomes == "prune") & is_active, (outcomes == "prune") & ~is_active, outcomes == "abstain")
        found[name] = [int(mask.sum()) for mask in masks]
    return found


def measure_regression(seed: int, rows: int, family: str, epochs: int) -> Row:
    """One planted regression."""
    data = draw_regression(seed, rows)
    with seeded(seed):
        net = nn.Linear(40, 1)
    scored = score(fit_planted(data, net, family, epochs, seed))
    return {"active": sorted(data.active), "rules": judge(scored, data.active), "log_odds": _to_list(scored)}


def measure_nuts(seed: int, rows: int, family: str, draws: int) -> Row:
    """Posterior mass of each ROPE by NUTS and by SVI, at the thresholds of the latter."""
    data = draw_regression(seed, rows)
    with seeded(seed):
        net = nn.Linear(40, 1)
        posterior = fit_planted(data, net, family, 600, seed)
        scored = score(posterior)
        chain = MCMC(NUTS(posterior.model), num_samples=draws, warmup_steps=draws, disable_progbar=True)
        chain.run(data.x, data.y)
    samples, model = chain.get_samples(), posterior.model
    gates = [
        model.family.combine({k: v[s] for k, v in samples.items()}, model.spec).gates["input"] for s in range(draws)
    ]
    inside = (torch.stack(gates).abs().double().numpy() < scored.threshold["input"]).mean(0)
    own = 1 / (1 + np.exp(-np.array(_to_list(scored))))
    is_active = np.isin(np.arange(40), list(data.active))
    return {
        "nuts_pruned": [int((inside > 0.5)[is_active].sum()), int((inside > 0.5)[~is_active].sum())],
        "svi_pruned": [int((own > 0.5)[is_active].sum()), int((own > 0.5)[~is_active].sum())],
        "mean_gap": float(np.abs(inside - own).mean()),
    }


def measure_teacher(seed: int, family: str, epochs: int) -> Row:
    """How many of sixteen units stay where three taught, and the error on fresh rows."""
    data, fresh = draw_teacher(seed), draw_teacher(seed + 1_000_000, noise=0.0)
    with seeded(seed):
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    posterior = fit_planted(data, net, family, epochs, seed, prune_inputs=False)
    outcomes = [row[0] for row in RULES["default"].judge(score(posterior)).outcomes["0"]]
    error = measure_error(posterior.to_module(), (fresh.x, fresh.y), "normal")[0]
    return {"kept": 16 - outcomes.count("prune"), "rmse": error**0.5}


def measure_change(seed: int, family: str, epochs: int, readapt: int, sets: int) -> Row:
    """Sets of groups drawn at random, 1 to 64 at a time: predicted and realised change of the evidence."""
    digits = load_digits()
    settings: Row = {"lr": 1e-2, "batch_size": 64, "seed": seed, "progress": False}
    arguments = DEMO_SETTINGS[family]["family_args"]
    model = lift(build_network(seed), make_family(family, **arguments), "categorical", digits.train[0][:1])
    posterior = fit(model, digits.train, epochs=epochs, schedule=anneal(epochs), **settings)
    scored = score(posterior)
    checked = evidence(posterior, scored, digits.train, num_draws=50, num_candidates=1, max_rows=500)
    price = np.concatenate([scored.delta_f[b.name] for b in scored.spec.blocks])
    khat = np.asarray(checked.tree["bmr"]["khat"].to_numpy())
    settings |= {"lr": 1e-3, "epochs": readapt}
    longer = posterior.copy()
    start = estimate_elbo(fit(longer.model, digits.train, guide=longer.guide, **settings), digits)
    generator, found = np.random.default_rng(seed), []
    names = np.repeat([b.name for b in scored.spec.blocks], [b.size for b in scored.spec.blocks])
    index = np.concatenate([np.arange(b.size) for b in scored.spec.blocks])
    while len(found) < sets:
        chosen = generator.choice(len(price), 2 ** generator.integers(0, 7), replace=False)
        kept = {
            b.name: np.setdiff1d(np.arange(b.size), index[chosen][names[chosen] == b.name]) for b in scored.spec.blocks
        }
        small = posterior.restricted(kept)
        after = estimate_elbo(fit(small.model, digits.train, guide=small.guide, **settings), digits)
        found.append([len(chosen), float(price[chosen].sum()), after - start, float(khat[chosen].max())])
        print(len(found), found[-1], flush=True)
    return {"sets": found, "posterior_khat": checked.posterior_khat, "good_k": checked.good_k}


@torch.no_grad()
def estimate_elbo(posterior: Posterior, digits: Digits, draws: int = 32) -> float:
    """Mean of single-draw estimates over all training rows, nats."""
    loss = fast_loss(posterior.model, posterior.guide, posterior.num_data)
    with seeded(0):
        return -float(np.mean([float(loss(*digits.train, 1.0)) for _ in range(draws)]))


def measure_labels(seed: int, family: str, settings: Row) -> Row:
    """What is left of the digits network where there is nothing to learn."""
    x, y = load_digits().train
    with seeded(seed):
        y = y[torch.randperm(len(y))]
    result = compress(build_network(seed), (x, y), family=family, seed=seed, progress=False, **settings)
    groups = sum(block.size for block in result.plan.blocks)
    return {
        "left": result.plan.parameters[1] / result.plan.parameters[0],
        "widths": [after for _, after in result.plan.widths.values()],
        "abstained": result.plan.num_abstained / groups,
        "notes": list(result.plan.notes),
    }


def measure_noise(seed: int, family: str, settings: Row) -> Row:
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
    errors = [100 * measure_error(net, wide.test, "categorical")[0] for net in (dense, result.net)]
    return {
        "noise_pruned": 1 - (kept >= 64).mean() * len(kept) / 64,
        "signal_kept": int((kept < 64).sum()),
        "errors": errors,
    }


def _to_list(scored: Score) -> list[float]:
    values: list[float] = scored.log_odds()["input"].tolist()
    return values


def report() -> None:
    """Write the rows of everything that was measured."""
    rows = [line for family in FAMILIES for line in _report_regression(family)]
    for run in read_runs("nuts"):
        text = f"{run['family']}, seed {run['seed']}, {run['rows']} rows, {run['draws']} draws: |ROPE mass, NUTS - SVI|"
        counts = f"active/inactive pruned: NUTS {run['nuts_pruned']}, SVI {run['svi_pruned']}"
        rows.append(_row(f"{text} ({counts})", run["mean_gap"], "", "none", None))
    for family in FAMILIES:
        if runs := read_runs("teacher", family=family):
            kept = [run["kept"] for run in runs]
            share = np.mean([3 <= k <= 5 for k in kept])
            text = f"teacher of 3 in 16, {family}, {len(runs)} seeds: fits with 3 to 5 units (kept {kept})"
            rows.append(_row(text, 100 * share, "%", "100", share == 1))
    for run in read_runs("change"):
        _, predicted, realised, khat = np.array(run["sets"]).T
        is_good = khat <= run["good_k"]
        value = spearmanr(predicted, realised)[0]
        text = f"digits, {run['family']}, {len(predicted)} sets: Spearman of predicted and realised change"
        rows.append(_row(text, value, "", ">= 0.8", value >= 0.8))
        if is_good.sum() > 2:
            value = spearmanr(predicted[is_good], realised[is_good])[0]
            text = f"the same without sets of a bad k-hat ({is_good.sum()} left)"
            rows.append(_row(text, value, "", "none", None))
        khat, limit = run["posterior_khat"], run["good_k"]
        rows.append(_row("k-hat of its guide against the posterior", khat, "", f"<= {limit:.2f}", khat <= limit))
    for run in read_runs("labels"):
        is_met = run["left"] <= 0.05 or run["abstained"] > 0.5
        text = f"digits with random labels, {run['family']}: parameters left (widths {run['widths']})"
        rows.append(_row(text, 100 * run["left"], "%", "<= 5, or most undecided", is_met))
    for run in read_runs("noise"):
        dense, compact = run["errors"]
        text = f"digits and 64 noise inputs, {run['family']}: noise inputs pruned"
        rows.append(_row(text, 100 * run["noise_pruned"], "%", ">= 95", run["noise_pruned"] >= 0.95))
        text = f"the same: test error, compact - dense ({compact:.2f}/{dense:.2f})"
        rows.append(_row(text, compact - dense, "points", "<= 1.0", compact - dense <= 1.0))
    runs = [json.loads(path.read_text()) for path in RUNS.glob("*.json")]
    missing = [part for part in PARTS if part not in {run["part"] for run in runs}]
    notes = (
        "Planted truth and realised changes; every fit that was run counts, and no setting was chosen on one of them."
    )
    planted = {run["seed"] for run in runs if run["part"] == "regression"}
    notes += (
        f"  {len(planted)} of {NUM_SEEDS} seeds of the regression; a dash is a rate of nothing pruned, or no target."
    )
    notes += f"  Not run: {', '.join(missing)}." if missing else ""
    measured = sorted({run["seed"] for run in runs})
    write_result("decision_calibration", rows, seeds=measured, notes=notes)


def _report_regression(family: str) -> list[Row]:
    runs = read_runs("regression", family=family)
    large = [run for run in runs if run["rows"] >= 200]
    if not runs:
        return []
    rows = []
    if large:
        lost, gone = (np.array([run["rules"]["default"][i] for run in large]) for i in (0, 1))
        kept, pruned = 1 - lost.sum() / (6 * len(large)), gone.sum() / (34 * len(large))
        label = f"regression, {family}, default rule, {len(large)} fits of 200 and 400 rows"
        rows += [
            _row(f"{label}: active inputs kept", 100 * kept, "%", ">= 98", kept >= 0.98),
            _row(f"{label}: inactive inputs pruned", 100 * pruned, "%", ">= 95", pruned >= 0.95),
        ]
    for rows_count in sorted({run["rows"] for run in runs}):
        some = [run for run in runs if run["rows"] == rows_count]
        for level in LEVELS:
            counts = np.array([run["rules"][f"fdr {level:g}"] for run in some])
            shares = counts[:, 0] / np.maximum(counts[:, :2].sum(1), 1)
            error = shares.std(ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else np.nan
            text = (
                f"regression, {family}, {rows_count} rows, {len(some)} seeds: realised false-prune rate "
                f"(standard error {error:.2g}, inactive pruned {counts[:, 1].mean() / 34:.0%})"
            )
            is_empty = counts[:, :2].sum() == 0  # a rate of zero that nothing was risked for shows nothing
            is_met = None if is_empty else bool(shares.mean() <= level + 2 * np.nan_to_num(error))
            rows.append(_row(text, shares.mean(), "", f"<= {level:g} within 2 errors", is_met))
    return rows


def _row(what: str, value: float, unit: str, target: str, is_met: bool | None) -> Row:
    met = "-" if is_met is None else "yes" if is_met else "NO"
    return {"what": what, "value": float(value), "unit": unit, "target": target, "met": met}


def measure(parts: list[str], seeds: int, families: list[str], scale: float) -> None:
    """Run what has not been run; ``scale`` shortens every fit."""

    def shorten(number: int) -> int:
        return max(4, round(number * scale))

    demo = DEMO_SETTINGS[DEFAULT_FAMILY]
    demo = demo | {key: shorten(demo[key]) for key in ("epochs", "warmup_epochs")}
    for seed, family in itertools.product(range(FIRST_SEED, FIRST_SEED + seeds), families):
        if "regression" in parts:
            for rows in reversed(ROWS):
                run_once("regression", measure_regression, seed=seed, rows=rows, family=family, epochs=shorten(600))
        if "teacher" in parts:
            run_once("teacher", measure_teacher, seed=seed, family=family, epochs=shorten(3000))
    first: Row = {"seed": FIRST_SEED}
    if "nuts" in parts:
        run_once("nuts", measure_nuts, rows=100, family="log_uniform", draws=shorten(300), **first)
    if "change" in parts:
        lengths = {"epochs": shorten(60), "readapt": shorten(10), "sets": shorten(40)}
        run_once("change", measure_change, family="log_uniform", **lengths, **first)
    if "labels" in parts:
        run_once("labels", measure_labels, family=DEFAULT_FAMILY, settings=demo, **first)
    if "noise" in parts:
        run_once("noise", measure_noise, family=DEFAULT_FAMILY, settings=demo, **first)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="of planted data")
    parser.add_argument("--families", nargs="+", default=["log_uniform"], choices=list(FAMILIES))
    parser.add_argument("--report", action="store_true", help="write the results of what was run before, run nothing")
    parser.add_argument(
        "--smoke", action="store_true", help="two seeds and fits too short to mean anything; no results"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.smoke:
        RUNS = RUNS.with_name("decision_calibration_smoke")
        measure(arguments.parts, 2, arguments.families, 0.02)
    elif not arguments.report:
        measure(arguments.parts, arguments.seeds, arguments.families, 1.0)
    if not arguments.smoke:
        report()
