"""Where the posterior of a group's multiplier lies, against the edge of its ROPE."""

from __future__ import annotations

import numpy as np

from pyrobc.arviz_io import find_hdi
from pyrobc.evidence import Evidence
from pyrobc.figures.canvas import COLOURS, INK, Drawing, draw_on
from pyrobc.plan import Plan

__all__ = ["draw_forest"]

_MOST_ROWS = 16
_FLOOR, _CEILING = -6.0, 6.0  # powers of ten of the edge: beyond them all is said


def draw_forest(plan: Plan, evidence: Evidence, probability: float = 0.95) -> Drawing | None:
    r"""Medians and highest-density intervals of the groups nearest to the threshold of the decision.

    In units of each group's own edge, :math:`|z_g| / t_g`, so that one line separates what is negligible from what is
    not; intervals are those of the logarithm.  None where no multiplier varies, or the plan has other groups.
    """
    tree, labels = evidence.tree, [f"{b.name}[{i}]" for b in plan.blocks for i in range(b.size)]
    place = {str(name): i for i, name in enumerate(tree["bmr"]["group"].to_numpy())}
    draws = tree["posterior"]["multiplier"].to_numpy()
    draws = draws.reshape(-1, draws.shape[-1])
    if not place.keys() <= set(labels) or not (np.ptp(draws, axis=0) > 0).any():
        return None
    outcomes = dict(zip(labels, (o for b in plan.blocks for o in b.outcomes), strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log10(np.abs(draws) / tree["bmr"]["threshold"].to_numpy())
    log_odds = tree["bmr"]["log_odds"].to_numpy()
    known = [n for n, i in place.items() if np.isfinite(log_odds[i]) and not np.isnan(ratio[:, i]).any()]
    names = sorted(known, key=lambda name: abs(log_odds[place[name]]))[:_MOST_ROWS]
    if not names:
        return None
    names.sort(key=lambda name: -log_odds[place[name]])
    chosen = np.clip(ratio[:, [place[name] for name in names]], _FLOOR, _CEILING)
    bounds, middle = find_hdi(chosen, probability), np.median(chosen, axis=0)
    with draw_on("forest", height=64 + 10 * len(names)) as canvas:
        [ax] = canvas.axes
        for row, name in enumerate(names):
            colour = COLOURS[outcomes[name]]
            ax.plot(10.0 ** bounds[row], [row, row], color=colour, lw=1.6, solid_capstyle="butt")
            ax.plot(10.0 ** middle[row], row, "o", ms=4, color=colour)
        for outcome in dict.fromkeys(outcomes[name] for name in names):
            ax.plot([], [], "o-", ms=4, color=COLOURS[outcome], label=outcome)
        ax.axvline(1.0, color=INK, lw=0.8, ls=":")
        ax.set_xscale("log")
        ax.set_yticks(range(len(names)), names, fontsize=7.5)
        ax.set(xlabel="multiplier, in units of its ROPE's edge", ylim=(-0.7, len(names) - 0.3))
        ax.set_title(f"Posterior of the closest calls: median, {probability:.0%} HDI", loc="left")
        ax.legend(loc="lower right", fontsize=8)  # where needed groups, whose intervals reach far, are not
        canvas.words = (
            f"Medians and {probability:.0%} intervals of the multipliers of the {len(names)} groups nearest to the "
            "threshold, against the edge below which each is negligible."
        )
    return canvas.drawing
