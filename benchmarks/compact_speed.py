"""What physical removal gains: time of a cut network against the dense one, interleaved in one process, one thread.

Each block keeps about a half or a quarter of its channels, chosen at random, with and without rounding widths up to
multiples of 8.  A row's value is the speed-up over the ratio of multiply-accumulates: 1 means that the time follows
them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._record import write_result
from pyrobc.dependency import trace_groups
from pyrobc.groups import GroupSpec, Kept
from pyrobc.models import lenet_5, lenet_5_caffe, resnet_20, vgg_16
from pyrobc.rounding import round_up
from pyrobc.slicing import slice_groups

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet_5": (lenet_5, (1, 28, 28), 40),
    "lenet_5_caffe": (lenet_5_caffe, (1, 28, 28), 40),
    "resnet_20": (resnet_20, (3, 32, 32), 11),
    "vgg_16": (vgg_16, (3, 32, 32), 5),
}
LEAST, AIM = 0.5, 0.8
HAS_TARGET = ("lenet_5", "lenet_5_caffe", "vgg_16")


def main() -> None:
    """Measure every network and cut, and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in arguments.networks for row in measure(name, arguments.batch)]
    notes = (
        f"(time dense / compact) over (MACs dense / compact), forward passes, batch {arguments.batch}, medians of "
        "interleaved rounds with quartiles, CPU time of one thread."
    )
    write_result("compact_speed", rows, seeds=[0], notes=notes)


def measure(name: str, batch: int) -> list[dict[str, Any]]:
    """Rows of one network."""
    build, shape, rounds = NETWORKS[name]
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(batch, *shape)
    spec = trace_groups(net, x[:2], prune_inputs=False)
    cuts = {
        f"{share:.0%}{', multiples of 8' if multiple > 1 else ''}": choose(spec, share, multiple)
        for share in (0.5, 0.25)
        for multiple in (1, 8)
    }
    small = {label: slice_groups(net, spec, kept) for label, kept in cuts.items()}
    times = interleave({"dense": net} | small, x, rounds)
    dense = statistics.median(times["dense"])
    rows = []
    for label, kept in cuts.items():
        macs = spec.forecast(spec.everything())[1] / spec.forecast(kept)[1]
        ratios = [a / b for a, b in zip(times["dense"], times[label], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        value = dense / statistics.median(times[label]) / macs
        has_target = name in HAS_TARGET
        rows.append(
            {
                "what": f"{name}, keeps {label}: {middle:.2f}x faster ({low:.2f}-{high:.2f}), {macs:.2f}x fewer MACs",
                "value": value,
                "unit": "speed-up / MACs ratio",
                "target": f">= {LEAST}, aim {AIM}" if has_target else "reported",
                "met": "" if not has_target else "aim" if value >= AIM else "yes" if value >= LEAST else "NO",
                "seconds": {"dense": dense, "compact": statistics.median(times[label])},
            }
        )
    return rows


def choose(spec: GroupSpec, share: float, multiple: int) -> Kept:
    """A random part of each block, rounded up."""
    rng = np.random.default_rng(0)
    odds = {block.name: rng.standard_normal(block.size) for block in spec.blocks}
    outcomes = {}
    for name, values in odds.items():
        left = np.argsort(np.argsort(values)) < max(1, round(share * len(values)))
        outcomes[name] = [("keep" if is_left else "prune", "") for is_left in left]
    round_up(spec, odds, outcomes, multiple)
    return {name: np.flatnonzero([row[0] == "keep" for row in rows]) for name, rows in outcomes.items()}


@torch.inference_mode()
def interleave(nets: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a forward pass of each network, one of each per round, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds + 2):
        for name, net in nets.items():
            start = time.process_time()
            net(x)
            times[name].append(time.process_time() - start)
    return {name: values[2:] for name, values in times.items()}


if __name__ == "__main__":
    main()
