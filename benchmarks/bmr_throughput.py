"""How fast groups are scored: ten million of them, on one thread.

Each kind of reduction is compared with the cheapest thing it could be compared with in the same process: a Normal with
one logarithm per group, a truncated log-normal with ``torch.special.log_ndtr``, once per group and as often as the
textbook formula evaluates it (twice per normaliser that differs between groups).  Rounds are interleaved, so that a
machine that slows down slows both sides; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch

from benchmarks._record import write_result
from pyrobc.bmr import reduce
from pyrobc.dists import TruncatedLogNormal, TruncatedLogUniform

SEED = 0
LIMIT = 3.0


def make_cases(num_groups: int) -> dict[str, tuple[Callable[[], object], str, int]]:
    """Name of each case, what it runs, what it is compared with, and how many of those its formula contains."""
    generator = torch.Generator().manual_seed(SEED)
    double = torch.float64
    loc = torch.randn(num_groups, generator=generator, dtype=double)
    scale = torch.rand(num_groups, generator=generator, dtype=double) + 0.01
    uniform = torch.rand((2, num_groups), generator=generator, dtype=double)
    zero, one = torch.zeros((), dtype=double), torch.ones((), dtype=double)
    normal, prior, narrow = dist.Normal(loc, scale), dist.Normal(zero, one), dist.Normal(zero, 0.01 * one)
    # the whole legal range of a gate: location in [-20, 5], log scale in [-20, 5]
    gate = TruncatedLogNormal(uniform[0] * 25 - 20, (uniform[1] * 25 - 20).exp())
    log_uniform = TruncatedLogUniform(-20 * one, zero)
    spike, slab = dist.Delta((-20 * one).exp()), TruncatedLogNormal(-20 * one, 1e-6 * one)
    interval = TruncatedLogUniform(-16 * one, -3 * one)
    argument = 3.0 * loc
    return {
        "log": (lambda: torch.log(scale), "log", 1),
        "log_ndtr": (lambda: torch.special.log_ndtr(argument), "log_ndtr", 1),
        "Normal to Normal": (lambda: reduce(normal, prior, narrow), "log", 1),
        "truncated log-normal to a spike": (lambda: reduce(gate, log_uniform, spike), "log_ndtr", 2),
        "truncated log-normal to a log-uniform": (lambda: reduce(gate, log_uniform, interval), "log_ndtr", 4),
        "truncated log-normal to a log-normal": (lambda: reduce(gate, log_uniform, slab), "log_ndtr", 4),
    }


def time_once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(num_groups: int, num_rounds: int) -> list[dict[str, Any]]:
    """Median time per group of each case, and its ratios to the reference of the same round."""
    cases = make_cases(num_groups)
    with torch.no_grad():
        for run, _, _ in cases.values():
            run()
        rounds = [{name: time_once(run) for name, (run, _, _) in cases.items()} for _ in range(num_rounds)]
    rows: list[dict[str, Any]] = []
    for name, (_, reference, count) in cases.items():
        nanoseconds = statistics.median(row[name] for row in rounds) / num_groups * 1e9
        rows.append({"what": f"{name}, per group", "value": nanoseconds, "unit": "ns", "target": "", "met": ""})
        if name == reference:
            continue
        ratio = statistics.median(row[name] / row[reference] for row in rounds)
        for times in sorted({1, count}):
            what = f"{name} / {times} {reference} per group"
            # the target is read strictly: one reference evaluation a group
            target = f"<= {LIMIT:g}" if times == 1 else ""
            met = "" if not target else "yes" if ratio <= LIMIT else "NO"
            rows.append({"what": what, "value": ratio / times, "unit": "", "target": target, "met": met})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    notes = f"{options.groups:,} groups, median of {options.rounds} interleaved rounds, float64, no gradient."
    write_result("bmr_throughput", measure(options.groups, options.rounds), seeds=[SEED], notes=notes)


if __name__ == "__main__":
    main()
