"""Whether the numbers can be trusted: the fit, the candidates, and k-hat of rows and of groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pyrobc.bmr.pareto import khat_limit
from pyrobc.evidence import Evidence
from pyrobc.figures.canvas import COLOURS, INK, Drawing, draw_on
from pyrobc.plan import Plan
from pyrobc.plan_fields import OUTCOMES

__all__ = ["draw_candidates", "draw_khats", "draw_training"]

_MOST_PANELS = 4
_CHANGE_DRAWS = 1000  # draws behind k-hat of each change of prior, at least
_HIGHEST_KHAT = 3.0


def draw_training(history: Sequence[Mapping[str, float]]) -> Drawing:
    """ELBO in nats, one panel per fit: networks before and after a cut have ELBOs of their own.

    The first tenth of each fit may leave the frame.  Of more than four fits, as when weights are deleted in rounds, all
    but the first share a panel.
    """
    starts = [0, *(i for i in range(1, len(history)) if history[i]["epoch"] <= history[i - 1]["epoch"]), len(history)]
    fits = [history[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    if len(fits) > _MOST_PANELS:
        fits = [fits[0], history[starts[1] :]]
    with draw_on("training", len(fits)) as canvas:
        ends = []
        for number, (ax, rows) in enumerate(zip(canvas.axes, fits, strict=True)):
            elbo = np.array([row["elbo"] for row in rows])
            ax.plot(range(1, len(rows) + 1), elbo, color=COLOURS["keep"], lw=1.4)
            low, high = elbo[len(elbo) // 10 :].min(), elbo.max()
            margin = 0.06 * (high - low) or 1.0
            ax.set(ylim=(low - margin, high + margin), xlabel="epoch", ylabel="" if number else "ELBO (nats)")
            ax.set_title("Re-adapting" if number else "Training", loc="left")
            ends.append(f"{len(rows)} epochs, to {elbo[-1]:.5g} nats")
        canvas.words = f"ELBO of {len(fits)} fits: {'; '.join(ends)}."
    return canvas.drawing


def draw_candidates(candidates: Iterable[Any], plan: Plan) -> Drawing:
    """Predictive density of the nested candidates against their size, the tolerated band, and the one decided on."""
    path = sorted(candidates, key=lambda c: c.parameters)
    full = min(path, key=lambda c: c.num_removed)
    width = plan.rule.get("max_worse", 2.0) * full.se
    size, diff, error = (np.array([getattr(c, k) for c in path]) for k in ("parameters", "diff", "diff_se"))
    with draw_on("candidates") as canvas:
        [ax] = canvas.axes
        ax.axhspan(-width, width, color=COLOURS["keep"], alpha=0.15, lw=0, label=f"\u00b1{width:.3g} nats: as good")
        finite = np.isfinite(diff)
        ax.errorbar(size[finite], diff[finite], error[finite], color=COLOURS["keep"], fmt="o-", ms=4, lw=1.2, capsize=2)
        chosen = [c for c in path if vars(c) == plan.evidence.get("checked")]
        for candidate in chosen:
            ax.plot(candidate.parameters, candidate.diff, "o", ms=9, mfc="none", mew=1.6, color=COLOURS["prune"],
                    label="decided on")  # fmt: skip
        if not chosen:
            ax.axvline(plan.parameters[1], color=COLOURS["prune"], lw=1.2, ls="--", label="decided on")
        ax.set_xscale("log")
        low = max(min(-width, (diff - error)[finite].min()), -8 * width)  # one bad candidate must not flatten the rest
        high = max(width, (diff + error)[finite].max())
        ax.set_ylim(low - 0.2 * width, high + 0.2 * width)
        ax.set(xlabel="parameters before re-adapting", ylabel="ELPD minus full (nats)")
        ax.set_title("Evidence along the path of removals", loc="left")
        ax.legend(loc="best")
        canvas.words = "ELPD minus that of the full network: " + "; ".join(
            f"{c.parameters:,} parameters {c.diff:.3g} \u00b1 {c.diff_se:.2g} nats" for c in path if np.isfinite(c.diff)
        )
    return canvas.drawing


def draw_khats(evidence: Evidence, plan: Plan) -> Drawing | None:
    """k-hat of leave-one-out for each row, and of the change of prior for each group; None where there is neither.

    Above its limit an estimate is not to be trusted.  Infinite ones, and those above three, sit on the upper edge.
    """
    tree = evidence.tree
    rows = tree["pointwise"]["khat"].to_numpy()
    removed = [candidate.num_removed for candidate in evidence.candidates]
    decided = plan.evidence.get("checked", {}).get("num_removed")
    shown = {"full": 0, "decided on": removed.index(decided) if decided in removed else 0}
    groups = tree["bmr"]["khat"].to_numpy()
    known = np.flatnonzero(~np.isnan(groups))
    has_rows, limit = bool(np.isfinite(evidence.good_k)), khat_limit(_CHANGE_DRAWS)
    if not has_rows and not len(known):
        return None
    words, outcomes = [], {f"{b.name}[{i}]": outcome for b in plan.blocks for i, outcome in enumerate(b.outcomes)}
    with draw_on("khat", int(has_rows) + bool(len(known)), sharey=True) as canvas:
        axes = iter(canvas.axes)
        if has_rows:
            ax = next(axes)
            for (label, which), colour in zip(shown.items(), (COLOURS["keep"], COLOURS["prune"]), strict=True):
                if label == "full" or which:
                    values = np.sort(rows[which])
                    bad = float((values > evidence.good_k).mean())
                    ax.plot(np.linspace(0, 100, len(values)), _clip(values), color=colour, lw=1.6, label=label)
                    words.append(f"{bad:.0%} of the rows of the {label} network are above {evidence.good_k:.2g}")
            ax.axhline(evidence.good_k, color=INK, lw=0.8, ls=":")
            ax.set(xlabel="rows (%), sorted", ylabel="k-hat")
            ax.set_title("Leave-one-out", loc="left")
            ax.legend(loc="best", fontsize=8)
        if len(known):
            ax = next(axes)
            order = known[np.argsort(tree["bmr"]["log_odds"].to_numpy()[known], kind="stable")]
            said = np.array([outcomes.get(str(name), "keep") for name in tree["bmr"]["group"].to_numpy()[order]])
            for outcome in OUTCOMES:
                place = np.flatnonzero(said == outcome)
                ax.plot(place, _clip(groups[order][place]), ".", ms=4, color=COLOURS[outcome], label=outcome)
            ax.axhline(limit, color=INK, lw=0.8, ls=":")
            ax.set(xlabel="group, by rising log odds")
            ax.set_title("Change of prior", loc="left")
            bad = int((groups[known] > limit).sum())
            words.append(f"{bad} of {len(known)} changes of prior are above {limit:.2g}")
        canvas.axes[0].set(ylim=(min(-0.5, *(ax.get_ylim()[0] for ax in canvas.axes)), _HIGHEST_KHAT + 0.15),
                           ylabel="k-hat")  # fmt: skip
        canvas.words = f"k-hat: {'; '.join(words)}."
    return canvas.drawing


def _clip(khat: Any) -> Any:
    return np.clip(khat, -1.0, _HIGHEST_KHAT)
