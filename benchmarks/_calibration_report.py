"""From kept runs of the calibration to the rows of its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks._calibration_planted import FAMILIES, LEVELS
from benchmarks._record import write_result

__all__ = ["report"]

Row = dict[str, Any]


def report(folder: Path, num_seeds: int, parts: list[str], is_written: bool = True) -> None:
    """Write the rows of everything that was measured; in a smoke run only make them."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    by_part = {part: [run for run in runs if run["part"] == part] for part in parts}
    rows = []
    for family in FAMILIES:
        some = [run for run in by_part["regression"] if run["family"] == family]
        rows += _report_regression(family, some) if some else []
    rows += _report_nuts(by_part["nuts"]) if by_part["nuts"] else []
    for family in FAMILIES:
        some = [run for run in by_part["teacher"] if run["family"] == family]
        rows += _report_teacher(family, some) if some else []
    for family, epochs in sorted({(run["family"], run["epochs"]) for run in by_part["change"]}):
        some = [run for run in by_part["change"] if (run["family"], run["epochs"]) == (family, epochs)]
        rows += _report_change(f"{family}, {epochs} epochs", some)
    rows += [row for run in by_part["labels"] for row in _report_labels(run)]
    rows += [row for run in by_part["noise"] for row in _report_noise(run)]
    planted = {run["seed"] for run in by_part["regression"]}
    missing = [part for part in parts if not by_part[part]]
    minutes = sum(run["seconds"] for run in runs) / 60
    places = sorted({run["place"] for run in runs})
    notes = (
        "Planted truth and realised changes; every fit that was run counts, and no setting was chosen on one of them.  "
        f"{len(planted)} of {num_seeds} seeds of the regression, {len(runs)} jobs, {minutes:.0f} minutes of one "
        f"thread on {'; '.join(places)}.  A dash is a rate of nothing pruned, or no target."
    )
    notes += f"  Not run: {', '.join(missing)}." if missing else ""
    if is_written:
        options = f"--families {' '.join(f for f in FAMILIES if any(run['family'] == f for run in runs))}"
        write_result(
            "decision_calibration", rows, seeds=sorted({run["seed"] for run in runs}), notes=notes, options=options
        )
    else:
        print(f"{len(rows)} rows, not written")


def _report_regression(family: str, runs: list[Row]) -> list[Row]:
    large = [run for run in runs if run["rows"] >= 200]
    rows = []
    if large:
        lost, gone = (np.array([run["rules"]["default"][i] for run in large]) for i in (0, 1))
        kept, pruned = 1 - lost.sum() / (6 * len(large)), gone.sum() / (34 * len(large))
        label = f"regression, {family}, default rule, {len(large)} fits of 200 and 400 rows"
        rows += [
            _row(f"{label}: active inputs kept", 100 * kept, "%", ">= 98", kept >= 0.98),
            _row(f"{label}: inactive inputs pruned", 100 * pruned, "%", ">= 95", pruned >= 0.95),
        ]
    for count in sorted({run["rows"] for run in runs}):
        some = [run for run in runs if run["rows"] == count]
        for level in LEVELS:
            counts = np.array([run["rules"][f"fdr {level:g}"] for run in some])
            shares = counts[:, 0] / np.maximum(counts[:, :2].sum(1), 1)
            error = shares.std(ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else np.nan
            text = (
                f"regression, {family}, {count} rows, {len(some)} seeds: realised false-prune rate "
                f"(standard error {error:.2g}, inactive pruned {counts[:, 1].mean() / 34:.0%})"
            )
            is_empty = counts[:, :2].sum() == 0  # a rate of zero that nothing was risked for shows nothing
            is_met = None if is_empty else bool(shares.mean() <= level + 2 * np.nan_to_num(error))
            rows.append(_row(text, shares.mean(), "", f"<= {level:g} within 2 errors", is_met))
    return rows


def _report_nuts(runs: list[Row]) -> list[Row]:
    """Chains pooled; what they disagree by among themselves says how far to trust the comparison."""
    first = runs[0]
    is_active = np.isin(np.arange(40), first["active"])
    inside, slopes, spreads = (np.array([run[key] for run in runs]) for key in ("inside", "slopes", "spreads"))
    mass, own = inside.mean(0), np.array(first["svi_inside"])
    label = f"NUTS beside SVI, {first['family']}, {first['rows']} rows, {len(runs)} chains of {first['draws']} draws"
    within = np.abs(inside - mass).mean() if len(runs) > 1 else np.nan
    counts = [[int((m > 0.5)[part].sum()) for part in (is_active, ~is_active)] for m in (mass, own)]
    gap = np.abs(slopes.mean(0) - np.array(first["svi_slopes"])) / spreads.mean(0)
    return [
        _row(f"{label}: mean |mass of the ROPE, NUTS - SVI|, chains from their mean {within:.2g}",
             np.abs(mass - own).mean(), "", "none", None),
        _row(f"the same: inputs on which the sign of the odds agrees (pruned of 6 active, 34 inactive: NUTS "
             f"{counts[0]}, SVI {counts[1]})", int(((mass > 0.5) == (own > 0.5)).sum()), "of 40", "none", None),
        _row("the same: largest |slope, NUTS - SVI| in posterior standard deviations, active inputs",
             gap[is_active].max(), "", "none", None),
        _row("the same: mean mass of the ROPE of inactive inputs, NUTS", mass[~is_active].mean(), "", "none", None),
        _row("the same: mean mass of the ROPE of inactive inputs, SVI", own[~is_active].mean(), "", "none", None),
    ]  # fmt: skip


def _report_teacher(family: str, runs: list[Row]) -> list[Row]:
    kept = [run["kept"] for run in runs]
    share = np.mean([3 <= k <= 5 for k in kept])
    rmse = [run["rmse"] for run in runs]
    text = (
        f"teacher of 3 in 16, {family}, {len(runs)} seeds: fits with 3 to 5 units "
        f"(kept {kept}; test RMSE {min(rmse):.2f} to {max(rmse):.2f})"
    )
    return [_row(text, 100 * share, "%", "100", share == 1)]


def _report_change(name: str, runs: list[Row]) -> list[Row]:
    """All sets; sets whose k-hat is good; and those with a group that odds keep apart.

    Sets that odds would remove whole have a ΔF of about zero, whose order is noise: what counts is that the realised
    changes are as the divergence they spare.
    """
    keys = ("delta_f", "elbo_gain", "early", "realised", "khat", "size", "wanted")
    delta_f, gain, early, realised, khat, size, wanted = (np.concatenate([run[key] for run in runs]) for key in keys)
    limit = runs[0]["good_k"]
    is_good, is_needed = khat <= limit, wanted < size
    label = f"digits, {name}, {len(gain)} sets"
    rows = []
    predictions = {
        "the sum of the groups' ΔF": delta_f,
        "the ELBO of the reduced posterior, from draws": gain,
        "the ELBO after a twelfth of the epochs": early,
    }
    for what, predicted in predictions.items():
        value = spearmanr(predicted, realised)[0]
        text = f"{label}: Spearman of predicted and realised change of the ELBO; predicted by {what}"
        rows.append(_row(text, value, "", ">= 0.8", value >= 0.8))
        if is_needed.sum() > 2:
            value = spearmanr(predicted[is_needed], realised[is_needed])[0]
            rows.append(
                _row(f"the same of the {is_needed.sum()} sets with a group that odds keep", value, "", "none", None)
            )
        if is_good.sum() > 2:
            value = spearmanr(predicted[is_good], realised[is_good])[0]
            rows.append(_row("the same without sets of a bad k-hat", value, "", ">= 0.8", value >= 0.8))
    rows += [
        _row(f"{label}: sets whose reduced posterior covers that of the reduced model (k-hat <= {limit:.2f}; from "
             f"{khat.min():.2f} to {khat.max():.2f})", int(is_good.sum()), f"of {len(gain)}", "none", None),
        _row(f"{label}: k-hat of the whole fit", runs[0]["posterior_khat"], "", "none", None),
    ]  # fmt: skip
    return rows


def _report_labels(run: Row) -> list[Row]:
    is_said = any("worthless" in note for note in run["notes"])
    gain, error = run["gain"]
    text = (
        f"digits with random labels, {run['family']}: parameters left (widths {run['widths']}; said to be worthless: "
        f"{'yes' if is_said else 'no'}, ELPD above label frequencies by {gain:.3g}, SE {error:.2g})"
    )
    is_met = run["left"] <= 0.05 or (run["abstained"] > 0.5 and is_said)
    return [_row(text, 100 * run["left"], "%", "<= 5, or most undecided and said to be worthless", is_met)]


def _report_noise(run: Row) -> list[Row]:
    dense, compact = run["errors"]
    text = f"digits and 64 noise inputs, {run['family']}: noise inputs pruned ({run['signal_kept']} of 64 pixels kept)"
    return [
        _row(text, 100 * run["noise_pruned"], "%", ">= 95", run["noise_pruned"] >= 0.95),
        _row(f"the same: test error, compact - dense ({compact:.2f}/{dense:.2f})", compact - dense, "points", "<= 1.0",
             compact - dense <= 1.0),
    ]  # fmt: skip


def _row(what: str, value: float, unit: str, target: str, is_met: bool | None) -> Row:
    met = "-" if is_met is None else "yes" if is_met else "MISSED"
    return {"what": what, "value": float(value), "unit": unit, "target": target, "met": met}
