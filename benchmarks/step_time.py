"""What a Bayesian training step costs: lifted network against plain PyTorch, interleaved in one process.

Both do forward, backward and a fused Adam step on the same batch.  ``fast`` is the road ``fit`` takes by default,
``traced`` is Pyro's ELBO module.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import nn

from benchmarks._record import write_result
from pyrobc.family import make_family
from pyrobc.lift import lift
from pyrobc.models import lenet_5, lenet_5_caffe, lenet_300_100
from pyrobc.models.resnet import resnet_20
from pyrobc.objective import fast_loss, traced_loss

TARGETS = {
    ("lenet_5_caffe", "log_uniform", "fast"): 1.5,
    ("lenet_5", "log_uniform", "fast"): 1.5,
    ("resnet_20", "log_uniform", "fast"): 1.3,
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "lenet_5_caffe": (lenet_5_caffe, (1, 28, 28), ("log_uniform", "group_horseshoe")),
    "lenet_5": (lenet_5, (1, 28, 28), ("log_uniform",)),
    "lenet_300_100": (lenet_300_100, (784,), ("log_uniform", "group_horseshoe")),
    "resnet_20": (resnet_20, (3, 32, 32), ("log_uniform",)),
}


def main() -> None:
    """Measure every network, family and road, and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.networks:
        build, shape, families = NETWORKS[name]
        x = torch.rand(arguments.batch, *shape, generator=torch.Generator().manual_seed(0))
        y = torch.randint(0, 10, (arguments.batch,), generator=torch.Generator().manual_seed(1))
        steps = {"plain": plain_step(build(), x, y)}
        for family in families:
            for road in ("fast", "traced"):
                steps[f"{family} {road}"] = bayesian_step(build(), family, road, x, y)
        times = interleave(steps, arguments.rounds if name != "resnet_20" else max(3, arguments.rounds // 4))
        plain = times["plain"]
        for label in list(steps)[1:]:
            ratios = [a / b for a, b in zip(times[label], plain, strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            family, road = label.split()
            target = TARGETS.get((name, family, road))
            value = statistics.median(times[label]) / statistics.median(plain)
            rows.append(
                {
                    "what": f"{name}, {family}, {road} (quartiles {quartiles[0]:.2f}-{quartiles[2]:.2f})",
                    "value": value,
                    "unit": "x plain step",
                    "target": f"<= {target}" if target else "reported",
                    "met": "" if target is None else "yes" if value <= target else "NO",
                }
            )
    notes = (
        f"Bayesian step / plain step, batch {arguments.batch}, CPU time, medians of {arguments.rounds} interleaved "
        "rounds (ResNet-20: a quarter of them)."
    )
    write_result("step_time", rows, seeds=[0], notes=notes, options=f"--rounds {arguments.rounds}")


def plain_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One step of ordinary training."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def bayesian_step(net: nn.Module, family: str, road: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One step as ``fit`` takes it."""
    model = lift(net, make_family(family), "categorical", x[:1])
    guide = model.new_guide()
    loss: Any = {"fast": fast_loss, "traced": traced_loss}[road](model, guide, 60_000)
    optimizer = torch.optim.Adam(guide.parameters(), fused=True)

    def step() -> None:
        with pyro.validation_enabled(False):
            value = loss(x, y, 1.0)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        guide.project_()

    return step


def interleave(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step, one of each per round, after five rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 5):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return {name: values[5:] for name, values in times.items()}


if __name__ == "__main__":
    main()
