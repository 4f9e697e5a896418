"""Can the decisions be trusted?  Planted truth, and predicted against realised changes of the ELBO.

Parts; ``--parts`` chooses:

* ``regression``: 40 correlated inputs of which 6 are active, 60 to 400 rows; active inputs kept, inactive ones pruned,
  and the realised false-prune rate of the rule that bounds it;
* ``nuts``: the same lifted model under NUTS beside SVI, several chains on 100 rows of the first seed;
* ``teacher``: three tanh units taught to sixteen;
* ``change``: on the digits MLP, 40 random sets of groups, predicted log evidence and predicted ELBO
  against the change of the ELBO after re-adapting, both fitted on for as long; always of the default family too;
* ``labels``: digits with labels in random order; ``noise``: digits beside 64 pixels of noise.

Every fit is a job of its own, kept in ``runs/decision_calibration`` and not repeated: an interrupted run goes on.
``--processes 16`` runs so many at a time, and ``--report`` writes what is there.  Settings are the first ones tried, on
other seeds; those of the teacher are published.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._calibration_digits import FITS, measure_change, measure_labels, measure_noise
from benchmarks._calibration_planted import FAMILIES, measure_nuts, measure_regression, measure_teacher
from benchmarks._calibration_report import report
from benchmarks._record import describe_place, fingerprint
from pyrobc.checkpoint import write_atomically
from pyrobc.demo import DEFAULT_FAMILY

RUNS = Path("runs/decision_calibration")
FIRST_SEED, NUM_SEEDS = 1000, 20
ROWS = (60, 100, 200, 400)
SETS = 40
CHAINS = 4
MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "change": measure_change,
    "noise": measure_noise,
    "labels": measure_labels,
    "nuts": measure_nuts,
    "teacher": measure_teacher,
    "regression": measure_regression,
}


class Job(NamedTuple):
    """One fit and what is measured on it."""

    part: str
    settings: dict[str, Any]

    def run(self, folder: Path) -> str:
        """Measure and keep, unless that was done before."""
        path = folder / f"{fingerprint({'part': self.part} | self.settings)}.json"
        if path.exists():
            return f"{self.part} {self.settings}: done before"
        torch.set_num_threads(1)
        start = time.process_time()
        found = MEASURES[self.part](**self.settings)
        cost = {"seconds": round(time.process_time() - start, 1), "place": describe_place()}
        text = json.dumps({"part": self.part} | self.settings | found | cost, indent=1)
        write_atomically(path, lambda unfinished: unfinished.write_text(text))
        return f"{self.part} {self.settings}: {cost['seconds']} s"


def list_jobs(parts: list[str], seeds: int, families: list[str], scale: float) -> Iterator[Job]:
    """All jobs, the long ones first; ``scale`` shortens every fit."""

    def shorten(number: int) -> int:
        return max(4, round(number * scale))

    first, jobs = {"seed": FIRST_SEED}, []
    chunk, chunks = (SETS // 4, 4) if scale == 1.0 else (2, 2)
    demo = FITS[DEFAULT_FAMILY]
    demo = demo | {key: shorten(demo[key]) for key in ("epochs", "warmup_epochs")}
    everyone = range(FIRST_SEED, FIRST_SEED + seeds)
    lengths = {"draws": shorten(200), "steps": shorten(1000), "rows": 100}
    jobs += [Job(part, first | {"family": DEFAULT_FAMILY, "settings": demo}) for part in ("noise", "labels")]
    jobs += [Job("nuts", first | {"family": "log_uniform", "chain": c} | lengths) for c in range(CHAINS)]
    for family in dict.fromkeys([DEFAULT_FAMILY, *(name for name in families if name in FITS)]):
        epochs = shorten(FITS[family]["epochs"])
        change = first | {"family": family, "epochs": epochs, "readapt": max(1, epochs // 4)}
        jobs += [Job("change", change | {"sets": list(range(k, k + chunk))}) for k in range(0, chunk * chunks, chunk)]
    for family in families:
        jobs += [Job("teacher", {"seed": s, "family": family, "steps": shorten(6000)}) for s in everyone]
    for family in families:
        jobs += [
            Job("regression", {"seed": s, "rows": n, "family": family, "steps": shorten(1000)})
            for s in everyone
            for n in reversed(ROWS)
        ]
    return (job for job in jobs if job.part in parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="of planted data")
    parser.add_argument("--families", nargs="+", default=["log_uniform"], choices=list(FAMILIES))
    parser.add_argument("--processes", type=int, default=1, help="jobs at a time, a thread each")
    parser.add_argument("--report", action="store_true", help="write the results of what was run before, run nothing")
    parser.add_argument("--smoke", action="store_true", help="one seed, fits too short to mean anything; no results")
    arguments = parser.parse_args()
    folder = RUNS
    if arguments.smoke:
        folder, arguments.seeds = RUNS.with_name("decision_calibration_smoke"), 1
    if not arguments.report:
        folder.mkdir(parents=True, exist_ok=True)
        jobs = list_jobs(arguments.parts, arguments.seeds, arguments.families, 0.02 if arguments.smoke else 1.0)
        spawning = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.processes, spawning) as pool:
            for done in as_completed([pool.submit(job.run, folder) for job in jobs]):
                failure = done.exception()  # which must not keep the other jobs from being told
                print(done.result() if failure is None else f"FAILED: {failure!r}", flush=True)
    report(folder, NUM_SEEDS, list(MEASURES), is_written=not arguments.smoke)
