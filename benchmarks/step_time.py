"""What a Bayesian training step costs against plain PyTorch, and against what one would write without us.

All steps do forward, backward and an optimiser's step on the same batch, in one process, one of each per round.
``fast`` is the road ``fit`` takes by default, ``traced`` is Pyro's ELBO module; ``16 draws`` shares the noise of gates
among runs of eight examples, ``hidden units only`` leaves inputs without gates, ``channels last`` lays convolutions out
so, ``bfloat16`` autocasts products; ``pyro`` and ``by hand`` are Normal weights without groups.  A ratio is that of two
steps of one round.  With one thread CPU time counts, which other processes disturb least; with several it is the wall
clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import nn

from benchmarks._record import write_result
from benchmarks._written_steps import NUM_DATA, local_step, plain_step, pyro_step
from pyrobc.family import make_family
from pyrobc.lift import lift
from pyrobc.models import lenet_5, lenet_5_caffe, lenet_300_100
from pyrobc.models.resnet import resnet_20
from pyrobc.objective import fast_loss, traced_loss

TARGETS = {
    ("lenet_300_100", "log_uniform"): 1.6,
    ("lenet_5_caffe", "log_uniform"): 1.25,
    ("lenet_300_100", "group_normal_jeffreys"): 3.5,
    ("lenet_300_100", "group_horseshoe"): 3.5,
    ("lenet_5_caffe", "group_normal_jeffreys"): 2.6,
    ("lenet_5_caffe", "group_horseshoe"): 2.6,
    ("lenet_5", "log_uniform"): 1.5,
    ("resnet_20", "log_uniform"): 1.2,
}
ALL = ("log_uniform", "group_normal_jeffreys", "group_horseshoe")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "lenet_300_100": (lenet_300_100, (784,), ALL),
    "lenet_5_caffe": (lenet_5_caffe, (1, 28, 28), ALL),
    "lenet_5": (lenet_5, (1, 28, 28), ALL[:1]),
    "resnet_20": (resnet_20, (3, 32, 32), ALL[:1]),
}
Step = Callable[[], None]


def main() -> None:
    """Measure every network, family and road, and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in arguments.networks:
            rounds = arguments.rounds if name != "resnet_20" else max(4, arguments.rounds // 4)
            rows += measure(name, arguments.batch, rounds, threads)
    notes = (
        f"Step / plain PyTorch step, batch {arguments.batch}, median of the ratios of {arguments.rounds} interleaved "
        "rounds (ResNet-20: a quarter of them, at least 4), quartiles in brackets; CPU time with one thread, wall "
        "clock with more."
    )
    options = f"--rounds {arguments.rounds} --batch {arguments.batch} --networks {' '.join(arguments.networks)}"
    options += f" --threads {' '.join(map(str, arguments.threads))}"
    write_result("step_time", rows, seeds=[0], notes=notes, options=options)


def measure(name: str, batch: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one network."""
    build, shape, families = NETWORKS[name]
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 10, (batch,), generator=torch.Generator().manual_seed(1))
    steps = {("plain", ""): plain_step(build(), x, y)}
    for family in families:
        for road in ("fast", "traced"):
            steps[family, road] = bayesian_step(build(), family, road, x, y)
    more = [("16 draws", {"num_draws": 16}), ("hidden units only", {}), ("bfloat16", {})]
    more += [("channels last", {})] if len(shape) == 3 else []
    for road, settings in more:
        steps["log_uniform", road] = bayesian_step(build(), "log_uniform", road, x, y, settings)
    if len(families) > 1:  # the networks that are chains of layers
        steps["pyro", ""], steps["by hand", ""] = pyro_step(build(), x, y), local_step(build(), x, y)
    with pyro.get_param_store().scope():
        times = interleave(steps, rounds)
    clock = 0 if threads == 1 else 1
    plain = [pair[clock] for pair in times["plain", ""]]
    rows = []
    for family, road in list(steps)[1:]:
        ratios = [pair[clock] / other for pair, other in zip(times[family, road], plain, strict=True)]
        low, value, high = statistics.quantiles(ratios, n=4)
        target = TARGETS.get((name, family)) if road == "fast" and threads == 1 else None
        wall = [pair[1] for pair in times[family, road]]
        rows.append(
            {
                "what": f"{name}, {' '.join((family, road)).strip()}, {threads} thread(s) ({low:.2f}-{high:.2f})",
                "value": value,
                "quartiles": [low, high],
                "wall_ms": 1e3 * statistics.median(wall),
                "plain_wall_ms": 1e3 * statistics.median(pair[1] for pair in times["plain", ""]),
                "threads": threads,
                "unit": "x plain step",
                "target": f"<= {target}" if target else "reported",
                "met": "" if target is None else "yes" if value <= target else "MISSED",
            }
        )
        print(rows[-1]["what"], f"{value:.2f}", flush=True)
    return rows


def bayesian_step(
    net: nn.Module, family: str, road: str, x: torch.Tensor, y: torch.Tensor, settings: Mapping[str, Any] | None = None
) -> Step:
    """One step as ``fit`` takes it."""
    model = lift(
        net, make_family(family, **(settings or {})), "categorical", x[:1], prune_inputs=road != "hidden units only"
    )
    if road == "channels last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    guide = model.new_guide()
    loss: Any = (traced_loss if road == "traced" else fast_loss)(model, guide, NUM_DATA)
    optimizer = torch.optim.Adam(guide.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with pyro.validation_enabled(False), torch.autocast("cpu", torch.bfloat16, enabled=road == "bfloat16"):
            value = loss(x, y, 1.0)
        value.backward()
        optimizer.step()
        guide.project_()

    return step


def interleave(steps: dict[Any, Step], rounds: int) -> dict[Any, list[tuple[float, float]]]:
    """CPU and wall seconds of every step, one of each per round, after five rounds of warm-up."""
    times: dict[Any, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds + 5):
        for name, step in steps.items():
            start = time.process_time(), time.perf_counter()
            step()
            times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {name: values[5:] for name, values in times.items()}


if __name__ == "__main__":
    main()
