"""Read the test rows once, decode every coded file of the MNIST benchmark, and write the tables and the plot."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._mnist import Rows, load_test
from benchmarks._mnist_onnx import compare_latency, measure_int8
from benchmarks._record import describe_earlier, describe_run, gather_points, print_run
from pyrobc.codec import unpack
from pyrobc.compare import describe_cpu, measure_error
from pyrobc.dependency import trace_groups
from pyrobc.errors import SurgeryError
from pyrobc.slicing import slice_groups

__all__ = ["write_report"]

DENSE_BYTES = {"lenet_300_100": 4 * 266_610, "lenet_5_caffe": 4 * 431_080}
DENSE_WEIGHTS = {"lenet_300_100": 266_200, "lenet_5_caffe": 430_500}
LABELS = {
    "group_normal_jeffreys": "GNJ, weights, grid",
    "group_horseshoe": "GHS, weights, grid",
    "recipe": "recipe (not Bayesian)",
}
REFERENCE = {
    "lenet_300_100": [
        (4388, 1.48), (3168, 1.60), (2996, 1.70), (2188, 1.93), (1722, 2.09), (1346, 2.51), (844, 3.70),
    ]
}  # fmt: skip
"""Bytes and test errors of a recipe measured earlier for this project, two seeds, another coder."""
PUBLISHED = {
    "lenet_300_100": [("BC-GNJ, estimate", 58, 1.8), ("BC-GHS, estimate", 59, 2.0), ("SparseVD, estimate", 113, 1.8)],
    "lenet_5_caffe": [
        ("BC-GNJ, estimate", 573, 1.0), ("BC-GHS, estimate", 771, 1.0), ("MIRACLE", 1110, 0.96), ("MIRACLE", 555, 0.69),
    ],
}  # fmt: skip
TARGETS = {
    "lenet_300_100": (("at least", 1.8, 120), ("aim", 1.7, 500)),
    "lenet_5_caffe": (("at least", 1.0, 771), ("aim", 0.9, 1500)),
}


RUN = ("method", "seed", "larger")  # what tells one run from another
ERRORS = {"lenet_300_100": (1.5, 1.6, 1.7, 1.8, 2.0, 2.5, 3.0), "lenet_5_caffe": (0.8, 0.9, 1.0, 1.2, 1.5)}
INTRODUCTION = (
    "Real bytes of files that decode to the network, against test error.  The Bayesian families start from the same "
    "dense networks, the recipe trains its own under its penalties; all use the same coder.  Settings were chosen on "
    "5,000 validation rows; the test rows were read only by the command below, after all networks were on disk.  "
    "Stops of 5,000 weights, and the recipe's of 4.50 and 3.20 %, are from `--larger --part`, run before it.  "
    "Ratios are against float32 dense parameters.  At equal error, bytes are interpolated on the lower convex hull of "
    "each method's points.  Pruning is the published column: dense weights over those of the smaller dense layers.  "
    "Seconds are from one stop to the next on one thread of a shared machine, those of a resumed run its last part."
)


def write_report(
    runs: Path, data: Path, networks: Mapping[str, tuple[Any, tuple[int, ...]]], settings: Mapping[str, Any], to: Path
) -> None:
    """``mnist_compression.json``, ``.md`` and ``.png`` in the folder ``to`` from every file below ``runs``.

    Runs that the result of an earlier call has, and that were not run to the end here, keep their numbers.
    """
    found: dict[str, Any] = {}
    before = json.loads(path.read_text()) if (path := to / "mnist_compression.json").exists() else {}
    lines = ["# mnist_compression", "", INTRODUCTION, ""]
    for name, (build, shape) in networks.items():
        stored = before.get("networks", {}).get(name, {})
        if not stored and not (runs / name).is_dir():
            continue
        test = load_test(data, shape)
        places = (p for p in (runs / name).glob("*-*") if p.is_dir())
        read = partial(read_point, test=test)
        points = gather_points(places, read, stored.get("points", []), RUN, before.get("date", ""))
        files = sorted((runs / name).glob("dense-*.pt"))
        dense = [read_dense(file, build, test) for file in files] or stored["dense"]
        means = list(average(points))
        int8 = measure_int8(files[0], build, data, shape, test) if files else stored["int8"]
        found[name] = {"dense": dense, "int8": int8, "points": points, "means": means}
        lines += tabulate(name, dense, int8, means)
        earlier = describe_earlier(points, lambda p: LABELS[p["method"]] + (", larger" if p["larger"] else ""))
        lines += [f"{describe_seeds(means)}  {earlier}".rstrip(), ""]
        if name == "lenet_5_caffe" and points:
            here = measure_speed(build, means, test[0][:8192])
            others = [speed for speed in stored.get("speeds", []) if speed["cpu"] != here["cpu"]]
            found[name]["speeds"] = [*others, here]
            lines += [line for speed in found[name]["speeds"] for line in (*describe_speed(speed), "")]
    seeds = sorted({p["seed"] for network in found.values() for p in network["points"]})
    record = describe_run("mnist_compression", seeds, "--data FOLDER")
    trained = sorted({p["place"] for network in found.values() for p in network["points"] if "place" in p})
    lines += [f"Trained on {' and '.join(trained)}.", *print_run(record)]
    to.mkdir(exist_ok=True)
    everything = record | {"settings": settings, "networks": found}
    (to / "mnist_compression.json").write_text(json.dumps(everything, indent=1) + "\n")
    (to / "mnist_compression.md").write_text("\n".join(lines) + "\n")
    draw(found, to)
    print("\n".join(lines))


def read_point(file: Path, test: Rows) -> dict[str, Any]:
    """A network on the way: its record, and its test error from the decoded file."""
    record: dict[str, Any] = json.loads(file.read_text())
    coded = file.with_suffix(".rbc")
    error, *_ = measure_error(unpack(coded), test, "categorical")
    return record | {"bytes": coded.stat().st_size, "test_error": 100 * error}


def read_dense(file: Path, build: Any, test: Rows) -> dict[str, Any]:
    """The dense network a seed starts from."""
    net = build()
    net.load_state_dict(torch.load(file, weights_only=True))
    error, *_ = measure_error(net.eval(), test, "categorical")
    return json.loads(file.with_suffix(".json").read_text()) | {"test_error": 100 * error}


def average(points: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over seeds of every method's every stop, from many bytes to few."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["method"], point["stop"]), []).append(point)
    rows = []
    for (method, stop), members in groups.items():
        names = ("bytes", "test_error", "validation_error", "validation_nll", "nonzero", "seconds")
        row: dict[str, Any] = {key: statistics.mean(p[key] for p in members) for key in names}
        errors = [p["test_error"] for p in members]
        parts = {key: statistics.mean(p["parts"].get(key, 0.0) for p in members) for key in members[0]["parts"]}
        rows.append(
            {"method": method, "stop": stop, "seeds": sorted(p["seed"] for p in members)}
            | {"low": min(errors), "high": max(errors)}
            | row
            | {"parts": parts, "shapes": members[0]["shapes"]}
        )
    yield from sorted(rows, key=lambda row: (list(LABELS).index(row["method"]), -row["bytes"]))


def tabulate(
    name: str, dense: Sequence[dict[str, Any]], int8: Mapping[str, Any], means: Sequence[dict[str, Any]]
) -> list[str]:
    """Targets, the frontier of every method, what is published, and where the bytes are."""
    size, there = DENSE_BYTES[name], {m["method"] for m in means}
    labels = {method: label for method, label in LABELS.items() if method in there}
    errors = ", ".join(f"{row['test_error']:.2f}" for row in dense)
    lines = [f"## {name}", "", f"Dense float32: {size:,} bytes of parameters, test error {errors} % by seed.", ""]
    lines += ["| target | met by (mean test error, bytes, ratio) |  |", "|---|---|---|"]
    for word, limit, ratio in TARGETS[name]:
        for method, label in labels.items():
            fits = [m for m in means if m["method"] == method and m["test_error"] <= limit]
            best = min(fits, key=lambda m: m["bytes"], default=None)
            got = (
                "none"
                if best is None
                else f"{best['test_error']:.2f} %, {best['bytes']:,.0f}, {size / best['bytes']:,.0f}x"
            )
            met = "yes" if best is not None and size / best["bytes"] >= ratio else "NO"
            lines.append(f"| {word}: <= {limit} % at >= {ratio}x; {label} | {got} | {met} |")
    lines += ["", "| equal error | " + " | ".join(f"{label}, bytes" for label in labels.values()) + " |"]
    lines += ["|---|" + "---|" * len(labels)]
    for level in ERRORS[name]:
        at = [interpolate([m for m in means if m["method"] == method], level) for method in labels]
        lines.append(f"| {level} % | " + " | ".join("not reached" if b is None else f"{b:,.0f}" for b in at) + " |")
    lines += [
        "",
        "| method, stop | bytes | ratio | test error, % (seeds) | validation error | nonzero | widths | pruning | s |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines.append(
        f"| dense int8 ONNX | {int8['bytes']:,} | {size / int8['bytes']:.1f}x | {int8['test_error']:.2f} (seed 0) "
        "| | | | | |"
    )
    for m in means:
        block = sum(math.prod(shape) for shape in m["shapes"])
        widths = "-".join(str(shape[1]) for shape in m["shapes"]) + "-10"
        lines.append(
            f"| {LABELS[m['method']]}, {m['stop']} | {m['bytes']:,.0f} | {size / m['bytes']:,.0f}x "
            f"| {m['test_error']:.2f} ({m['low']:.2f}-{m['high']:.2f}, {len(m['seeds'])}) "
            f"| {m['validation_error']:.2f} | {m['nonzero']:,.0f} | {widths} | {DENSE_WEIGHTS[name] / block:.1f}x "
            f"| {m['seconds']:.0f} |"
        )
    lines += [
        f"| {label}, published | {size / ratio:,.0f} | {ratio}x | {e} | | | | | |"
        for label, ratio, e in PUBLISHED[name]
    ]
    lines += ["", "Bytes by part, seed means: " + "; ".join(describe_parts(m) for m in pick(means)) + ".", ""]
    return lines


def describe_parts(mean: Mapping[str, Any]) -> str:
    """Where the bytes of a file are."""
    parts = ", ".join(f"{part} {count:.0f}" for part, count in mean["parts"].items() if count >= 0.5)
    return f"{LABELS[mean['method']]}, {mean['stop']}: {parts}"


def describe_seeds(means: Sequence[dict[str, Any]]) -> str:
    """Which seeds were run, method by method."""
    seeds = {
        label: sorted({s for m in means if m["method"] == method for s in m["seeds"]})
        for method, label in LABELS.items()
    }
    return "Seeds run: " + "; ".join(f"{label}: {', '.join(map(str, s))}" for label, s in seeds.items() if s) + "."


def pick(means: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The middle stop of every method."""
    by_method = [[m for m in means if m["method"] == method] for method in LABELS]
    return [rows[len(rows) // 2] for rows in by_method if rows]


def interpolate(means: Sequence[dict[str, Any]], error: float) -> float | None:
    """Bytes at a test error at most, on the lower convex hull of (error, log bytes); None where none is as good."""
    hull: list[tuple[float, float]] = []
    for point in sorted((m["test_error"], math.log(m["bytes"])) for m in means):
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    while len(hull) > 1 and hull[-1][1] >= hull[-2][1]:
        hull.pop()
    for (e0, b0), (e1, b1) in itertools.pairwise(hull):
        if e0 <= error <= e1:
            return math.exp(b0 + (b1 - b0) * (error - e0) / (e1 - e0)) if e1 > e0 else math.exp(min(b0, b1))
    if hull and error >= hull[-1][0]:
        return math.exp(hull[-1][1])
    return None


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) <= 0


def measure_speed(build: Any, means: Sequence[dict[str, Any]], rows: Tensor) -> dict[str, Any]:
    """Dense against the widths of the smallest Bayesian file with a test error of at most 1 %, or the most accurate."""
    ours = [m for m in means if m["method"] != "recipe"]
    good = [m for m in ours if m["test_error"] <= 1.0] or [min(ours, key=lambda m: m["test_error"])]
    chosen = min(good, key=lambda m: m["bytes"])
    dense = build().eval()
    spec = trace_groups(dense, rows[:2], prune_inputs=False)
    kept = {block.name: np.arange(shape[0]) for block, shape in zip(spec.blocks, chosen["shapes"][:-1], strict=True)}
    compact = slice_groups(dense, spec, kept)  # times depend on widths, not on numbers
    if [list(p.shape) for p in compact.parameters() if p.dim() > 1] != chosen["shapes"]:
        raise SurgeryError("widths", got=str(kept), allowed=str(chosen["shapes"]), fix="report it")
    times = compare_latency(dense, compact, rows)
    facts = {key: chosen[key] for key in ("stop", "method", "bytes", "shapes")}
    return facts | {"times": times, "cpu": describe_cpu()}


def describe_speed(speed: Mapping[str, Any]) -> list[str]:
    """A table of run times."""
    lines = [
        f"CPU inference on {speed['cpu']}, batch 8192, one thread, one run, medians of interleaved calls: the dense "
        f"network against one of the widths of {LABELS[speed['method']]}, {speed['stop']}.",
        "",
        "| run by | dense, ms | compact, ms | ratio | target | met |",
        "|---|---|---|---|---|---|",
    ]
    for runner, (dense, compact) in speed["times"].items():
        ratio = dense / compact
        met = "yes, aim" if ratio >= 10 else "yes" if ratio >= 5 else "MISSED"
        lines.append(f"| {runner} | {dense:.0f} | {compact:.0f} | {ratio:.1f} | >= 5, aim 10 | {met} |")
    return lines


def draw(networks: Mapping[str, Any], to: Path) -> None:
    """Error against bytes, every method, every network."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(networks), figsize=(5.5 * len(networks), 4.2), squeeze=False)
    for axis, (name, found) in zip(axes[0], networks.items(), strict=True):
        for method, label in LABELS.items():
            rows = [m for m in found["means"] if m["method"] == method]
            if rows:
                axis.plot([m["bytes"] for m in rows], [m["test_error"] for m in rows], "o-", label=label, markersize=4)
        if name in REFERENCE:
            axis.plot(*zip(*REFERENCE[name], strict=True), "k--", linewidth=0.9, label="recipe as reported earlier")
        for number, (label, ratio, error) in enumerate(PUBLISHED[name]):
            spot = (DENSE_BYTES[name] / ratio, error)
            axis.plot(*spot, "kx", markersize=5)
            axis.annotate(
                label, spot, fontsize=7, ha="right", xytext=(-4, 3 if number % 2 else -9), textcoords="offset points"
            )
        axis.set(title=name.replace("_", "-"), xlabel="bytes of the file", ylabel="test error, %", xscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(to / "mnist_compression.png", dpi=110)
