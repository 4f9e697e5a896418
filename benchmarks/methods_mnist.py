"""Every sparsity method on MNIST, from the same dense networks and through the same road: error against real bytes.

``python -m benchmarks.methods_mnist --data FOLDER`` runs what is missing in ``runs/methods_mnist``, then reads the test
rows once, decodes every file and writes ``results/methods_mnist.json``, ``.md`` and ``.png``.  ``--part`` runs only,
for several processes; ``--measure`` measures what is there; ``--smoke`` goes through everything in some minutes and
writes beside its runs.  Every fit resumes from its checkpoint, so a run that was cut goes on when it is called again.

The road, the same for all: the dense network is lifted with the method's family and fitted, groups that posterior odds
call negligible are cut (and, where the family knows itself which weights are zero, these), the rest is fitted again:
that is the method's *own* network.  Then its multipliers are folded into Normal weights, which move to grids as coarse
as their posterior allows, as they are (``own``) and after deletions of single weights to fixed numbers
(``benchmarks._bayes``).  The recipe without a posterior takes its own road (``benchmarks._recipe``) to the same coder.

``--epochs 0.5`` halves the epochs of everything but the dense networks, ``--kl 3`` trebles the weights of the methods'
own KL (and divides the density of the method that has none by three); such runs are kept, and reported, beside the
others.  What a method's settings are is in ``METHODS``; where its publication says nothing they were chosen
on the 5,000 validation rows, few tries each and LeNet-300-100 only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import mnist_compression
from benchmarks._bayes import Road, thin_to_levels
from benchmarks._methods_report import write_report
from benchmarks._mnist import Mnist, Rows, load_mnist
from benchmarks._recipe import Settings, run_recipe
from benchmarks._record import RESULTS
from benchmarks.mnist_compression import NETWORKS, SMOKE_ROWS, keep, make_dense
from pyrobc.batches import seeded
from pyrobc.checkpoint import write_text
from pyrobc.dead_units import remove_dead_units
from pyrobc.decide import decide
from pyrobc.density import TargetDensity
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.folding import fold_scales
from pyrobc.guides.recursive import LayerByLayer
from pyrobc.lift import lift
from pyrobc.posterior import Posterior
from pyrobc.pruning import PruneEachEpoch
from pyrobc.scores import PriorOdds, score
from pyrobc.weights import count_weights, prune_weights

RUNS = Path("runs/methods_mnist")
FIRST_WIDTH = 0.1  # of point weights that become Normal, as a share of their tensor's root mean square


@dataclass(frozen=True)
class Method:
    """A family with its settings; ``fits`` are weights of the KL and epochs, by network, with a cut after each.

    After the last cut the network is fitted once more, for as many epochs as in all fits before.  Where it
    ``cuts_each_epoch``, groups leave after every epoch already.
    """

    family: str
    fits: Mapping[str, tuple[tuple[float, int], ...]]
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float = 2e-3
    reduction: str | None = None
    prior_odds: PriorOdds = "implied"
    density: Mapping[str, float] | None = None
    schedule: LayerByLayer | None = None
    cuts_each_epoch: bool = True


def both(*fits: tuple[float, int], caffe: tuple[tuple[float, int], ...]) -> dict[str, tuple[tuple[float, int], ...]]:
    """Fits of the two networks."""
    return {"lenet_300_100": fits, "lenet_5_caffe": caffe}


SPIKES = {"num_draws": 16, "gate_lr": 2.0, "scale_lr": 3.0, "initial_log_scale": -4.0}
METHODS = {
    "GNJ": Method(
        "group_normal_jeffreys", both((1.0, 8), caffe=((4.0, 2), (8.0, 2))), {"max_scale": 0.2, "num_draws": 8}
    ),
    "GHS": Method("group_horseshoe", both((1.0, 8), caffe=((4.0, 2), (8.0, 2))), {"max_scale": 0.2, "num_draws": 8}),
    "log-uniform": Method("log_uniform", both((10.0, 8), caffe=((10.0, 4),)), {"num_draws": 16, "gate_lr": 5.0}),
    "SS-GL": Method("spike_and_slab_lasso", both((0.2, 8), caffe=((0.2, 4),)), SPIKES),
    "SS-GHS": Method("spike_and_slab_horseshoe", both((0.2, 8), caffe=((0.2, 4),)), SPIKES),
    "Turbo-VBI, chain": Method("turbo_vbi", both((1.0, 8), caffe=((1.0, 4),)), {"idle_rate": 3e-5}),
    "Turbo-VBI, independent": Method(
        "turbo_vbi", both((1.0, 8), caffe=((1.0, 4),)), {"idle_rate": 3e-6, "structure": "independent"}
    ),
    "recursive": Method(
        "recursive", both((30.0, 12), caffe=((30.0, 6),)), {"num_draws": 16, "noise_lr": 5.0}, 1e-3,
        schedule=LayerByLayer(), cuts_each_epoch=False,
    ),
    "self-compression": Method(
        "moment_propagation", both((1.0, 8), caffe=((1.0, 4),)), {"initial_variance": 1e-3}, 5e-3,
        cuts_each_epoch=False,
    ),
    "Gumbel-softmax": Method(
        "gumbel_softmax", both((1.0, 8), caffe=((1.0, 4),)), {"num_draws": 16, "gate_lr": 10.0},
        density={"lenet_300_100": 0.1, "lenet_5_caffe": 0.05}, cuts_each_epoch=False,
    ),
}  # fmt: skip
RECIPE = "magnitude recipe"
COARSENESS = 2.5  # of grids, in posterior widths
ENDINGS = {
    "lenet_300_100": Road(
        levels=dict.fromkeys((0, 3400, 1700), (COARSENESS,)), first=(4, 6, 6), later=(4, 6, 6), settle_epochs=8,
        grid_epochs=12,
    ),
    "lenet_5_caffe": Road(
        levels=dict.fromkeys((0, 5000, 2400), (COARSENESS,)), trunk_scale=0.1, drop=0.0, lr=2e-3,
        first=(3, 4, 4), later=(3, 4, 4), settle_epochs=6, grid_epochs=8,
    ),
}  # fmt: skip
RECIPES = {
    "lenet_300_100": ((0.0225, 0.0105), Settings(step_rate=3e-5, grids=(0.5,))),
    "lenet_5_caffe": (
        (0.01, 0.0046),
        Settings(
            drop=0.0, group_lasso=0.0, dense_epochs=4, first_epochs=8, level_epochs=6, tune_epochs=4, grid_epochs=8,
            grids=(0.5,),
        ),
    ),
}  # fmt: skip


def main() -> None:
    """Run, or measure, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*METHODS, RECIPE]
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's IDX files")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=[*everything, "dense"], default=everything)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1.0, help="scale of all epochs but the dense networks'")
    parser.add_argument("--kl", type=float, default=1.0, help="scale of the weights of the methods' own KL")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where networks and checkpoints are kept")
    parser.add_argument("--part", action="store_true", help="run what these options name, and do not measure")
    parser.add_argument("--measure", action="store_true", help="measure what is there, and do not run")
    parser.add_argument("--smoke", action="store_true", help="some minutes that show nothing but that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.smoke:
        arguments.epochs = 0.01
        mnist_compression.shorten()
    if not arguments.measure:
        for name in arguments.networks:
            data = load_mnist(arguments.data, NETWORKS[name][1], SMOKE_ROWS if arguments.smoke else None)
            for seed in arguments.seeds:
                dense = make_dense(name, seed, data, arguments.runs / name)
                for method in arguments.methods:
                    if method != "dense":
                        run(name, method, seed, data, dense, arguments.runs / name, arguments.epochs, arguments.kl)
    if not arguments.part:
        results = arguments.runs if arguments.smoke else RESULTS
        write_report(arguments.runs, arguments.data, NETWORKS, everything, describe_settings(), results)


def run(
    name: str, method: str, seed: int, data: Mnist, dense: nn.Module, folder: Path, scale: float, kl: float
) -> None:
    """One method on one seed, network after network; what is on disk is not made again."""
    kl = 1.0 if method == RECIPE else kl
    place = folder / f"{slug(method)}-{seed}-x{scale:g}-kl{kl:g}"
    if (place / "done").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    for stop, net in walk(name, method, seed, data.train, dense, place, scale, kl):
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        found = keep(net, data.validation, place / stop)
        found |= {"method": method, "network": name, "seed": seed, "stop": stop, "epochs": scale, "kl": kl}
        found["seconds"] = seconds
        write_text(place / f"{stop}.json", json.dumps(found, indent=1) + "\n")
        shown = {k: found[k] for k in ("method", "seed", "stop", "bytes", "nonzero", "validation_error")}
        print(name, shown, f"{seconds:.0f} s", flush=True)
    write_text(place / "done", "\n")


def walk(
    name: str, method: str, seed: int, rows: Rows, dense: nn.Module, place: Path, scale: float, kl: float
) -> Iterator[tuple[str, nn.Module]]:
    """Compact networks by the name of their stop, those on disk left out."""
    there = {file.stem for file in place.glob("*.json")}
    if method == RECIPE:
        with seeded(seed):
            fresh = NETWORKS[name][0]()  # it trains its own dense network, under its penalties
        levels, settings = RECIPES[name]
        for title, net in run_recipe(
            fresh, rows, levels=levels, seed=seed, settings=rescale(settings, scale), folder=place
        ):
            if (stop := title.partition("%")[0]) not in there:
                yield stop, net
        return
    posterior = fit_method(METHODS[method], name, seed, rows, dense, place, scale, kl)
    if "floats" not in there:
        yield "floats", posterior.to_module()
    folded = fold_scales(posterior, FIRST_WIDTH)
    ending = rescale(ENDINGS[name], scale)
    left = count_weights(folded)[0]
    ending = dataclasses.replace(
        ending, levels={level: steps for level, steps in ending.levels.items() if level < left}
    )
    skip = {f"{0 if stop == 'own' else stop}-{COARSENESS:g}" for stop in there}
    for stop in thin_to_levels(folded, rows, ending, seed, place, skip):
        yield str(stop.level or "own"), stop.net


def fit_method(
    method: Method, name: str, seed: int, rows: Rows, dense: nn.Module, place: Path, scale: float, kl: float = 1.0
) -> Posterior:
    """What the method itself makes of the dense network: fitted, cut, fitted again."""
    model = lift(dense, make_family(method.family, **method.settings), "categorical", rows[0][:1])
    posterior = Posterior(model, model.new_guide(), len(rows[1]))
    path = None if method.density is None else TargetDensity(method.density[name] / kl, keeps_kl=False)
    fits = [(kl * temperature, epochs) for temperature, epochs in method.fits[name]]
    shared: dict[str, Any] = {"seed": seed, "lr": method.lr, "progress": False}
    for number, (temperature, length) in enumerate(fits):
        epochs = shorten(length, scale)
        posterior = fit(
            posterior.model, rows, epochs=epochs, guide=posterior.guide, temperature=temperature, path=path,
            warmup_epochs=0 if number or method.schedule else epochs // 2,
            on_step=None if number else method.schedule, checkpoint=place / f"fit_{number}.pt",
            prune=PruneEachEpoch(method.reduction, method.prior_odds) if method.cuts_each_epoch else None, **shared,
        )  # fmt: skip
        posterior = cut(posterior, method, rows)
        print(name, method.family, {b.name: b.size for b in posterior.model.spec.blocks}, flush=True)
    epochs = shorten(sum(length for _, length in fits), scale)
    posterior = fit(
        posterior.model, rows, epochs=epochs, guide=posterior.guide, temperature=fits[-1][0],
        path=path and TargetDensity(1.0, keeps_kl=False),  # what is left stays
        schedule=anneal(epochs), checkpoint=place / "fit_last.pt", **shared,
    )  # fmt: skip
    return cut(posterior, method, rows)


def cut(posterior: Posterior, method: Method, rows: Rows) -> Posterior:
    """Without the groups, and the weights where the family tells, that posterior odds call negligible."""
    if posterior.weight_log_odds():
        posterior = posterior.copy()
        prune_weights(posterior)
        posterior = remove_dead_units(posterior, rows)
    plan = decide(score(posterior, method.reduction), prior_odds=method.prior_odds)
    return posterior.restricted({block: np.asarray(groups) for block, groups in plan.kept().items()})


def shorten(epochs: int, scale: float) -> int:
    """So many epochs times the scale, one at least."""
    return max(1, round(epochs * scale))


def rescale(settings: Any, scale: float) -> Any:
    """The same settings with all their epochs scaled."""
    changed: dict[str, Any] = {}
    for key, value in dataclasses.asdict(settings).items():
        if key.endswith("epochs"):
            changed[key] = shorten(value, scale)
        elif key in ("first", "later"):
            rounds, epochs, pause = value
            changed[key] = rounds, shorten(epochs, scale), shorten(pause, scale)
    return dataclasses.replace(settings, **changed)


def slug(method: str) -> str:
    """A file name of a method's."""
    return method.lower().replace(",", "").replace(" ", "_")


def describe_settings() -> dict[str, Any]:
    """All settings, for the result file."""
    return {
        "methods": {name: dataclasses.asdict(method) for name, method in METHODS.items()},
        "endings": {name: dataclasses.asdict(road) for name, road in ENDINGS.items()},
        "recipe": {n: {"levels": levels} | dataclasses.asdict(settings) for n, (levels, settings) in RECIPES.items()},
        "dense_epochs": mnist_compression.DENSE_EPOCHS,
    }


if __name__ == "__main__":
    main()
