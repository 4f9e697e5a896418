"""Why each group stays or leaves: its score, and what other settings would have decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyrobc.figures.canvas import COLOURS, INK, Drawing, draw_on
from pyrobc.plan import Plan
from pyrobc.plan_fields import OUTCOMES
from pyrobc.sensitivity import Sensitivity

__all__ = ["draw_odds_sensitivity", "draw_rope_sensitivity", "draw_scores"]

_MOST_LINES = 6
_LINES = ("#3f86c9", "#d27d2d", "#9b63b8", "#3f9d6b", "#c9577e", "#9a8a3c")


def draw_scores(plan: Plan) -> Drawing:
    """Log Bayes factors of all groups in ascending order, by outcome, with twice their Monte Carlo errors.

    Undefined ones are counted in the title.  A baseline has a cut for every block, and is drawn as its distance from
    there.
    """
    unit = "\u0394F (nats)" if plan.baseline is None else f"{plan.baseline} minus its cut"
    numbers = [block.delta_f if plan.baseline is None else block.log_odds for block in plan.blocks]
    delta_f = np.array([value for block in numbers for value in block])
    error = 2 * np.array([value for block in plan.blocks for value in block.mcse])
    outcomes = np.array([outcome for block in plan.blocks for outcome in block.outcomes])
    order = np.argsort(delta_f, kind="stable")
    order = order[np.isfinite(delta_f[order])]
    undefined = len(delta_f) - len(order)
    counts = {outcome: int((outcomes == outcome).sum()) for outcome in OUTCOMES}
    with draw_on("scores") as canvas:
        [ax] = canvas.axes
        for outcome in OUTCOMES:
            place = np.flatnonzero(outcomes[order] == outcome)
            if len(place):
                chosen, style = order[place], {"color": COLOURS[outcome]}
                ax.plot(place, delta_f[chosen], ".", ms=4, label=f"{outcome} ({counts[outcome]})", **style)
                if np.nan_to_num(error[chosen], posinf=0).any():
                    bars = np.where(np.isfinite(error[chosen]), error[chosen], 0)
                    ax.errorbar(place, delta_f[chosen], bars, fmt="none", lw=0.8, **style)
        ax.set_yscale("symlog", linthresh=1.0)
        ax.axhline(0, color=INK, lw=0.6)
        ax.set(xlabel="group, in ascending order", ylabel=unit)
        ax.set_title("Scores: larger says prune" + (f"; {undefined} undefined" if undefined else ""), loc="left")
        if len(order):
            ax.legend(loc="lower right")
        says = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        canvas.words = f"{unit} of {len(delta_f)} groups in ascending order: {says}; {undefined} undefined."
    return canvas.drawing


def draw_odds_sensitivity(plan: Plan) -> Drawing:
    """Groups that would stay at other thresholds on the log odds: where it is flat, the choice is clear."""
    name = "log odds demanded to prune (nats)" if plan.baseline is None else f"shift of the cuts of {plan.baseline}"
    thresholds = np.linspace(-6, 6, 121)
    kept = {b.name: [int((~(np.array(b.log_odds) > t)).sum()) for t in thresholds] for b in plan.blocks}
    with draw_on("odds") as canvas:
        [ax] = canvas.axes
        low, high = _draw_kept(ax, thresholds, kept, 0.0)
        ax.set(xlabel=name, ylabel="groups that stay")
        ax.set_title("Sensitivity to the odds", loc="left")
        canvas.words = f"Groups that stay fall from {high} to {low} as the {name} move from 6 to -6."
    return canvas.drawing


def draw_rope_sensitivity(found: Sensitivity) -> Drawing:
    """Groups that would stay at other epsilons, the share below which a group is negligible."""
    with draw_on("rope") as canvas:
        [ax] = canvas.axes
        low, high = _draw_kept(ax, np.array(found.epsilon), found.kept, found.chosen)
        ax.set_xscale("log")
        ax.set(xlabel="\u03b5: negligible share of the next layer's input", ylabel="groups that stay")
        ax.set_title("Sensitivity to the ROPE", loc="left")
        ends = f"{found.epsilon[0]:.2g} to {found.epsilon[-1]:.2g}"
        canvas.words = f"Between {low} and {high} groups stay for epsilon from {ends}; {found.chosen:g} was chosen."
    return canvas.drawing


def _draw_kept(ax: Any, x: Any, kept: Mapping[str, Sequence[int]], chosen: float) -> tuple[int, int]:
    """A line for every block, or one for all where there are many; the smallest and the largest sum."""
    total, room = np.sum([list(counts) for counts in kept.values()], axis=0), 1.08
    if 1 < len(kept) <= _MOST_LINES:
        for (name, counts), colour in zip(kept.items(), _LINES, strict=False):
            ax.plot(x, counts, color=colour, lw=1.4, label=name)
        ax.plot(x, total, color=INK, lw=0.8, label="all")
        ax.legend(loc="upper center", fontsize=8, ncols=4, columnspacing=1.2)
        room += 0.12 * ((len(kept) + 4) // 4)  # for the legend's rows, above all lines
    else:
        ax.plot(x, total, color=COLOURS["keep"], lw=1.4)
    ax.axvline(chosen, color=INK, lw=0.7, ls=":")
    ax.set_ylim(0, room * max(total.max(), 1))
    return int(total.min()), int(total.max())
