"""Error against bytes on MNIST: LeNet-300-100 and LeNet-5-Caffe, Bayesian compression beside a strong recipe.

``python -m benchmarks.mnist_compression --data FOLDER`` trains what is missing in ``runs/mnist_compression`` (every
network on the way is kept as its ``.rbc`` file, every fit resumes from its checkpoint), then reads the test rows once,
decodes every file and writes ``results/mnist_compression.json``, ``.md`` and ``.png``.  ``--part`` trains a share only,
for several processes; ``--measure`` only measures; ``--smoke`` goes through everything in a minute and writes its
tables beside its runs.  ``--larger`` takes the same road to networks of more weights, with smaller errors; such runs
are kept, and reported, beside the others.  Settings were chosen on the 5,000 validation rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._bayes import Road, compress_bayesian
from benchmarks._mnist import DroppedRows, Mnist, Rows, load_mnist
from benchmarks._mnist_report import write_report
from benchmarks._recipe import LEVELS, Settings, run_recipe
from benchmarks._record import RESULTS, describe_place
from pyrobc.batches import seeded
from pyrobc.checkpoint import write_atomically, write_text
from pyrobc.codec import decode, encode, order_units
from pyrobc.errors import SurgeryError
from pyrobc.models import lenet_5_caffe, lenet_300_100

RUNS = Path("runs/mnist_compression")
FAMILIES = ("group_normal_jeffreys", "group_horseshoe")
NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "lenet_300_100": (lenet_300_100, (784,)),
    "lenet_5_caffe": (lenet_5_caffe, (1, 28, 28)),
}
ROADS = {
    "lenet_300_100": Road(
        levels={
            3400: (2.5, 3.5), 2400: (2.5, 3.5), 1700: (2.5, 3.5, 5.0), 1200: (3.5, 5.0, 7.0), 850: (5.0, 7.0),
        }
    ),
    "lenet_5_caffe": Road(
        levels=dict.fromkeys((2400, 1700), (1.75, 2.5, 4.0)), trunk_scale=0.1, drop=0.0, max_scale=0.5, lr=2e-3,
        group_rounds=((4.0, 4), (8.0, 4), (16.0, 4)), budget=10_000, first=(3, 4, 4), later=(1, 6, 3),
        settle_epochs=8, grid_epochs=10,
    ),
}  # fmt: skip
RECIPES: dict[str, tuple[tuple[float, ...], Settings]] = {
    "lenet_300_100": (LEVELS, Settings(step_rate=3e-5)),
    "lenet_5_caffe": (
        (0.007, 0.0046, 0.0032, 0.0023, 0.0016),
        Settings(
            drop=0.0, group_lasso=0.0, dense_epochs=6, first_epochs=14, level_epochs=7, tune_epochs=8, grid_epochs=12
        ),
    ),
}
LARGER: dict[str, tuple[dict[int, tuple[float, ...]], tuple[float, ...]]] = {
    "lenet_300_100": ({5000: (1.0, 1.75)}, (0.045, 0.032))
}
"""Levels of the families and of the recipe on the road to more weights."""
DENSE_EPOCHS = {"lenet_300_100": 15, "lenet_5_caffe": 6}
SMOKE_ROWS = 1_000
_SHORT: dict[str, Any] = {
    "group_rounds": ((1.0, 1), (1.0, 1)), "first": (1, 1, 1), "later": (1, 1, 1), "settle_epochs": 1, "grid_epochs": 1,
}  # fmt: skip


def main() -> None:
    """Train, or measure, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's IDX files")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=[*FAMILIES, "recipe"], default=["recipe", *FAMILIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=RUNS, help="where networks and checkpoints are kept")
    parser.add_argument("--larger", action="store_true", help="networks of more weights, LeNet-300-100 only")
    parser.add_argument("--part", action="store_true", help="train what these options name, and do not measure")
    parser.add_argument("--measure", action="store_true", help="measure what is there, and do not train")
    parser.add_argument("--smoke", action="store_true", help="a run of a minute that shows nothing but that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    limit = SMOKE_ROWS if arguments.smoke else None
    if arguments.smoke:
        shorten()
    if not arguments.measure:
        for name in arguments.networks:
            if arguments.larger and name not in LARGER:
                continue
            data = load_mnist(arguments.data, NETWORKS[name][1], limit)
            for seed in arguments.seeds:
                for method in arguments.methods:
                    train(name, method, seed, data, arguments.runs / name, arguments.larger)
    if not arguments.part:
        results = arguments.runs if arguments.smoke else RESULTS
        write_report(arguments.runs, arguments.data, NETWORKS, describe_settings(), results)


def shorten() -> None:
    """One epoch and two levels of everything."""
    for name, road in ROADS.items():
        ROADS[name] = dataclasses.replace(road, levels={20_000: (2.0,), 10_000: (2.0,)}, **_SHORT)
        epochs = {f"{phase}_epochs": 1 for phase in ("dense", "first", "level", "tune", "grid")}
        RECIPES[name] = (0.08, 0.04), dataclasses.replace(RECIPES[name][1], **epochs)
        DENSE_EPOCHS[name] = 1


def train(name: str, method: str, seed: int, data: Mnist, folder: Path, is_larger: bool = False) -> None:
    """One method on one seed, network after network; what is on disk is not made again."""
    dense = make_dense(name, seed, data, folder)
    place = folder / f"{method}-{seed}{'-larger' if is_larger else ''}"
    if (place / "done").exists():
        return
    clock = time.perf_counter()
    for stop, net in walk(name, method, seed, data.train, dense, place, is_larger):
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        record = keep(net, data.validation, place / stop) | {"stop": stop, "method": method, "seed": seed}
        record["larger"] = is_larger
        write_text(
            place / f"{stop}.json",
            json.dumps(record | {"seconds": seconds, "place": describe_place()}, indent=1) + "\n",
        )
        shown = {k: record[k] for k in ("method", "seed", "stop", "bytes", "validation_error", "validation_nll")}
        print(shown, f"{seconds:.0f} s", flush=True)
    write_text(place / "done", "\n")


def walk(
    name: str, method: str, seed: int, rows: Rows, dense: nn.Module, place: Path, is_larger: bool
) -> Iterator[tuple[str, nn.Module]]:
    """Compact networks by the name of their stop."""
    there = {file.stem for file in place.glob("*.json")}
    if method != "recipe":
        road = dataclasses.replace(ROADS[name], levels=LARGER[name][0]) if is_larger else ROADS[name]
        for stop in compress_bayesian(dense, rows, method, road, seed, place, there):
            yield f"{stop.level}-{stop.coarseness:g}", stop.net
        return
    with seeded(seed):
        fresh = NETWORKS[name][0]()  # it trains its own dense network, under its penalties
    levels, settings = RECIPES[name]
    levels = LARGER[name][1] if is_larger else levels
    place.mkdir(parents=True, exist_ok=True)
    for title, net in run_recipe(fresh, rows, levels=levels, seed=seed, settings=settings, folder=place):
        stop_name = title.replace("% step ", "-")
        if stop_name not in there:
            yield stop_name, net


def keep(net: nn.Module, validation: Rows, path: Path) -> dict[str, Any]:
    """Write ``path``.rbc, check that it decodes to the network, and describe it."""
    ordered = order_units(net)
    data, packing = encode(ordered)
    write_atomically(path.with_name(f"{path.name}.rbc"), lambda temporary: temporary.write_bytes(data))
    decoded = decode(data)
    pairs = zip(ordered.state_dict().items(), decoded.state_dict().items(), strict=True)
    if any(a != b or not torch.equal(x, y) for (a, x), (b, y) in pairs):
        raise SurgeryError("coded network", got="other numbers", allowed="the same", fix="report it")
    error, nll = measure(decoded, validation)
    weights = [p for p in decoded.parameters() if p.dim() > 1]
    return {
        "bytes": len(data),
        "parts": {part: bits / 8 for part, bits in packing.parts.items()},
        "nonzero": sum(int((p != 0).sum()) for p in decoded.parameters()),
        "shapes": [list(p.shape) for p in weights],
        "validation_error": error,
        "validation_nll": nll,
    }


@torch.no_grad()
def measure(net: nn.Module, rows: Rows) -> tuple[float, float]:
    """Error in percent and nats a row."""
    outputs: Tensor = torch.cat([net(x) for x in rows[0].split(1000)])
    wrong = (outputs.argmax(1) != rows[1]).double().mean()
    return 100 * float(wrong), float(F.cross_entropy(outputs, rows[1]))


def make_dense(name: str, seed: int, data: Mnist, folder: Path) -> nn.Module:
    """The dense network every method starts from: Adam, one cycle, dropped inputs."""
    build, _ = NETWORKS[name]
    with seeded(seed):
        net: nn.Module = build().to(memory_format=torch.channels_last)  # trains in two thirds of the time on a CPU
    file = folder / f"dense-{seed}.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    epochs, loader = DENSE_EPOCHS[name], DroppedRows(data.train, ROADS[name].drop)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
    start = time.perf_counter()
    with seeded(seed, 1):
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                schedule.step()
    error, nll = measure(net.eval(), data.validation)
    write_atomically(file, lambda temporary: torch.save(net.state_dict(), temporary))
    record = {"validation_error": error, "validation_nll": nll, "seconds": time.perf_counter() - start}
    write_text(file.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    print(name, "dense", seed, record, flush=True)
    return net


def describe_settings() -> dict[str, Any]:
    """All settings, for the result file."""
    return {
        "roads": {name: dataclasses.asdict(road) for name, road in ROADS.items()},
        "recipes": {
            name: {"levels": levels} | dataclasses.asdict(settings) for name, (levels, settings) in RECIPES.items()
        },
        "larger": LARGER,
        "dense_epochs": DENSE_EPOCHS,
    }


if __name__ == "__main__":
    main()
