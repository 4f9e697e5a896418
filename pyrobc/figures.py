"""The report's figures, as SVG text that takes its ink from the page, be it light or dark (extra ``plots``)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pyrobc.errors import MissingExtraError
from pyrobc.plan import OUTCOMES, Plan

__all__ = ["COLOURS", "draw_calibration", "draw_candidates", "draw_scores", "draw_sensitivity", "draw_training"]

COLOURS = {"keep": "#3f86c9", "prune": "#d27d2d", "abstain": "#9b63b8"}
"""By outcome; of middle lightness, so that they stand out from white and from near-black."""

_MOST_PANELS = 4
_INK = "#010203"  # stands for the page's text colour
_STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.linewidth": 0.7,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}  # fmt: skip


def draw_training(history: Sequence[Mapping[str, float]]) -> str:
    """ELBO in nats, one panel per fit: networks before and after a cut have ELBOs of their own.

    The first tenth of each fit may leave the frame.  Of more than four fits, as when weights are deleted in rounds, all
    but the first share a panel.
    """
    starts = [0, *(i for i in range(1, len(history)) if history[i]["epoch"] <= history[i - 1]["epoch"]), len(history)]
    fits = [history[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    if len(fits) > _MOST_PANELS:
        fits = [fits[0], history[starts[1] :]]
    with _Figure("training", len(fits)) as (axes, drawing):
        for number, (ax, rows) in enumerate(zip(axes, fits, strict=True)):
            elbo = np.array([row["elbo"] for row in rows])
            ax.plot(range(1, len(rows) + 1), elbo, color=COLOURS["keep"], lw=1.4)
            low, high = elbo[len(elbo) // 10 :].min(), elbo.max()
            margin = 0.06 * (high - low) or 1.0
            ax.set(ylim=(low - margin, high + margin), xlabel="epoch", ylabel="" if number else "ELBO (nats)")
            ax.set_title("Re-adapting" if number else "Training", loc="left")
    return drawing.svg


def draw_scores(plan: Plan) -> str:
    """Log Bayes factors of all groups in ascending order, by outcome; undefined ones are counted in the title.

    A baseline has a cut for every block, and is drawn as its distance from there.
    """
    unit = "\u0394F (nats)" if plan.baseline is None else f"{plan.baseline} minus its cut"
    numbers = [block.delta_f if plan.baseline is None else block.log_odds for block in plan.blocks]
    delta_f = np.array([value for block in numbers for value in block])
    outcomes = np.array([outcome for block in plan.blocks for outcome in block.outcomes])
    order = np.argsort(delta_f, kind="stable")
    order = order[np.isfinite(delta_f[order])]
    undefined = len(delta_f) - len(order)
    with _Figure("scores") as ([ax], drawing):
        for outcome in OUTCOMES:
            place = np.flatnonzero(outcomes[order] == outcome)
            if len(place):
                label = f"{outcome} ({(outcomes == outcome).sum()})"
                ax.plot(place, delta_f[order][place], ".", ms=4, color=COLOURS[outcome], label=label)
        ax.set_yscale("symlog", linthresh=1.0)
        ax.axhline(0, color=_INK, lw=0.6)
        ax.set(xlabel="group, in ascending order", ylabel=unit)
        ax.set_title("Scores: larger says prune" + (f"; {undefined} undefined" if undefined else ""), loc="left")
        ax.legend(loc="lower right")
    return drawing.svg


def draw_candidates(candidates: Iterable[Any], plan: Plan) -> str:
    """Predictive density of the nested candidates against their size, the tolerated band, and the one decided on."""
    path = sorted(candidates, key=lambda c: c.parameters)
    full = min(path, key=lambda c: c.num_removed)
    width = plan.rule.get("max_worse", 2.0) * full.se
    size, diff, error = (np.array([getattr(c, k) for c in path]) for k in ("parameters", "diff", "diff_se"))
    with _Figure("candidates") as ([ax], drawing):
        ax.axhspan(-width, width, color=COLOURS["keep"], alpha=0.15, lw=0, label=f"\u00b1{width:.3g} nats: as good")
        ax.errorbar(size, diff, error, color=COLOURS["keep"], fmt="o-", ms=4, lw=1.2, capsize=2)
        for candidate in path:
            if vars(candidate) == plan.evidence.get("checked"):
                ax.plot(candidate.parameters, candidate.diff, "o", ms=9, mfc="none", mew=1.6, color=COLOURS["prune"],
                        label="decided on")  # fmt: skip
        ax.set_xscale("log")
        low = max(min(-width, (diff - error).min()), -8 * width)  # one bad candidate must not flatten the rest
        high = max(width, (diff + error).max())
        ax.set_ylim(low - 0.2 * width, high + 0.2 * width)
        ax.set(xlabel="parameters before re-adapting", ylabel="ELPD minus full (nats)")
        ax.set_title("Evidence along the path of removals", loc="left")
        ax.legend(loc="center right")
    return drawing.svg


def draw_sensitivity(plan: Plan) -> str:
    """Groups that would stay at other thresholds on the log odds: where it is flat, the choice is clear."""
    name = "log odds demanded to prune (nats)" if plan.baseline is None else f"shift of the cuts of {plan.baseline}"
    log_odds = np.array([value for block in plan.blocks for value in block.log_odds])
    thresholds = np.linspace(-6, 6, 121)
    kept = [(~(log_odds > t)).sum() for t in thresholds]
    with _Figure("sensitivity") as ([ax], drawing):
        ax.plot(thresholds, kept, color=COLOURS["keep"], lw=1.4)
        ax.axvline(0, color=COLOURS["prune"], lw=1.2)
        ax.set(xlabel=name, ylabel="groups that stay", ylim=(0, None))
        ax.set_title("Sensitivity of the decision", loc="left")
    return drawing.svg


def draw_calibration(bins: Sequence[Sequence[Any]]) -> str:
    """Accuracy against confidence, before and after; the size of a point tells how many rows it stands for."""
    with _Figure("calibration") as ([ax], drawing):
        ax.plot([0, 1], [0, 1], color=_INK, lw=0.6)
        for part, label, colour in zip(bins, ("before", "after"), (COLOURS["keep"], COLOURS["prune"]), strict=True):
            x, y, rows = (np.array([getattr(b, k) for b in part]) for k in ("confidence", "accuracy", "rows"))
            ax.plot(x, y, color=colour, lw=1.2, label=label)
            ax.scatter(x, y, s=8 + 60 * rows / rows.sum(), color=colour, lw=0)
        ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(-0.03, 1.05))
        ax.set_title("Calibration", loc="left")
        ax.legend(loc="upper left")
    return drawing.svg


class _Figure:
    """One small figure under a style of its own; matplotlib's settings are put back, and no backend is chosen."""

    def __init__(self, name: str, panels: int = 1) -> None:
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError.of("matplotlib", "plots", "figures") from error
        self._name, self._panels = name, panels
        self._context = matplotlib.rc_context(_STYLE | {"svg.hashsalt": name})
        self._make = Figure
        self.svg = ""

    def __enter__(self) -> tuple[Any, _Figure]:
        self._context.__enter__()
        self._figure = self._make(figsize=(4.7, 3.0), layout="constrained")
        self._figure.patch.set_alpha(0.0)
        axes = self._figure.subplots(1, self._panels, squeeze=False)[0]
        for ax in axes:
            ax.patch.set_alpha(0.0)
        return axes, self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        try:
            if kind is None:
                text = io.StringIO()
                self._figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
                self.svg = _make_inline(text.getvalue(), self._name)
        finally:
            self._context.__exit__(kind, value, trace)


def _make_inline(svg: str, name: str) -> str:
    """Drop the XML preamble and fixed size, take the ink from the page, and keep ids apart from other figures'."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
