"""Read the test rows once, decode every file of the comparison of methods, and write its table and its plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._mnist import Rows, load_test
from benchmarks._record import describe_earlier, describe_run, gather_points, print_run
from pyrobc.codec import unpack
from pyrobc.compare import count_macs
from pyrobc.diagnose import diagnose

__all__ = ["count_clusters", "write_report"]

INTRODUCTION = (
    "Every method starts from the same dense network of its seed (the recipe trains its own, under its penalties).  "
    "`floats`: what the method itself leaves, in 32 bits; `own`: the same moved at once to grids of 2.5 posterior "
    "widths, too coarse a step for most (self-compression's variances are those of kernels, not of weights); numbers:"
    " after deletions to so many weights and biases, which re-adapt.  For the recipe a stop is the share of all "
    "numbers in percent.  Bytes are of `.rbc` files that decode to the network.  MACs are those of the cut network, "
    "zeros multiplied too; clusters are runs of weights that are not zero along the inputs of an output, in the order"
    " of the file.  Means over seeds, errors with their range; NLL in nats a row, ECE over 15 bins.  Seconds are from"
    " one stop to the next on one thread, those of a resumed run its last part.  Settings were chosen on validation "
    "rows of LeNet-300-100; the command below alone read the test rows."
)
NUMBERS = (
    "test_error", "validation_error", "parameters", "nonzero", "macs", "bytes", "clusters", "nll", "ece", "seconds",
)  # fmt: skip
RUN = ("method", "seed", "epochs", "kl")  # what tells one run from another
SHOWN_ERROR = 6.0  # percent, where the plot ends


def write_report(
    runs: Path,
    data: Path,
    networks: Mapping[str, tuple[Any, tuple[int, ...]]],
    methods: Sequence[str],
    settings: Mapping[str, Any],
    to: Path,
) -> None:
    """``methods_mnist.json``, ``.md`` and ``.png`` in the folder ``to`` from every file below ``runs``.

    Runs that the result of an earlier call has, and that were not run to the end here, keep their numbers.
    """
    found: dict[str, Any] = {}
    before = json.loads(path.read_text()) if (path := to / "methods_mnist.json").exists() else {}
    lines = ["# methods_mnist", "", INTRODUCTION, ""]
    for name, (build, shape) in networks.items():
        stored = before.get("networks", {}).get(name, {}).get("points", [])
        if not stored and not (runs / name).is_dir():
            continue
        test = load_test(data, shape)
        dense = {file.stem: read_dense(file, build) for file in sorted((runs / name).glob("dense-*.pt"))}
        read = partial(read_point, dense=dense, test=test)
        points = gather_points((runs / name).glob("*-kl*"), read, stored, RUN, before.get("date", ""))
        if points:
            found[name] = {"points": points, "means": average(points, methods)}
            lines += tabulate(name, build, points, found[name]["means"])
            if earlier := describe_earlier(points, lambda p: f"{p['method']} at x{p['epochs']:g}, KL x{p['kl']:g}"):
                lines += [earlier, ""]
    seeds = sorted({p["seed"] for network in found.values() for p in network["points"]})
    record = describe_run("methods_mnist", seeds, "--data FOLDER")
    lines += print_run(record)
    to.mkdir(exist_ok=True)
    (to / "methods_mnist.json").write_text(json.dumps(record | {"settings": settings, "networks": found}, indent=1))
    (to / "methods_mnist.md").write_text("\n".join(lines) + "\n")
    draw(found, methods, to)
    print("\n".join(lines))


def read_dense(file: Path, build: Any) -> nn.Module:
    """The dense network of a seed."""
    net: nn.Module = build()
    net.load_state_dict(torch.load(file, weights_only=True))
    return net.eval()


def read_point(file: Path, dense: Mapping[str, nn.Module], test: Rows) -> dict[str, Any]:
    """One network: its record, and what the decoded file does on test rows."""
    record: dict[str, Any] = json.loads(file.read_text())
    coded = file.with_suffix(".rbc")
    net = unpack(coded)
    seen = diagnose(dense[f"dense-{record['seed']}"], net, test, shifts=())
    return record | {
        "bytes": coded.stat().st_size,
        "parameters": sum(p.numel() for p in net.parameters()),
        "macs": count_macs(net, test[0][:1]),
        "clusters": count_clusters(net),
        "test_error": 100 * seen.after["error"],
        "dense_error": 100 * seen.before["error"],
        "nll": seen.after["nll"],
        "ece": seen.after["ece"],
    }


def count_clusters(net: nn.Module) -> int:
    """Runs of weights that are not zero along the inputs of each output, over all layers."""
    total = 0
    for weight in (p for p in net.parameters() if p.dim() > 1):
        mask = weight.detach().flatten(1) != 0
        total += int(mask[:, 0].sum()) + int((mask[:, 1:] & ~mask[:, :-1]).sum())
    return total


def average(points: Sequence[dict[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Means over seeds of every stop of every method, at each scale of epochs and KL, from many bytes to few."""
    names = ("method", "epochs", "kl", "stop")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault(tuple(point[name] for name in names), []).append(point)
    rows = []
    for key, members in groups.items():
        errors = [p["test_error"] for p in members]
        rows.append(
            dict(zip(names, key, strict=True))
            | {"seeds": sorted(p["seed"] for p in members)}
            | {key: statistics.mean(p[key] for p in members) for key in NUMBERS}
            | {"low": min(errors), "high": max(errors)}
        )
    return sorted(rows, key=lambda row: (methods.index(row["method"]), row["epochs"], row["kl"], -row["bytes"]))


def tabulate(name: str, build: Any, points: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]]) -> list[str]:
    """One table."""
    count = sum(p.numel() for p in build().parameters())
    errors = {p["seed"]: p["dense_error"] for p in points}
    listed = ", ".join(f"{error:.2f} (seed {seed})" for seed, error in sorted(errors.items()))
    lines = [f"## {name}", "", f"Dense: {count:,} parameters, {4 * count:,} bytes, test error {listed} %.", ""]
    lines.append(
        "| method | epochs | KL | stop | seeds | test error, % | parameters | not zero | MACs | bytes | ratio "
        "| clusters | NLL | ECE | s |"
    )
    lines.append("|---" * 15 + "|")
    for m in means:
        seeds = ", ".join(map(str, m["seeds"]))
        lines.append(
            f"| {m['method']} | x{m['epochs']:g} | x{m['kl']:g} | {m['stop']} | {seeds} "
            f"| {m['test_error']:.2f} ({m['low']:.2f}-{m['high']:.2f}) | {m['parameters']:,.0f} | {m['nonzero']:,.0f} "
            f"| {m['macs']:,.0f} | {m['bytes']:,.0f} | {4 * count / m['bytes']:,.0f}x | {m['clusters']:,.0f} "
            f"| {m['nll']:.3f} | {m['ece']:.4f} | {m['seconds']:.0f} |"
        )
    return [*lines, ""]


def find_frontier(means: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points than which no other has fewer bytes and no more *validation* errors, from few bytes to many."""
    chosen: list[dict[str, Any]] = []
    for point in sorted(means, key=lambda m: (m["bytes"], m["validation_error"])):
        if not chosen or point["validation_error"] < chosen[-1]["validation_error"]:
            chosen.append(point)
    return chosen


def draw(networks: Mapping[str, Any], methods: Sequence[str], to: Path) -> None:
    """Error against bytes: a panel for every network, for every method a line through its frontier of grids."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, max(1, len(networks)), figsize=(6 * max(1, len(networks)), 4.6), squeeze=False)
    for axis, (name, found) in zip(axes[0], networks.items(), strict=False):
        for number, method in enumerate(methods):
            line = find_frontier([m for m in found["means"] if m["method"] == method and m["stop"] != "floats"])
            shown = [m for m in line if m["test_error"] <= SHOWN_ERROR]
            axis.plot(
                [m["bytes"] for m in shown], [m["test_error"] for m in shown], "os^"[number % 3] + "-", label=method,
                color=plt.get_cmap("tab20")(number), linewidth=1, markersize=4,
            )  # fmt: skip
        axis.set(title=name.replace("_", "-"), xlabel="bytes of the file", ylabel="test error, %")
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(to / "methods_mnist.png", dpi=110)
    plt.close(figure)
