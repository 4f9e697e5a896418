"""Spike-and-slab group shrinkage and recursive Bayesian pruning on MNIST, beside published numbers.

``python -m benchmarks.spike_and_slab --data FOLDER`` fits what is missing in ``runs/spike_and_slab`` (each stage
resumes from its checkpoint), then reads the test rows once and writes ``results/spike_and_slab.json`` and ``.md``.
``--part`` fits only, ``--measure`` measures what is there, ``--smoke`` goes through everything on 1,000 rows and writes
beside its runs.  Groups that the decision removes are cut after each stage, and where nothing is scheduled after each
epoch of the first; in the others the network re-adapts.  ``--epochs 0.5`` halves all epochs, in runs of their own.
Settings may be chosen on the 5,000 validation rows only.

The KL of spike and slab is weighted by a temperature below one.  With weight one, MLP 400-400 kept 19-14 units and
3.98% of validation errors: closing a gate spares the whole divergence of its weights, thousands of nats while they are
still narrow, and gates close before weights have found their width.  Holding the gates open meanwhile is no remedy
(weights then widen to their prior, where a unit that does nothing costs nothing and stays: 400-400 after ten epochs,
and 3.66%).  LeNet-5-Caffe with SS-GHS, from random weights for 8 and 24 epochs, ended with 14-30-4 units, 2.99% of its
parameters, and 1.26% of validation errors: it starts from the dense network instead.  SS-GL from there, at the same
weights of the KL, had 20-33-2 units and 32% of validation errors after its first stage, at a half of them 20-41-21 (8%
of the parameters) and 0.98%: a budget takes the rest.  Recursive pruning with a divergence that counts channels left
13-28-64 at a weight of 10, and at 80 8-12-20, 272,840 MACs and 1.34%: it counts multiply-accumulates.  Weights of 20,
28 and 40 then left 6-16-146, 5-10-103 and 4-8-93 at 1.08, 1.04 and 1.16%; the middle one was taken.  ``--kl 2`` doubles
all weights, in runs of their own; of several runs of a case and seed the report takes the one with the fewest
validation errors among those that are as small as the limits ask (all, if none is).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import _record
from benchmarks._mnist import Mnist, Rows, load_mnist, load_test
from benchmarks._record import describe_earlier, join_points
from benchmarks.mnist_compression import SMOKE_ROWS, keep, make_dense, measure, shorten
from pyrobc.batches import seeded
from pyrobc.checkpoint import write_text
from pyrobc.codec import decode
from pyrobc.decide import decide
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.guides.recursive import LayerByLayer
from pyrobc.lift import lift
from pyrobc.models import lenet_5_caffe
from pyrobc.models.mlp import build as mlp
from pyrobc.posterior import Posterior
from pyrobc.pruning import PruneEachEpoch
from pyrobc.scores import score

RUNS = Path("runs/spike_and_slab")
UNITS = {"test error": "%", "parameters kept": "%", "MACs": "", "test NLL": "nats"}


@dataclass(frozen=True)
class Case:
    """A network, a family and the published limits; ``stages`` are epochs, of which the last fall to rate zero.

    ``temperatures`` weigh the KL in each stage; the rate of the last begins at ``last_lr``.  With ``schedule`` the
    first stage goes layer by layer.  What ``is_trained`` starts from the dense network, the others from random weights.
    After the first stage the groups of the lowest odds leave until ``budget`` parameters are left.
    """

    build: Any
    shape: tuple[int, ...]
    family: str
    settings: dict[str, Any]
    stages: tuple[int, ...]
    temperatures: tuple[float, ...]
    limits: dict[str, float]
    lr: float = 3e-3
    last_lr: float = 3e-3
    batch_size: int = 128
    schedule: LayerByLayer | None = None
    is_trained: bool = False
    budget: int | None = None


SPIKES = {"num_draws": 16, "gate_lr": 2.0, "scale_lr": 3.0, "initial_log_scale": -4.0}
CASES = {
    "MLP 400-400, SS-GHS": Case(
        lambda: mlp(784, (400, 400)), (784,), "spike_and_slab_horseshoe", SPIKES, (12, 40), (0.2, 0.1),
        {"test error": 2.70, "parameters kept": 6.2},
    ),
    "LeNet-5-Caffe, SS-GHS": Case(
        lenet_5_caffe, (1, 28, 28), "spike_and_slab_horseshoe", SPIKES, (6, 20), (0.2, 0.1),
        {"test error": 1.02, "parameters kept": 2.92}, is_trained=True,
    ),
    "LeNet-5-Caffe, SS-GL": Case(
        lenet_5_caffe, (1, 28, 28), "spike_and_slab_lasso", SPIKES, (6, 20), (0.1, 0.05),
        {"test error": 1.16, "parameters kept": 3.17}, is_trained=True, budget=13_600,
    ),
    "LeNet-5-Caffe, recursive": Case(
        lenet_5_caffe, (1, 28, 28), "recursive", {"num_draws": 16, "noise_lr": 5.0, "counts": "macs"}, (15, 20),
        (28.0, 7.0), {"test error": 0.86, "MACs": 212_802}, lr=1e-3, schedule=LayerByLayer(), is_trained=True,
    ),
}  # fmt: skip


def main() -> None:
    """Fit, or measure, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's IDX files")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=1.0, help="scale of all epochs")
    parser.add_argument("--kl", type=float, default=1.0, help="scale of all weights of the KL")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where networks and checkpoints are kept")
    parser.add_argument("--part", action="store_true", help="fit what these options name, and do not measure")
    parser.add_argument("--measure", action="store_true", help="measure what is there, and do not fit")
    parser.add_argument("--smoke", action="store_true", help="a run of a minute that shows nothing but that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.smoke:
        shorten()
        _record.RESULTS = arguments.runs
        for name, case in CASES.items():
            CASES[name] = dataclasses.replace(case, stages=(1, 1))
    if not arguments.measure:
        for name in arguments.cases:
            data = load_mnist(arguments.data, CASES[name].shape, SMOKE_ROWS if arguments.smoke else None)
            case, variant = CASES[name], ""
            if (arguments.epochs, arguments.kl) != (1, 1):
                variant = f"-x{arguments.epochs:g}-kl{arguments.kl:g}"
                stages = tuple(max(1, round(epochs * arguments.epochs)) for epochs in case.stages)
                weights = tuple(arguments.kl * temperature for temperature in case.temperatures)
                case = dataclasses.replace(case, stages=stages, temperatures=weights)
            for seed in arguments.seeds:
                place = f"{name.lower().replace(', ', '_').replace(' ', '_')}-{seed}{variant}"
                run(name, case, seed, data, arguments.runs, arguments.runs / place)
    if not arguments.part:
        report(arguments.runs, arguments.data)


def run(name: str, case: Case, seed: int, data: Mnist, runs: Path, folder: Path) -> None:
    """One fit with its cuts; the compact network and its record stay on disk."""
    if (folder / "net.json").exists():
        return
    start = time.perf_counter()
    net = make_net(case, seed, data, runs)
    model = lift(net, make_family(case.family, **case.settings), "categorical", data.train[0][:1], prune_inputs=False)
    posterior = Posterior(model, model.new_guide(), len(data.train[1]))
    for number, (epochs, temperature) in enumerate(zip(case.stages, case.temperatures, strict=True)):
        is_last = number == len(case.stages) - 1
        posterior = fit(
            posterior.model, data.train, epochs=epochs, lr=case.last_lr if is_last else case.lr, seed=seed,
            batch_size=case.batch_size, temperature=temperature, schedule=anneal(epochs) if is_last else None,
            on_step=None if number else case.schedule, prune=None if number or case.schedule else PruneEachEpoch(),
            guide=posterior.guide, checkpoint=folder / f"stage_{number}.pt",
            on_epoch=lambda numbers: print(numbers, flush=True), progress=False,
        )  # fmt: skip
        plan = decide(score(posterior), budget=None if number else case.budget)
        posterior = posterior.restricted({block: np.asarray(groups) for block, groups in plan.kept().items()})
        print(name, plan.widths, "validation error", measure(posterior.to_module(), data.validation)[0], flush=True)
    compact = posterior.to_module()
    record = keep(compact, data.validation, folder / "net") | {
        "case": name,
        "seed": seed,
        "stages": case.stages,
        "temperatures": case.temperatures,
        "parameters": [sum(p.numel() for p in n.parameters()) for n in (net, compact)],
        "macs": [sum(layer.macs for layer in m.spec.layers) for m in (model, posterior.model)],
        "widths": {block.name: block.size for block in posterior.model.spec.blocks},
        "settings": describe_settings(case),
        "seconds": time.perf_counter() - start,
    }
    write_text(folder / "net.json", json.dumps(record, indent=1) + "\n")


def describe_settings(case: Case) -> str:
    """What a run's record says of its settings, besides epochs and weights of the KL."""
    schedule = "" if case.schedule is None else f", {case.schedule}"
    budget = "" if case.budget is None else f", at most {case.budget:,} parameters after the first stage"
    return f"batches of {case.batch_size}, lr {case.lr} and {case.last_lr}, {case.settings}{schedule}{budget}"


def make_net(case: Case, seed: int, data: Mnist, runs: Path) -> nn.Module:
    """The network to start from, trained or not."""
    if case.is_trained:
        return make_dense("lenet_5_caffe", seed, data, runs)
    with seeded(seed):
        net: nn.Module = case.build()
    return net


def report(runs: Path, data: Path) -> None:
    """Read the test rows, and write the table of all that is there, or was there when it was last written."""
    stored = _record.RESULTS / "spike_and_slab.json"
    before = json.loads(stored.read_text()) if stored.exists() else {}
    tests = {shape: load_test(data, shape) for shape in {case.shape for case in CASES.values()}}
    here = [read_run(file, tests) for file in sorted(runs.glob("*/net.json"))]
    found = join_points(here, {(run["run"],) for run in here}, before.get("runs", []), ("run",), before.get("date", ""))
    rows: list[dict[str, Any]] = []
    notes = [
        "Targets of SS-GL and SS-GHS are results in the authors' logs (one seed, 1200 epochs, SiLU); of the recursive "
        "reconstruction, the error and the MACs of structured Bayesian pruning (3-18-284-283).  Here networks have "
        "ReLU, 55,000 training rows, and far fewer epochs.  Parameters are those that surgery leaves, with biases; "
        "inputs are not pruned."
    ]
    for run in choose(found):
        limits = CASES[run["case"]].limits
        share = 100 * run["parameters"][1] / run["parameters"][0]
        values = {"test error": run["test_error"], "parameters kept": share, "MACs": run["macs"][1]}
        for what, value in (values | {"test NLL": run["test_nll"]}).items():
            limit = limits.get(what)
            target, met = ("none", "") if limit is None else (f"<= {limit:,}", "yes" if value <= limit else "MISSED")
            title = f"{run['case']}, seed {run['seed']}: {what}"
            rows.append({"what": title, "value": value, "unit": UNITS[what], "target": target, "met": met})
    if missing := [name for name in CASES if name not in {run["case"] for run in found}]:
        notes.append(f"Not run to the end: {', '.join(missing)}.")
    notes += [describe(run) for run in found]
    notes += [words] if (words := describe_earlier(found, lambda run: run["case"])) else []
    _record.write_result(
        "spike_and_slab", rows, seeds=sorted({run["seed"] for run in found}), notes="\n\n".join(notes),
        options="--data FOLDER", details={"runs": found},
    )  # fmt: skip


def read_run(file: Path, tests: Mapping[tuple[int, ...], Rows]) -> dict[str, Any]:
    """The record of a run, and what its decoded file does on test rows of its shape."""
    found: dict[str, Any] = json.loads(file.read_text())
    error, nll = measure(decode(file.with_suffix(".rbc").read_bytes()), tests[CASES[found["case"]].shape])
    return found | {"run": file.parent.name, "test_error": error, "test_nll": nll}


def choose(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and seed the run with the fewest validation errors, of those within the limits on size if any is."""

    def is_too_large(run: dict[str, Any]) -> bool:
        limits, share = CASES[run["case"]].limits, 100 * run["parameters"][1] / run["parameters"][0]
        return share > limits.get("parameters kept", 100) or run["macs"][1] > limits.get("MACs", run["macs"][0])

    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in found:
        runs.setdefault((run["case"], run["seed"]), []).append(run)
    return [min(several, key=lambda run: (is_too_large(run), run["validation_error"])) for several in runs.values()]


def describe(run: dict[str, Any]) -> str:
    """What one run was."""
    widths = "-".join(str(size) for size in run["widths"].values())
    return (
        f"{run['case']}, seed {run['seed']}: {widths} units left, {run['parameters'][1]:,} of "
        f"{run['parameters'][0]:,} parameters, {run['macs'][1]:,} of {run['macs'][0]:,} MACs, "
        f"{run['bytes']:,} bytes, validation error {run['validation_error']:.2f} %, test error "
        f"{run['test_error']:.2f} %, stages of {run['stages']} epochs at KL weights {run['temperatures']}, "
        f"{run['settings']}, {run['seconds']:.0f} s."
    )


if __name__ == "__main__":
    main()
