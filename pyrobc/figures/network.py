"""Widths before and after, drawn as a network."""

from __future__ import annotations

import numpy as np

from pyrobc.figures.canvas import COLOURS, INK, POINTS_WIDE, Drawing, draw_on
from pyrobc.plan import Plan

__all__ = ["draw_network"]

_BAR = 0.24
_POINTS_PER_LAYER = 52


def draw_network(plan: Plan) -> Drawing:
    """A column for every block, as high as the root of its width; what is left of it in colour.

    Areas between columns stand for the weights between blocks.  The last column, where the plan knows it, is the
    network's outputs, which no plan prunes.
    """
    layers = [(name, before, after) for name, (before, after) in plan.widths.items()]
    outputs = _count_outputs(plan)
    if outputs is not None:
        layers.append(("output", outputs, outputs))
    width = max(POINTS_WIDE, _POINTS_PER_LAYER * len(layers))
    with draw_on("network", width=width, height=190) as canvas:
        [ax] = canvas.axes
        heights = np.sqrt([[before, after] for _, before, after in layers])
        for column, alpha_bar, alpha_area, colour in ((0, 0.22, 0.07, INK), (1, 1.0, 0.3, COLOURS["keep"])):
            half = heights[:, column] / 2
            for i in range(len(layers) - 1):
                x, up = [i + _BAR / 2, i + 1 - _BAR / 2], half[i : i + 2]
                ax.fill_between(x, up, -up, color=colour, alpha=alpha_area, lw=0)
            ax.bar(range(len(layers)), 2 * half, _BAR, bottom=-half, color=colour, alpha=alpha_bar, lw=0)
        top = heights.max() / 2
        for i, (name, before, after) in enumerate(layers):
            text = f"{before:,}" if before == after else f"{before:,}\u2192{after:,}"
            ax.text(i, heights[i, 0] / 2 + 0.04 * top, text, ha="center", va="bottom")
            ax.text(i, -1.08 * top, _shorten(name), ha="center", va="top", fontsize=8)
        ax.set(xlim=(-0.55, len(layers) - 0.45), ylim=(-1.3 * top, 1.18 * top))
        ax.axis("off")
        canvas.words = "Widths before and after: " + ", ".join(f"{n} {b} to {a}" for n, b, a in layers) + "."
    return canvas.drawing


def _count_outputs(plan: Plan) -> int | None:
    """Rows of the last weight, if nothing prunes them."""
    weights = [name for name, shape in plan.network.items() if len(shape) > 1]
    pruned = {part.tensor for part in plan.slices if part.axis == 0}
    order = [part.tensor for part in plan.slices]
    reading = [name for name in weights if name in order and name not in pruned]
    return plan.network[reading[-1]][0] if len(reading) == 1 else None


def _shorten(name: str, longest: int = 12) -> str:
    return name if len(name) <= longest else f"\u2026{name[1 - longest :]}"
