"""Tables and curves of the BMRS benchmark, from the points that its runs left behind."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._record import describe_run, print_run
from pyrobc.checkpoint import write_text

__all__ = ["write_report"]

PUBLISHED = {
    ("mnist", "mlp"): {"none": (0, 97.43), "L2": (43.1, 10.4), "E[gate] < 0.1": (52.1, 96.88), "SNR < 1": (58.6, 96.92),
                       "BMRS_N as released": (48.9, 96.95), "BMRS_U 8": (48.7, 96.93), "BMRS_U 4": (54.5, 96.99)},
    ("mnist", "lenet_5"): {"none": (0, 99.07), "L2": (83.4, 11.4), "E[gate] < 0.1": (88.3, 51.3),
                           "SNR < 1": (92.7, 62.7), "BMRS_N as released": (86.9, 95.59), "BMRS_U 8": (86.1, 95.27),
                           "BMRS_U 4": (87.6, 96.66)},
    ("cifar10", "mlp"): {"none": (0, 44.94), "L2": (42.9, 10), "E[gate] < 0.1": (78.0, 43.39),
                         "SNR < 1": (75.9, 43.97), "BMRS_N as released": (76.4, 43.59), "BMRS_U 8": (77.2, 43.45),
                         "BMRS_U 4": (76.6, 44.06)},
    ("cifar10", "lenet_5"): {"none": (0, 67.62), "L2": (52.3, 10), "E[gate] < 0.1": (66.2, 65.83),
                             "SNR < 1": (70.3, 67.68), "BMRS_N as released": (62.9, 66.14), "BMRS_U 8": (62.5, 66.28),
                             "BMRS_U 4": (68.1, 67.66)},
}  # fmt: skip
"""Percent of parameters masked and accuracy in Wright, Igel and Selvan (2024): CIFAR-10 there is the original."""
TARGETS = {("mnist", "lenet_5"): (86.9, 98.0), ("mnist", "mlp"): (48.9, 97.2)}
"""Percent removed, and the accuracy to hold there."""
BMRS = ("spike", "uniform8", "uniform4", "below4", "rope")
Records = Sequence[Mapping[str, Any]]


def write_report(runs: Path, rules: Mapping[str, Mapping[str, Any]], results: Path) -> None:
    """Write ``bmrs_tables.json``, ``.md`` and ``.png`` into ``results``."""
    records = [json.loads(file.read_text()) for file in sorted(runs.glob("*/*.json"))]
    if not records:
        raise SystemExit(f"bmrs_tables: {runs}: got no runs; allowed: runs of this benchmark; fix: leave out --measure")
    seeds = sorted({record["seed"] for record in records})
    head = describe_run("bmrs_tables", seeds) | {"command": "; ".join(sorted({r["command"] for r in records}))}
    head["machine"] |= {"cpu": " and ".join(sorted({r["place"] for r in records}))}
    results.mkdir(parents=True, exist_ok=True)
    write_text(results / "bmrs_tables.json", json.dumps(head | {"rules": rules, "runs": records}, indent=1) + "\n")
    lines = ["# bmrs_tables", "", *INTRODUCTION]
    networks = sorted({(r["dataset"], r["network"]) for r in records}, key=lambda place: (place[0] != "mnist", place))
    for place in networks:
        here = [r for r in records if (r["dataset"], r["network"]) == place]
        lines += ["", f"## {place[1]} on {'MNIST' if place[0] == 'mnist' else 'CIFAR-10 (JPEG)'}", ""]
        lengths = " and ".join(map(str, sorted({r["epochs"] for r in here})))
        lines += [f"Fits of {lengths} epochs, seeds {sorted({r['seed'] for r in here})}.", ""]
        lines += describe_target(place, here) + tabulate(place, here, list(rules)) + describe_speed(here)
    write_text(
        results / "bmrs_tables.md", "\n".join(lines + ["", "![Curves](bmrs_tables.png)"] + print_run(head)) + "\n"
    )
    draw_curves(records, results / "bmrs_tables.png")
    print("\n".join(lines))


INTRODUCTION = [
    "Percent of the parameters removed, physically, and test accuracy; mean over seeds (their number in brackets).",
    "*After*: post-training pruning, the first level at which the rule has removed what it prunes, one epoch of",
    "re-adapting a level.  *Along*: continuous pruning.  `mean` weighs the KL as the released code of BMRS, `elbo`",
    "is the evidence bound; `x 10` is a temperature, `inputs`: inputs may leave too, `annealed`: falling rates.",
    "Parts were run with --kl-scales, --temperature, --inputs, --anneal, --scores and --rules as columns and rows say.",
    "*Published*: percent masked and accuracy in Wright, Igel and Selvan (2024), continuous.",
]


def tabulate(place: tuple[str, str], here: Records, rules: list[str]) -> list[str]:
    """One row per rule; one column per regime and weight of the KL."""
    columns = sorted({(r["regime"], r["kl_scale"]) for r in here}, key=lambda c: (c[0], c[1] != "mean", c[1]))
    lines = [
        "| rule | " + " | ".join(f"{a}, {kl}" for a, kl in columns) + " | published |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for rule in ["none", *rules]:
        cells = []
        for regime, kl in columns:
            points = [p for r in here if (r["regime"], r["kl_scale"]) == (regime, kl) for p in find_stop(r, rule)]
            cells.append(print_points(points))
        published = PUBLISHED.get(place, {}).get(rule)
        cells.append("" if published is None else f"{published[0]} / {published[1]}")
        if any(cells):
            lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return lines


def find_stop(record: Mapping[str, Any], rule: str) -> list[Mapping[str, Any]]:
    """The point of a run at which a rule stops, if the run has one."""
    if record["regime"] == "along" or record["name"] == "none":
        return [record["points"][-1]] if record["name"] == rule else []
    return [point for point in record["points"] if rule in point["stops"]]


def print_points(points: Sequence[Mapping[str, Any]]) -> str:
    """``removed / accuracy (seeds)``."""
    if not points:
        return ""
    removed, accuracy = (statistics.mean(p[key] for p in points) for key in ("removed", "test"))
    return f"{removed:.1f} / {accuracy:.2f} ({len(points)})"


def describe_target(place: tuple[str, str], here: Records) -> list[str]:
    """The smallest network on each seed whose validation accuracy holds the target's, and its test accuracy."""
    if place not in TARGETS:
        return []
    removed, accuracy = TARGETS[place]
    lines = [
        f"Target: at least {removed}% removed at {accuracy}% or more.  The smallest network on each seed whose",
        "*validation* accuracy is at least that, by any change of prior:",
        "",
        "| seed | removed | test accuracy | how |  |",
        "|---|---|---|---|---|",
    ]
    for seed in sorted({r["seed"] for r in here}):
        points = [
            (p["removed"], p["test"], f"{r['name']}, {r['regime']}, {r['kl_scale']}")
            for r in here
            if r["seed"] == seed and (r["name"] in BMRS or r["name"].startswith(("BMRS", "ROPE")))
            for p in r["points"]
            if p["validation"] >= accuracy
        ]
        if points:
            best = max(points)
            met = "met" if best[0] >= removed and best[1] >= accuracy else "MISSED"
            lines.append(f"| {seed} | {best[0]:.1f}% | {best[1]:.2f}% | {best[2]} | {met} |")
    return [*lines, ""]


def describe_speed(here: Records) -> list[str]:
    """CPU time of the last epochs over the second (the first warms up), beside the MACs, of continuous runs."""
    runs = [r for r in here if r["regime"] == "along" and len(r["points"][-1]["epoch_seconds"]) > 4]
    if not runs:
        return []
    lines = ["", "| continuous run | MACs left | CPU time of an epoch at the end / at the start |", "|---|---|---|"]
    for name in dict.fromkeys((r["name"], r["kl_scale"]) for r in runs):
        points = [r["points"][-1] for r in runs if (r["name"], r["kl_scale"]) == name]
        macs = statistics.mean(p["macs"] for p in points)
        clock = statistics.mean(statistics.median(p["epoch_seconds"][-3:]) / p["epoch_seconds"][1] for p in points)
        lines.append(f"| {', '.join(name)} | {macs:.2f} | {clock:.2f} |")
    return lines


def draw_curves(records: Records, path: Path) -> None:
    """Test accuracy against the share removed: panels by network and weight of the KL, lines by score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in filter(is_curve, records):
        panels.setdefault((record["dataset"], record["network"], record["kl_scale"]), []).append(record)
    order = sorted(panels, key=lambda panel: (panel[0] != "mnist", panel[1], panel[2] != "mean", panel[2]))
    columns = min(3, max(1, len(order)))
    size = -(-max(1, len(order)) // columns), columns
    figure, axes = pyplot.subplots(*size, figsize=(5.5 * columns, 3.6 * size[0]), squeeze=False)
    for axis in axes.flat[len(order) :]:
        axis.set_axis_off()
    for axis, (dataset, network, kl) in zip(axes.flat, order, strict=False):
        runs = panels[dataset, network, kl]
        for name in dict.fromkeys(r["name"] for r in runs):
            curves = [r["points"] for r in runs if r["name"] == name]
            shared = set.intersection(*({p["count"] for p in curve} for curve in curves))
            found = [[next(p for p in curve if p["count"] == n) for curve in curves] for n in sorted(shared)]
            x, y = ([statistics.mean(p[key] for p in points) for points in found] for key in ("removed", "test"))
            axis.plot(x, y, "-o" if name in BMRS else "--", markersize=3, linewidth=1.2, label=name)
        axis.set(title=f"{network} on {dataset}, KL {kl}", xlabel="parameters removed, %", ylabel="test accuracy, %")
        if target := TARGETS.get((dataset, network)):
            axis.plot(*target, "k*", markersize=9, label="target")
            axis.set_ylim(max(0, target[1] - 9), 100)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def is_curve(record: Mapping[str, Any]) -> bool:
    """Whether a run is a path of levels."""
    return record["regime"] == "after" and record["name"] != "none"
