"""What evidence costs: seconds and peak memory, each in a process of its own.

* ``demo``: digits, 64-300-100-10, what ``compress`` asks for: 1,000 rows, 200 draws, 6 candidates;
* ``large``: 10,000 rows and 200 draws of 784-300-100-10, 6 candidates.

Cost does not depend on how good the fit is but on how much of the network its candidates leave: these come from one
short fit, whose odds are replaced by ones that want three quarters of the groups out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks._record import say_met, write_result
from pyrobc.batches import seeded
from pyrobc.demo import DEFAULT_FAMILY, load_digits
from pyrobc.evidence import evidence
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.models import mlp
from pyrobc.scores import Score, score

CASES = {"demo": (20.0, "<= 20"), "large": (60.0, "<= 60")}
GIGABYTES = 4.0


def measure(case: str, threads: int) -> dict[str, float]:
    """Seconds of ``evidence``, by the clock and of the processor, and the process's peak memory in GiB."""
    torch.set_num_threads(threads)
    if case == "demo":
        x, y = load_digits().train
        rows = 1_000
    else:
        with seeded(0):
            x, y = torch.rand(10_000, 784), torch.randint(0, 10, (10_000,))
        rows = 10_000
    with seeded(0):
        net = mlp.build(x.shape[1], (300, 100), 10)
    model = lift(net, DEFAULT_FAMILY, "categorical", x[:1])
    posterior = fit(model, (x[:1_000], y[:1_000]), epochs=1, progress=False)
    posterior.num_data = len(x)
    scored = _want(score(posterior), 0.75)
    before, start, worked = _read_peak(), time.perf_counter(), time.process_time()
    checked = evidence(posterior, scored, (x, y), num_draws=200, max_rows=rows)
    cost = {"seconds": time.perf_counter() - start, "processor": time.process_time() - worked}
    assert checked.tree["log_likelihood"]["y"].shape == (1, 200, min(rows, len(x)))
    return cost | {"peak": _read_peak(), "before": before, "candidates": len(checked.candidates)}


def _want(scored: Score, share: float) -> Score:
    """The same score with odds, spread evenly, of which ``share`` are positive."""
    generator = np.random.default_rng(0)
    odds = {b.name: generator.permutation(np.linspace(share - 1, share, b.size)) for b in scored.spec.blocks}
    zero = {name: np.zeros_like(values) for name, values in odds.items()}
    return dataclasses.replace(scored, delta_f=odds, complement=zero, implied=zero, mcse=zero)


def _read_peak() -> float:
    """Peak resident memory of this process, GiB (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(threads: int) -> None:
    """Measure every case in a fresh process and write the table."""
    rows: list[dict[str, Any]] = []
    for case, (limit, target) in CASES.items():
        command = [sys.executable, "-m", "benchmarks.evidence_cost", "--case", case, "--threads", str(threads)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        text = f"{case}: evidence, {found['candidates']} networks ({found['processor']:.1f} s of the processor)"
        is_met = found["seconds"] <= limit
        rows.append({"what": text, "value": found["seconds"], "unit": "s", "target": target, "met": say_met(is_met)})
        text = f"{case}: peak memory of the process ({found['before']:.2f} before)"
        is_met = found["peak"] <= GIGABYTES
        rows.append({"what": text, "value": found["peak"], "unit": "GiB", "target": "<= 4", "met": say_met(is_met)})
    load = os.getloadavg()[1]
    notes = (
        "Seconds of one call by the clock, each case in a process of its own; the full network is among the networks.  "
        f"Load of the machine meanwhile, this one's own {threads} threads included: {load:.1f} on {os.cpu_count()} "
        "processors; seconds of the processor are summed over threads."
    )
    write_result("evidence_cost", rows, seeds=[0], notes=notes, options=f"--threads {threads}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=list(CASES), help="print the numbers of one case as JSON; write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.threads)))
    else:
        main(arguments.threads)
