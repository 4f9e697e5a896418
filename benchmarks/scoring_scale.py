"""Scoring up to a hundred million weights: seconds, and memory beside that of the posterior.

Two roads, each case in a process of its own: ``weights``, the log Bayes factor of deleting each weight of a folded
posterior, and the decision by learned odds and by a number to keep; ``groups``, inputs of a layer of a thousand outputs
under group normal-Jeffreys, their scores, the decision, and its plan as text and back.  Posteriors are drawn, not
fitted: a tenth of the weights stand out.  Memory is the resident peak during the call less what was resident before it,
over the bytes of means and log scales.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._record import say_met, write_result
from pyrobc.batches import seeded
from pyrobc.decide import decide
from pyrobc.folding import FoldedFamily
from pyrobc.lift import LiftedModel, lift
from pyrobc.meanfield import NormalFactor
from pyrobc.plan import Plan
from pyrobc.posterior import Posterior
from pyrobc.scores import score
from pyrobc.weights import prune_weights, score_weights

SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000)
OUTPUTS = 1000  # of the layer whose inputs are groups, as wide as those of large networks
TARGET_SECONDS, TARGET_MEMORY = 60.0, 2.0


def draw_posterior(inputs: int, outputs: int, is_folded: bool) -> Posterior:
    """One linear layer whose weights are noise, but for a tenth of the inputs."""
    with seeded(0), torch.no_grad():
        net = nn.Linear(inputs, outputs, bias=False)
        model = lift(net, "group_normal_jeffreys", "normal", torch.zeros(1, inputs))
        if is_folded:
            family = FoldedFamily(model.family, {"weight": 0.05})
            model = LiftedModel(net, model.spec, family, model.likelihood, model.example_inputs)
        guide = model.new_guide()
        factor = guide.by_site()["weight"]
        assert isinstance(factor, NormalFactor)
        factor.loc.normal_().mul_(0.01)
        factor.loc[:, ::10].mul_(10)
        factor.log_scale.fill_(-4.5)
        for name, parameter in guide.named_parameters():
            if name.endswith("scale.log_loc"):
                parameter.fill_(-4.0)
                parameter[::10] = 0.0
    posterior = Posterior(model, guide, num_data=60_000)
    posterior.input_rms = {"weight": torch.ones(inputs)}
    return posterior


def measure(road: str, size: int, threads: int) -> dict[str, float]:
    """Seconds of each step by the clock, of all on the processor, and memory over that of the parameters."""
    torch.set_num_threads(threads)
    side = round((size // OUTPUTS) ** 0.5) * 10 if road == "weights" else OUTPUTS
    posterior = draw_posterior(size // side, side, road == "weights")
    number = size // side * side
    steps: dict[str, Callable[[], Any]]
    if road == "weights":
        steps = {
            "scores": lambda: score_weights(posterior),
            "decision by odds": lambda: prune_weights(posterior),
            "decision by number": lambda: prune_weights(posterior, keep=number // 100),
        }
    else:
        found: dict[str, Any] = {}
        steps = {
            "scores": lambda: found.update(score=score(posterior)),
            "decision": lambda: found.update(plan=decide(found["score"])),
            "plan as text and back": lambda: Plan.from_json(found["plan"].to_json()),
        }
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = read_memory("VmRSS")
    seconds, worked = {}, time.process_time()
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - start
    peak = (read_memory("VmHWM") - before) / (8 * number)
    return seconds | {"processor": time.process_time() - worked, "memory": peak, "number": number}


def read_memory(key: str) -> int:
    """Bytes of this process, as Linux counts them."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024 * int(line.split()[1])


def main(sizes: list[int], threads: int) -> None:
    """Measure every case in a fresh process and write the table."""
    rows: list[dict[str, Any]] = []
    for road in ("weights", "groups"):
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.scoring_scale", "--case", road, "--sizes", str(size)]
            done = subprocess.run([*command, "--threads", str(threads)], check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            number, memory, worked = (found.pop(key) for key in ("number", "memory", "processor"))
            total = sum(found.values())
            parts = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            groups = f" in {number // OUTPUTS:,} groups" if road == "groups" else ""
            is_large = number >= 0.99 * SIZES[-1]
            text = f"{number:,} weights{groups}: seconds ({parts}; {worked:.3g} of the processor)"
            is_met = say_met(total <= TARGET_SECONDS) if is_large else "-"
            target = f"<= {TARGET_SECONDS:g}" if is_large else "none"
            rows.append({"what": text, "value": total, "unit": "s", "target": target, "met": is_met})
            text = f"{number:,} weights{groups}: nanoseconds a weight"
            rows.append({"what": text, "value": 1e9 * total / number, "unit": "ns", "target": "none", "met": "-"})
            text = f"{number:,} weights{groups}: memory while scoring / that of means and log scales"
            is_met = say_met(memory <= TARGET_MEMORY) if is_large else "-"
            target = f"<= {TARGET_MEMORY:g}" if is_large else "none"
            rows.append({"what": text, "value": memory, "unit": "x", "target": target, "met": is_met})
            print(rows[-3]["what"], rows[-1]["value"], flush=True)
    notes = (
        "Each case in a process of its own.  Small cases hold little more than what the interpreter and PyTorch take "
        "for themselves, so that their memory says nothing."
    )
    options = f"--sizes {' '.join(map(str, sizes))} --threads {threads}"
    write_result("scoring_scale", rows, seeds=[0], notes=notes, options=options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=["weights", "groups"], help="print the numbers of one case; write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.sizes[0], arguments.threads)))
    else:
        main(arguments.sizes, arguments.threads)
