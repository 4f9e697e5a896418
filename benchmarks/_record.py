"""Write a benchmark's rows with all that is needed to read them: versions, machine, seeds, command, date."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pyrobc.compare import describe_cpu

RESULTS = Path(__file__).parent / "results"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """A short name for one run, from the facts that make it that run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def describe_run(name: str, seeds: list[int], options: str = "") -> dict[str, Any]:
    """Command, date, machine, versions and seeds of the run that is going on."""
    return {
        "name": name,
        "command": f"python -m benchmarks.{name} {options}".rstrip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cpu": describe_cpu(),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "pyro-ppl", "numpy", "scipy", "scikit-learn")},
        "seeds": seeds,
    }


def describe_place(device: str = "cpu") -> str:
    """Processor or GPU and the version of torch, for runs of one table that were made on several machines."""
    on_gpu = torch.device(device).type == "cuda"
    return f"{torch.cuda.get_device_name(device) if on_gpu else describe_cpu()}, torch {torch.__version__}"


def print_run(record: Mapping[str, Any]) -> list[str]:
    """The same as the closing lines of a Markdown file."""
    machine, versions = record["machine"], record["versions"]
    return [
        "",
        f"`{record['command']}`, {record['date']}, seeds {record['seeds'] or 'none'};",
        f"{machine['cpu']}, {machine['threads']} thread(s);",
        ", ".join(f"{package} {number}" for package, number in versions.items()) + ".",
    ]


def join_points(
    here: Sequence[dict[str, Any]],
    done: Collection[tuple[Any, ...]],
    stored: Sequence[dict[str, Any]],
    names: Sequence[str],
    date: str,
) -> list[dict[str, Any]]:
    """Points of runs that are ``done`` here, those ``stored`` of the others, and what is here of what is nowhere done.

    ``names`` are what tells one run from another; what is taken from an earlier result gets its ``date``.
    """

    def tell_run(point: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(point[name] for name in names)

    earlier = {tell_run(point) for point in stored} - set(done)
    kept = [{"measured": date} | point for point in stored if tell_run(point) in earlier]
    return [point for point in here if tell_run(point) not in earlier] + kept


def gather_points(
    places: Iterable[Path],
    read: Callable[[Path], dict[str, Any]],
    stored: Sequence[dict[str, Any]],
    names: Sequence[str],
    date: str,
) -> list[dict[str, Any]]:
    """Points of the runs in ``places`` that are done, and else those stored, or what there is of them here."""
    here, done = [], set()
    for place in sorted(places):
        points = [read(file) for file in sorted(place.glob("*.json"))]
        here += points
        if (place / "done").exists():
            done |= {tuple(point[name] for name in names) for point in points}
    return join_points(here, done, stored, names, date)


def describe_earlier(points: Sequence[dict[str, Any]], label: Callable[[dict[str, Any]], str]) -> str:
    """What was measured by an earlier run, whose dense networks were others of the same seeds."""
    earlier = sorted({(label(p), p["seed"], p["measured"]) for p in points if "measured" in p})
    if not earlier:
        return ""
    words = "; ".join(f"{name}: seed {seed}, {date}" for name, seed, date in earlier)
    return f"Measured earlier, from dense networks of another run with the same seeds: {words}."


def say_met(is_met: bool) -> str:
    """For the last column of a row with a target."""
    return "yes" if is_met else "MISSED"


def write_result(
    name: str,
    rows: list[dict[str, Any]],
    *,
    seeds: list[int],
    notes: str,
    options: str = "",
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write ``results/<name>.json`` and ``.md``; each row has what, value, target and whether it is met.

    ``details`` go into the JSON file only.
    """
    record = describe_run(name, seeds, options) | {"notes": notes, "rows": rows} | dict(details or {})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [f"# {name}", "", notes, "", "| what | value | target | met |", "|---|---|---|---|"]
    lines += [f"| {row['what']} | {row['value']:.3g} {row['unit']} | {row['target']} | {row['met']} |" for row in rows]
    text = "\n".join(lines + print_run(record)) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
