"""What compression changed: calibration, errors on shifted inputs, bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from pyrobc.diagnose import Diagnosis, Shifted
from pyrobc.figures.canvas import COLOURS, INK, Drawing, draw_on

__all__ = ["draw_bits", "draw_calibration", "draw_shifts"]

_PAIR = (("before", COLOURS["keep"]), ("after", COLOURS["prune"]))
_MOST_LAYERS = 12
_FLOAT_BITS = 32


def draw_calibration(bins: Sequence[Sequence[Any]]) -> Drawing:
    """Accuracy against confidence, before and after; the size of a point tells how many rows it stands for."""
    with draw_on("calibration") as canvas:
        [ax] = canvas.axes
        ax.plot([0, 1], [0, 1], color=INK, lw=0.6)
        for part, (label, colour) in zip(bins, _PAIR, strict=True):
            x, y, rows = (np.array([getattr(b, k) for b in part]) for k in ("confidence", "accuracy", "rows"))
            ax.plot(x, y, color=colour, lw=1.2, label=label)
            ax.scatter(x, y, s=8 + 60 * rows / rows.sum(), color=colour, lw=0)
        ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(-0.03, 1.05))
        ax.set_title("Calibration; larger points: more rows", loc="left")
        ax.legend(loc="upper left")
        canvas.words = "Accuracy against confidence in bins, before and after; a calibrated network is on the diagonal."
    return canvas.drawing


def draw_shifts(diagnosis: Diagnosis) -> Drawing | None:
    """Error before and after as inputs are shifted further, with twice its standard error; None without shifts."""
    plain, rows = diagnosis.shifts[0], sum(b.rows for b in diagnosis.calibration[0])
    kinds = [(kind, [plain, *part]) for kind, part in groupby(diagnosis.shifts[1:], lambda s: s.label.split()[0])]
    if not kinds:
        return None
    with draw_on("shifts", len(kinds), sharey=True) as canvas:
        for ax, (kind, part) in zip(canvas.axes, kinds, strict=True):
            for which, colour in _PAIR:
                error = np.array([getattr(shift, which) for shift in part])
                bars = 200 * np.sqrt(error * (1 - error) / rows)
                ax.errorbar(range(len(part)), 100 * error, bars, color=colour, fmt="o-", ms=3, lw=1.2, label=which)
            ax.set_xticks(range(len(part)), ["0" if kind != "contrast" else "1", *map(_level, part[1:])], fontsize=8)
            ax.set_title(kind, loc="left")
        canvas.axes[0].set(ylabel="error (%)", ylim=(0, None))
        canvas.axes[0].legend(loc="upper left", fontsize=8)
        worst = max(diagnosis.shifts, key=lambda shift: shift.excess)
        canvas.words = (
            f"Error under {', '.join(kind for kind, _ in kinds)}: the compact network suffers most from {worst.label}, "
            f"{100 * worst.excess:+.1f} points more than the network before."
        )
    return canvas.drawing


def _level(shift: Shifted) -> str:
    return shift.label.split()[1].rstrip("\u00b0")


def draw_bits(layers: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Bits of each layer's weights: as they were in float32, what is left in float32, and at the bits they need."""
    layers = [layer for layer in layers if layer["kept"]]
    if not layers or len(layers) > _MOST_LAYERS:
        return None
    counts = [
        ("before, 32 bits each", [_FLOAT_BITS * layer["dense"] for layer in layers], INK, 0.25),
        ("left, 32 bits each", [_FLOAT_BITS * layer["kept"] for layer in layers], COLOURS["keep"], 0.5),
        ("left, at their own bits", [layer["bits"] * layer["kept"] for layer in layers], COLOURS["keep"], 1.0),
    ]
    with draw_on("bits", height=80 + 46 * len(layers)) as canvas:
        [ax] = canvas.axes
        rows = np.arange(len(layers), dtype=float)
        for number, (label, values, colour, alpha) in enumerate(counts):
            ax.barh(rows + 0.27 * (number - 1), values, 0.25, color=colour, alpha=alpha, lw=0, label=label)
        for row, layer in zip(rows, layers, strict=True):
            ax.text(counts[2][1][int(row)], row + 0.27, f" {layer['bits']} bits each", va="center", fontsize=8)
        ax.set_xscale("log")
        least = min(counts[2][1])
        ax.set(xlabel="bits of the layer's weights", ylim=(len(layers) - 0.4, -0.6),
               xlim=(10 ** math.floor(math.log10(least) - 0.01), 3 * max(counts[0][1])))  # fmt: skip
        ax.set_yticks(rows, [layer["name"] for layer in layers], fontsize=8)
        canvas.figure.legend(loc="outside upper left", ncols=1, fontsize=8)
        canvas.words = "Bits of each layer's weights: " + "; ".join(
            f"{layer['name']} {layer['dense']:,} at 32 before, {layer['kept']:,} at {layer['bits']} after"
            for layer in layers
        )
    return canvas.drawing
