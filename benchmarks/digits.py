"""The demonstration's numbers: digits, 64-300-100-10, dense against compact, three seeds.

``--choose`` compares settings on the validation rows (the test rows stay unread); without it the chosen settings of
``pyrobc.demo`` run on seeds 0-2 and are measured on the test rows.  Every run is kept in ``runs/digits`` and not
repeated, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks._record import RESULTS, fingerprint, write_result
from pyrobc.compare import measure_error
from pyrobc.decide import decide
from pyrobc.demo import DEFAULT_FAMILY, DEMO_SETTINGS, build_network, compress_digits, load_digits
from pyrobc.export import load
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.scores import score
from pyrobc.surgery import apply, mask

RUNS = Path("runs/digits")
SEEDS = [0, 1, 2]
CHOICES: list[tuple[str, dict[str, Any]]] = [
    (
        family,
        {"epochs": epochs, "lr": 1e-2, "batch_size": 64, "warmup_epochs": warmup}
        | {"family_args": {"num_draws": 8} | settings},
    )
    for family, epochs, warmup, settings in (
        ("group_normal_jeffreys", 160, 80, {}),
        ("group_normal_jeffreys", 240, 80, {"scale_lr": 3.0}),
        ("group_normal_jeffreys", 240, 80, {}),
        ("group_normal_jeffreys", 240, 160, {"scale_lr": 3.0}),
        ("log_uniform", 240, 0, {"gate_lr": 5.0}),
        ("log_uniform", 200, 0, {"gate_lr": 10.0}),
        ("group_horseshoe", 160, 0, {}),
        ("group_horseshoe", 160, 80, {}),
        ("group_horseshoe", 160, 80, {"scale_lr": 3.0}),
    )
]


def run_once(family: str, settings: dict[str, Any], seed: int, split: str) -> dict[str, Any]:
    """One dense and one compact network, errors in percent on ``split``; kept on disk."""
    key = fingerprint({"family": family, "settings": settings, "seed": seed, "split": split})
    path = RUNS / f"{key}.json"
    if path.exists():
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored
    digits = load_digits()
    start = time.perf_counter()
    result = compress_digits(digits, family, settings, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    rows = getattr(digits, split)
    row = {
        "family": family,
        "settings": settings,
        "seed": seed,
        "split": split,
        "dense_error": 100 * measure_error(result.dense, rows, "categorical")[0],
        "compact_error": 100 * measure_error(result.net, rows, "categorical")[0],
        "ratio": result.plan.compression_ratio,
        "widths": [after for _, after in result.plan.widths.values()],
        "seconds": seconds,
        "notes": list(result.plan.notes),
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1))
    print(
        {k: row[k] for k in ("family", "seed", "dense_error", "compact_error", "ratio", "widths", "seconds")},
        flush=True,
    )
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds."""
    return {k: statistics.mean(row[k] for row in rows) for k in ("dense_error", "compact_error", "ratio", "seconds")}


def choose() -> None:
    """Print every candidate's means on the validation rows."""
    for family, settings in CHOICES:
        mean = summarise([run_once(family, settings, seed, "validation") for seed in SEEDS])
        print(family, settings, {key: round(value, 2) for key, value in mean.items()}, flush=True)


def measure() -> None:
    """Run the chosen settings on the test rows and write the result files."""
    rows = []
    for family, settings in DEMO_SETTINGS.items():
        runs = [run_once(family, settings, seed, "test") for seed in SEEDS]
        mean = summarise(runs)
        is_default = family == DEFAULT_FAMILY
        gap = mean["compact_error"] - mean["dense_error"]
        spread = ", ".join(
            f"{run['compact_error']:.2f}/{run['dense_error']:.2f} at {run['ratio']:.0f}x" for run in runs
        )
        name = f"{family}{' (the demo)' if is_default else ''}"
        rows += [
            _row(f"{name}: parameters, dense / compact", mean["ratio"], "x", ">= 40", mean["ratio"] >= 40),
            _row(f"{name}: test error, compact - dense ({spread})", gap, "points", "<= 1.0", gap <= 1.0),
        ]
    seconds, gap = time_demo()
    cut = measure_cut()
    rows += [
        _row("masked network against cut network, test rows, max abs difference", cut, "", "<= 1e-5", cut <= 1e-5),
        _row("`pyrobc demo`, start to report", seconds, "s", "<= 60", seconds <= 60),
        _row("compact network against its reloaded .pt2 and ONNX, max abs difference", gap, "", "<= 1e-5", gap <= 1e-5),
    ]
    write_result("digits", rows, seeds=SEEDS, notes="Mean of three seeds; errors compact/dense in percent per seed.")


def time_demo() -> tuple[float, float]:
    """Seconds of the demonstration as a user runs it, and how far its reloaded files are from its network."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pyrobc", "demo", "--output", folder], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        net, rows = load(folder), load_digits().test[0]
        onnx = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"))
        name = onnx.get_inputs()[0].name
        with torch.no_grad():
            outputs = net(rows).numpy()
        gap = float(np.abs(outputs - onnx.run(None, {name: rows.numpy()})[0]).max())
    return seconds, gap


def measure_cut() -> float:
    """Largest difference between the masked and the cut network on the test rows, cut to a thirtieth."""
    digits = load_digits()
    model = lift(build_network(0), "log_uniform", "categorical", digits.train[0][:1])
    posterior = fit(model, digits.train, epochs=20, lr=1e-2, batch_size=64, progress=False)
    plan = decide(score(posterior), budget=50_610 // 30)
    net = posterior.to_module()
    with torch.no_grad():
        return float((mask(plan, net)(digits.test[0]) - apply(plan, net)(digits.test[0])).abs().max())


def draw() -> None:
    """Draw what the demonstration decided, and why: ``results/digits.png``."""
    import matplotlib.pyplot as plt

    digits = load_digits()
    result = compress_digits(digits, DEFAULT_FAMILY, DEMO_SETTINGS[DEFAULT_FAMILY], seed=0, progress=False)
    log_odds, blocks = result.score.log_odds(), result.plan.blocks
    figure, (pixels, groups, sizes) = plt.subplots(1, 3, figsize=(11, 3.2), width_ratios=(1, 1.5, 1.5))
    pixels.imshow(digits.train[0][7].reshape(8, 8), cmap="Greys", alpha=0.5)
    pruned = np.array([outcome == "prune" for outcome in blocks[0].outcomes]).reshape(8, 8)
    for row, column in zip(*np.nonzero(pruned), strict=True):
        pixels.plot(column, row, "x", color="tab:red", markersize=9)
    pixels.set(title=f"{(~pruned).sum()} of 64 pixels stay", xticks=[], yticks=[])
    for block, label in zip(blocks, ("input", "hidden 1", "hidden 2"), strict=True):
        values = np.sort(log_odds[block.name])[::-1]
        groups.plot(np.linspace(0, 100, len(values)), values, label=f"{label}: {block.size} to {len(block.kept)}")
    groups.axhline(0, color="black", linewidth=0.8)
    groups.set(title="Is the group negligible?", xlabel="groups, %", ylabel="posterior log odds, nats")
    groups.set_yscale("symlog", linthresh=10)
    groups.legend(frameon=False)
    path = result.evidence.candidates
    parameters, rows = [c.parameters for c in path], result.posterior.num_data
    elpd, se = np.array([c.elpd for c in path]) / rows, np.array([c.se for c in path]) / rows
    sizes.axhspan(elpd[0] - 2 * se[0], elpd[0] + 2 * se[0], color="tab:blue", alpha=0.15, label="full network, 2 SE")
    sizes.errorbar(parameters, elpd, se, marker="o", label="nested candidates")
    chosen = result.plan.evidence["checked"]["parameters"]
    sizes.axvline(chosen, color="tab:red", linewidth=0.8, label=f"chosen: {chosen} of {parameters[0]} parameters")
    sizes.set(title="What does removal cost?", xlabel="parameters", ylabel="ELPD-LOO, nats per row", xscale="log")
    sizes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS / "digits.png", dpi=110)


def _row(what: str, value: float, unit: str, target: str, is_met: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit, "target": target, "met": "yes" if is_met else "NO"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choose", action="store_true", help="compare settings on the validation rows")
    parser.add_argument("--picture", action="store_true", help="draw results/digits.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    choose() if arguments.choose else draw() if arguments.picture else measure()
