"""ResNet-50 and ViT-B at 224 x 224, from lifting to files: peak memory beside plain training, and seconds a stage.

Random weights and images: what is measured does not depend on what is learned.  Each road is a process of its own.
``plain`` builds the network and trains it by Adam; ``gates`` lifts it, fits as many steps with log-uniform gates,
scores, decides under a budget of half the parameters, cuts, and writes every file.  Memory is the resident peak less
what was resident before the network was built.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks._record import say_met, write_result
from benchmarks.scoring_scale import read_memory
from pyrobc.batches import TensorLoader, seeded
from pyrobc.decide import decide
from pyrobc.export import save
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.models import vit
from pyrobc.models.resnet import resnet_50
from pyrobc.scores import score
from pyrobc.surgery import apply

TARGET = 2.0


def vit_base() -> nn.Module:
    """ViT-B/16 on 224 x 224 images: 86,567,656 parameters."""
    return vit.build(224, 16, 3, 1000, features=768, depth=12, num_heads=12)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet_50": resnet_50, "vit_base": vit_base}


def measure(name: str, road: str, rows: int, batch: int, side: int) -> dict[str, Any]:
    """Seconds of each stage, peak bytes, and parameters before and after."""
    with seeded(0):
        x, y = torch.randn(rows, 3, side, side), torch.randint(0, 1000, (rows,))
    before = read_memory("VmRSS")
    with seeded(0):
        net = NETWORKS[name]()
    seconds: dict[str, float] = {}

    def run(stage: str, what: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = what()
        seconds[stage] = time.perf_counter() - start
        return result

    total = sum(p.numel() for p in net.parameters())
    if road == "plain":
        run("fit", lambda: train(net.train(), TensorLoader(x, y, batch)))
        left = total
    else:
        model = run("lift", lambda: lift(net, "log_uniform", "categorical", x[:1]))
        del net
        posterior = run("fit", lambda: fit(model, (x, y), epochs=1, batch_size=batch, progress=False))
        scored = run("score", lambda: score(posterior))
        plan = run("decide", lambda: decide(scored, budget=total // 2))
        compact = run("cut", lambda: apply(plan, posterior))
        with tempfile.TemporaryDirectory() as folder:
            run("export", lambda: save(compact, plan, folder, example_inputs=x[:1]))
        left = sum(p.numel() for p in compact.parameters())
        if left != plan.parameters[1]:
            raise SystemExit(f"{name}: {left} parameters left, the plan says {plan.parameters[1]}")
    return {"seconds": seconds, "peak": read_memory("VmHWM") - before, "parameters": [total, left]}


def train(net: nn.Module, loader: TensorLoader) -> None:
    """One epoch as one would write it."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for x, y in loader:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def main(arguments: argparse.Namespace) -> None:
    """Measure every network and road in fresh processes, and write the table."""
    options = f"--rows {arguments.rows} --batch {arguments.batch} --side {arguments.side}"
    result: list[dict[str, Any]] = []
    for name in arguments.networks:
        found = {}
        for road in ("plain", "gates"):
            command = [sys.executable, "-m", "benchmarks.large_networks", "--networks", name, "--case", road]
            done = subprocess.run([*command, *options.split()], check=True, capture_output=True, text=True)
            found[road] = json.loads(done.stdout.splitlines()[-1])
            print(name, road, found[road], flush=True)
        gates, plain = found["gates"], found["plain"]
        ratio, (total, left) = gates["peak"] / plain["peak"], gates["parameters"]
        sizes = f"{gates['peak'] / 2**30:.2f} / {plain['peak'] / 2**30:.2f} GiB"
        text = f"{name}, {total:,} to {left:,} parameters: peak memory, lift to files / plain training ({sizes})"
        is_met = say_met(ratio <= TARGET)
        result.append({"what": text, "value": ratio, "unit": "x", "target": f"<= {TARGET:g}", "met": is_met})
        for stage, value in gates["seconds"].items():
            note = f" (plain: {plain['seconds']['fit']:.1f} s)" if stage == "fit" else ""
            text = f"{name}: {stage}{note}"
            result.append({"what": text, "value": value, "unit": "s", "target": "none", "met": "-"})
    notes = (
        f"{arguments.rows} random images of {arguments.side} x {arguments.side}, batches of {arguments.batch}.  "
        "Seconds by the clock of a machine that may have had other work."
    )
    names = " ".join(arguments.networks)
    write_result("large_networks", result, seeds=[0], notes=notes, options=f"--networks {names} {options}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--case", choices=["plain", "gates"], help="print the numbers of one case; write nothing")
    arguments = parser.parse_args()
    if arguments.case:
        case = (arguments.networks[0], arguments.case, arguments.rows, arguments.batch, arguments.side)
        print(json.dumps(measure(*case)))
    else:
        main(arguments)
