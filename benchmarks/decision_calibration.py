"""Can the decisions be trusted?  Planted truth, and predicted against realised changes of the ELBO.

Parts; ``--parts`` chooses:

* ``regression``: 40 correlated inputs of which 6 are active, 60 to 400 rows; active inputs kept, inactive ones pruned,
  and the realised false-prune rate of the rule that bounds it;
* ``nuts``: the same lifted model under NUTS beside SVI, several chains on 100 rows of the first seed;
* ``teacher``: three tanh units taught to sixteen;
* ``change``: on the digits MLP, 40 random sets of groups, predicted log evidence against the change of the ELBO after
  re-adapting, both fitted on for as long;
* ``labels``: digits with labels in random order; ``noise``: digits beside 64 pixels of noise.

Every fit is a job of its own, kept in ``runs/decision_calibration`` and not repeated: an interrupted run goes on, and
``--share 3/16`` does the third of sixteen equal shares, each a process.  ``--report`` writes what is there.  Settings
are the first ones tried, on other seeds; those of the teacher are published.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._calibration_digits import measure_change, measure_labels, measure_noise
from benchmarks._calibration_planted import FAMILIES, measure_nuts, measure_regression, measure_teacher
from benchmarks._calibration_report import report
from benchmarks._record import describe_place, fingerprint
from pyrobc.checkpoint import write_atomically
from pyrobc.demo import DEFAULT_FAMILY, DEMO_SETTINGS

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

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return RUNS / f"{fingerprint({'part': self.part} | self.settings)}.json"

    def run(self) -> None:
        """Measure and keep, unless that was done before."""
        if self.path.exists():
            return
        start = time.process_time()
        found = MEASURES[self.part](**self.settings)
        cost = {"seconds": round(time.process_time() - start, 1), "place": describe_place()}
        RUNS.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"part": self.part} | self.settings | found | cost, indent=1)
        write_atomically(self.path, lambda path: path.write_text(text))
        print(f"{self.part} {self.settings}: {cost['seconds']} s", flush=True)


def list_jobs(parts: list[str], seeds: int, families: list[str], scale: float) -> Iterator[Job]:
    """All jobs, the long ones first; ``scale`` shortens every fit."""

    def shorten(number: int) -> int:
        return max(4, round(number * scale))

    first, jobs = {"seed": FIRST_SEED}, []
    demo = DEMO_SETTINGS[DEFAULT_FAMILY]
    demo = demo | {key: shorten(demo[key]) for key in ("epochs", "warmup_epochs")}
    everyone = range(FIRST_SEED, FIRST_SEED + seeds)
    lengths = {"draws": shorten(200), "steps": shorten(1000), "rows": 100}
    jobs += [Job(part, first | {"family": DEFAULT_FAMILY, "settings": demo}) for part in ("noise", "labels")]
    jobs += [Job("nuts", first | {"family": "log_uniform", "chain": c} | lengths) for c in range(CHAINS)]
    for family in [name for name in families if name in DEMO_SETTINGS]:
        epochs = shorten(DEMO_SETTINGS[family]["epochs"])
        change = first | {"family": family, "epochs": epochs, "readapt": max(1, epochs // 4)}
        jobs += [Job("change", change | {"which": w}) for w in range(shorten(SETS))]
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
    parser.add_argument("--share", default="1/1", help="which of how many equal shares of the jobs to run")
    parser.add_argument("--report", action="store_true", help="write the results of what was run before, run nothing")
    parser.add_argument("--smoke", action="store_true", help="one seed, fits too short to mean anything; no results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.smoke:
        RUNS, arguments.seeds = RUNS.with_name("decision_calibration_smoke"), 1
    which, shares = map(int, arguments.share.split("/"))
    jobs = list(list_jobs(arguments.parts, arguments.seeds, arguments.families, 0.02 if arguments.smoke else 1.0))
    if not arguments.report:
        for job in jobs[which - 1 :: shares]:
            job.run()
    if arguments.report or (shares == 1 and not arguments.smoke):
        report(RUNS, NUM_SEEDS, list(MEASURES))
    elif arguments.smoke:
        report(RUNS, NUM_SEEDS, list(MEASURES), is_written=False)
