"""Measure networks beside each other: error with an interval, parameters, MACs, bytes, latency."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from scipy.stats import binomtest, norm
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyrobc.batches import as_loader, first_batch, move, split_batch
from pyrobc.calling import call_network, evaluating, first_tensor
from pyrobc.kinds import check_kind
from pyrobc.likelihoods import Likelihood, make_likelihood

__all__ = ["compare", "count_macs", "describe_cpu", "measure_error", "measure_latency", "time_calls"]


def compare(
    networks: Mapping[str, nn.Module], data: Any, likelihood: Likelihood | str, *, repeats: int = 30
) -> list[dict[str, Any]]:
    """One row per network, all measured on the same rows in one run.

    Args:
        networks: plain modules by name.
        data: rows to measure the error on, a loader or a pair of arrays.
        likelihood: decides what an error is.
        repeats: timed calls per network, interleaved.
    """
    check_kind(networks, Mapping, "networks", "networks by name", 'pass {"dense": net, "compact": small}')
    loader = as_loader(data, batch_size=1024, shuffle=False)
    batch = first_batch(loader)[0]
    latencies = measure_latency(networks, batch, repeats)
    rows = []
    for name, net in networks.items():
        error, low, high = measure_error(net, loader, likelihood)
        rows.append(
            {
                "name": name,
                "error": error,
                "error_low": low,
                "error_high": high,
                "parameters": sum(p.numel() for p in net.parameters()),
                "macs": count_macs(net, batch),
                "bytes": len(to_safetensors({k: v.contiguous() for k, v in net.state_dict().items()})),
                "latency_ms": latencies[name],
                "latency_batch": len(first_tensor(batch)),
                "cpu": describe_cpu(),
                "threads": torch.get_num_threads(),
            }
        )
    return rows


@torch.no_grad()
def measure_error(net: nn.Module, data: Any, likelihood: Likelihood | str) -> tuple[float, float, float]:
    """Mean error and its 95% interval: Wilson's for wrong labels, a normal one for squared errors."""
    chosen = make_likelihood(likelihood)
    anchor, losses = next(iter(net.parameters())), []
    with evaluating(net):
        for batch in as_loader(data, batch_size=1024, shuffle=False):
            inputs, targets = (move(part, anchor) for part in split_batch(batch))
            outputs = first_tensor(call_network(net, inputs))
            losses.append(chosen.loss(outputs, targets).double().cpu())
    loss = torch.cat(losses)
    mean = float(loss.mean())
    if chosen.loss_name == "error":
        interval = binomtest(round(float(loss.sum())), len(loss)).proportion_ci(method="wilson")
        return mean, float(interval.low), float(interval.high)
    half = float(norm.ppf(0.975) * loss.std() / len(loss) ** 0.5)
    return mean, mean - half, mean + half


def count_macs(net: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates per example of matrix products and convolutions, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluating(net), counter:
        call_network(net, move(inputs, next(iter(net.parameters()))))
    return int(counter.get_total_flops()) // 2 // len(first_tensor(inputs))


def measure_latency(networks: Mapping[str, nn.Module], inputs: Any, repeats: int = 30) -> dict[str, float]:
    """Median milliseconds per call of each network, in evaluation mode."""
    values = {name: move(inputs, next(iter(net.parameters()))) for name, net in networks.items()}
    with ExitStack() as modes:
        for net in networks.values():
            modes.enter_context(evaluating(net))
        return time_calls({name: partial(call_network, net, values[name]) for name, net in networks.items()}, repeats)


@torch.no_grad()
def time_calls(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds per call after three rounds, interleaved so that a noisy machine is noisy for all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def describe_cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
