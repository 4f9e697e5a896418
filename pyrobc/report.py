"""One self-contained page about one compression: what came out, why, how sure it is, and how to repeat it."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pyrobc.accounting import CompressionTable, compression_table
from pyrobc.checkpoint import write_text
from pyrobc.diagnose import Diagnosis
from pyrobc.errors import MissingExtraError
from pyrobc.plan import Plan

__all__ = ["CompressionTable", "compression_table", "describe_measurement", "tabulate", "write_report"]

MEASURES = {
    "error": "error on test rows",
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "bytes": "bytes of weights on disk",
    "latency_ms": "latency (ms)",
}
"""Columns of ``compress``'s table, in words."""

_CLOSEST = 15
_FLOAT_BYTES = 4


class Compression(Protocol):
    """What ``compress`` returns, as far as a report reads it; ``evidence`` may be None and ``table`` empty."""

    plan: Plan
    evidence: Any
    history: Sequence[Mapping[str, float]]
    table: Sequence[Mapping[str, Any]]


def write_report(
    result: Compression,
    path: str | Path,
    *,
    files: Mapping[str, Path] | None = None,
    differences: Mapping[str, float] | None = None,
    command: str | None = None,
) -> Path:
    """Write ``report.html``: tables always, figures where matplotlib is installed.

    Args:
        result: what ``compress`` returned.
        path: the file to write, whole or not at all.
        files: what ``save`` wrote, for their sizes and its notes.
        differences: what ``verify`` measured.
        command: how the run was started; the running command if None.

    Raises:
        OutputError: it cannot be written.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        **_describe_outcome(result),
        **_describe_decision(result),
        diagnosis=_describe_diagnosis(getattr(result, "diagnosis", None)),
        left_out=list(getattr(files, "notes", ())),
        figures=_draw(result),
        files=_list_files(files or {}, differences or {}),
        provenance=_describe_origin(result.plan, command),
        references=list(result.plan.provenance.get("references", [])),
    )
    target = Path(path)
    write_text(target, page)
    return target


def tabulate(result: Compression) -> list[dict[str, str]]:
    """The headline: ``name``, ``dense``, ``compact`` and ``ratio`` by measure; the plan's forecast if untested."""
    plan, table = result.plan, {row["name"]: row for row in result.table}
    rows = []
    if {"dense", "compact"} <= table.keys():
        likelihood = str(plan.provenance.get("likelihood", "categorical"))
        dense, compact = table["dense"], table["compact"]
        for name, words in MEASURES.items():
            texts = [_format_measure(name, row, likelihood) for row in (dense, compact)]
            ratio = "" if name == "error" or not compact[name] else f"{dense[name] / compact[name]:.3g}\u00d7"
            rows.append({"name": words, "dense": texts[0], "compact": texts[1], "ratio": ratio})
        return [*rows, *(_row(*line) for line in _count_weights(plan))]
    counts = [(MEASURES["parameters"], *plan.parameters), (MEASURES["macs"], *plan.macs)]
    return [_row(*line) for line in (*counts, *_count_weights(plan))]


def _count_weights(plan: Plan) -> list[tuple[str, int, int]]:
    """What pruning inside the groups left, if there was any: numbers that are not zero, and the bytes they take."""
    dense, found = plan.parameters[0], plan.rule.get("weights", {})
    rows = [("parameters that are not zero", dense, found["nonzero"])] if found else []
    if found.get("file_bytes"):
        rows.append(("bytes of model.rbc; dense: as float32", _FLOAT_BYTES * dense, found["file_bytes"]))
    return rows


def _row(name: str, before: int, after: int) -> dict[str, str]:
    ratio = f"{before / after:.3g}\u00d7" if after else ""
    return {"name": name, "dense": f"{before:,}", "compact": f"{after:,}", "ratio": ratio}


def describe_measurement(result: Compression) -> str:
    """The small print of the headline."""
    if not result.table:
        return "No test data were given, so no error was measured."
    row = result.table[-1]
    as_given = (
        " Dense: the network as it was given, which is not trained here." if result.table[0].get("is_as_given") else ""
    )
    threads = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
    return (
        f"Error with its 95% interval. Latency: median over batches of {row['latency_batch']} on {row['cpu']}, "
        f"{threads}, both in one run.{as_given}"
    )


def _format_measure(name: str, row: Mapping[str, Any], likelihood: str) -> str:
    value = row[name]
    if name == "error":
        low, high = row["error_low"], row["error_high"]
        if likelihood == "normal":
            return f"{value:.4g} [{low:.4g}, {high:.4g}]"
        return f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{value:.3g}" if name == "latency_ms" else f"{value:,}"


def _describe_outcome(result: Compression) -> dict[str, Any]:
    plan = result.plan
    widths = [
        {
            "name": name,
            "before": before,
            "after": after,
            "percent": 100 * after / before,
        }
        for name, (before, after) in plan.widths.items()
    ]
    return {
        "title": f"{plan.compression_ratio:.3g}\u00d7 fewer parameters",
        "subtitle": f"{plan.parameters[0]:,} before, {plan.parameters[1]:,} after; {plan.provenance.get('family')}",
        "headline": tabulate(result),
        "measured_on": describe_measurement(result),
        "widths": widths,
        "left_alone": list(plan.left_alone.items()),
    }


def _describe_decision(result: Compression) -> dict[str, Any]:
    plan, evidence = result.plan, result.evidence
    checked = plan.evidence.get("checked")
    candidates = [
        {
            "num_removed": c.num_removed,
            "is_chosen": vars(c) == checked,
            "parameters": f"{c.parameters:,}",
            "khat_bad": f"{c.khat_bad:.1%}",
            **{name: f"{getattr(c, name):z.2f}" for name in ("elpd", "se", "diff", "diff_se")},
        }
        for c in (evidence.candidates if evidence is not None else ())
    ]
    rows: list[dict[str, Any]] = [
        {"name": f"{b.name}[{i}]", "outcome": b.outcomes[i], "odds": b.log_odds[i],
         "delta_f": f"{b.delta_f[i]:.4g}", "log_odds": f"{b.log_odds[i]:.3g}", "mcse": f"{b.mcse[i]:.2g}"}
        for b in plan.blocks for i in range(b.size)
    ]  # fmt: skip
    rows.sort(key=lambda row: abs(row["odds"]) if math.isfinite(row["odds"]) else math.inf)
    rule = [(key.replace("_", " "), _say(value)) for key, value in plan.rule.items() if key != "steps"]
    baseline = plan.baseline
    outcomes = [outcome for block in plan.blocks for outcome in block.outcomes]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in ("keep", "prune", "abstain"))
    return {
        "rule": [("groups", counts), *rule],
        "notes": list(plan.notes),
        "candidates": candidates,
        "method": f"Estimated by {plan.evidence['method']}." if "method" in plan.evidence else "",
        "closest": rows[:_CLOSEST],
        "num_groups": len(rows),
        "odds_name": "log odds" if baseline is None else f"{baseline} minus its cut",
        "score_name": "\u0394F (nats)" if baseline is None else baseline,
    }


def _describe_diagnosis(found: Diagnosis | None) -> dict[str, Any] | None:
    if found is None:
        return None
    names = {"nll": "negative log likelihood (nats)", "ece": "expected calibration error", "brier": "Brier score",
             "entropy": "predictive entropy (nats)"}  # fmt: skip
    measures = [(words, f"{found.before[name]:.3g}", f"{found.after[name]:.3g}") for name, words in names.items()]
    shifts = [
        (s.label, f"{s.before:.1%}", f"{s.after:.1%}", f"{100 * s.excess:+.1f} \u00b1 {100 * s.excess_se:.1f}")
        for s in found.shifts
    ]
    return {
        "measures": measures,
        "shifts": shifts,
        "agreement": f"{found.after['agreement']:.1%}",
        "potential": f"{found.min_potential:.1%} at worst, {found.mean_potential:.1%} on average",
        "delta": f"{found.delta:.1%}",
        "removed": f"{found.removed:.1%}",
    }


def _say(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_say(part)}" for key, part in value.items())
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def _describe_origin(plan: Plan, command: str | None) -> list[tuple[str, str]]:
    facts = plan.provenance
    versions = {"python": platform.python_version(), **facts.get("versions", {})}
    settings = facts.get("settings", {})
    return [
        ("command", command if command is not None else " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        ("seed", str(facts.get("seed"))),
        ("family", f"{facts.get('family')} ({', '.join(f'{k}={v}' for k, v in settings.items())})"),
        ("likelihood", str(facts.get("likelihood"))),
        ("training rows", str(facts.get("num_data"))),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]


def _list_files(files: Mapping[str, Path], differences: Mapping[str, float]) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "bytes": f"{path.stat().st_size:,}",
            "difference": f"{differences[name]:.2g}" if name in differences else "",
        }
        for name, path in files.items()
    ]


def _draw(result: Compression) -> list[str]:
    from pyrobc.figures import draw_calibration, draw_candidates, draw_scores, draw_sensitivity, draw_training

    try:
        figures = [draw_scores(result.plan), draw_sensitivity(result.plan)]
        if result.evidence is not None:
            figures.append(draw_candidates(result.evidence.candidates, result.plan))
        if result.history:
            figures.append(draw_training(result.history))
        if (diagnosis := getattr(result, "diagnosis", None)) is not None:
            figures.append(draw_calibration(diagnosis.calibration))
    except MissingExtraError:
        return []
    return figures
