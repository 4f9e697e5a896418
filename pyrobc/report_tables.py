"""The report's tables, as text: what is undefined says so, and nothing here needs data or draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from pyrobc.diagnose import Diagnosis
from pyrobc.evidence import Evidence
from pyrobc.plan import Plan
from pyrobc.plan_fields import OUTCOMES
from pyrobc.run_record import Bits

__all__ = [
    "describe_bits",
    "describe_decision",
    "describe_diagnosis",
    "describe_evidence",
    "describe_measurement",
    "describe_outcome",
    "say_number",
    "tabulate",
]

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
_TIMES = "\u00d7"


class Measured(Protocol):
    """A plan and the rows that were measured, if any."""

    @property
    def plan(self) -> Plan:
        """What was removed."""

    @property
    def table(self) -> Any:
        """Rows by ``compare``."""


def say_number(value: float, form: str = ".3g") -> str:
    """A formatted number, or words where there is none."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "\u221e" if value > 0 else "\u2212\u221e"
    return f"{value:{form}}"


def tabulate(result: Measured) -> list[dict[str, str]]:
    """The headline: ``name``, ``dense``, ``compact`` and ``ratio`` by measure; the plan's forecast if untested."""
    plan, table = result.plan, {row["name"]: row for row in result.table}
    rows = []
    if {"dense", "compact"} <= table.keys():
        likelihood = str(plan.provenance.get("likelihood", "categorical"))
        dense, compact = table["dense"], table["compact"]
        for name, words in MEASURES.items():
            texts = [_format_measure(name, row, likelihood) for row in (dense, compact)]
            ratio = "" if name == "error" or not compact[name] else f"{dense[name] / compact[name]:.3g}{_TIMES}"
            rows.append({"name": words, "dense": texts[0], "compact": texts[1], "ratio": ratio})
        return [*rows, *(_row(*line) for line in _count_weights(plan))]
    counts = [(MEASURES["parameters"], *plan.parameters), (MEASURES["macs"], *plan.macs)]
    return [_row(*line) for line in (*counts, *_count_weights(plan))]


def describe_measurement(result: Measured) -> str:
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


def describe_outcome(plan: Plan) -> dict[str, Any]:
    """Title, widths, and layers that were left alone."""
    widths = [
        {"name": name, "before": before, "after": after, "percent": 100 * after / before}
        for name, (before, after) in plan.widths.items()
    ]
    return {
        "title": f"{plan.compression_ratio:.3g}{_TIMES} fewer parameters",
        "subtitle": f"{plan.parameters[0]:,} before, {plan.parameters[1]:,} after; {plan.provenance.get('family')}",
        "widths": widths,
        "left_alone": list(plan.left_alone.items()),
    }


def describe_decision(plan: Plan) -> dict[str, Any]:
    """The rule, what it came to, and the groups nearest to its threshold."""
    rows: list[dict[str, Any]] = [
        {"name": f"{b.name}[{i}]", "outcome": b.outcomes[i], "odds": b.log_odds[i], "reason": b.reasons[i],
         "delta_f": say_number(b.delta_f[i], ".4g"), "log_odds": say_number(b.log_odds[i]),
         "mcse": say_number(b.mcse[i], ".2g")}
        for b in plan.blocks for i in range(b.size)
    ]  # fmt: skip
    rows.sort(key=lambda row: abs(row["odds"]) if math.isfinite(row["odds"]) else math.inf)
    outcomes = [outcome for block in plan.blocks for outcome in block.outcomes]
    counts = ", ".join(f"{outcomes.count(o)} {o}" for o in OUTCOMES)
    others = [(key.replace("_", " "), _say(value)) for key, value in plan.other_settings().items()]
    baseline = plan.baseline
    return {
        "rule": [("rule", plan.describe_rule()), ("groups", counts), *others],
        "notes": list(plan.notes),
        "closest": rows[:_CLOSEST],
        "num_groups": len(rows),
        "odds_name": "log odds" if baseline is None else f"{baseline} minus its cut",
        "score_name": "\u0394F (nats)" if baseline is None else baseline,
    }


def describe_evidence(plan: Plan, evidence: Evidence | None) -> dict[str, Any]:
    """The candidates, and how they were estimated."""
    checked = plan.evidence.get("checked")
    candidates = [
        {
            "num_removed": c.num_removed,
            "is_chosen": vars(c) == checked,
            "parameters": f"{c.parameters:,}",
            "khat_bad": f"{c.khat_bad:.1%}",
            **{name: say_number(getattr(c, name), "z.2f") for name in ("elpd", "se", "diff", "diff_se", "elbo_gain")},
        }
        for c in (evidence.candidates if evidence is not None else ())
    ]
    method = evidence.method if evidence is not None else plan.evidence.get("method", "")
    return {"candidates": candidates, "method": f"Estimated by {method}." if method else ""}


def describe_diagnosis(found: Diagnosis | None) -> dict[str, Any] | None:
    """What else changed, on test rows as they are and shifted."""
    if found is None:
        return None
    names = {"nll": "negative log likelihood (nats)", "ece": "expected calibration error", "brier": "Brier score",
             "entropy": "predictive entropy (nats)"}  # fmt: skip
    measures = [(words, say_number(found.before[name]), say_number(found.after[name])) for name, words in names.items()]
    shifts = [
        (s.label, f"{s.before:.1%}", f"{s.after:.1%}", f"{100 * s.excess:+.1f} \u00b1 {100 * s.excess_se:.1f}")
        for s in found.shifts
    ]
    return {
        "measures": measures,
        "shifts": shifts,
        "left_out": ", ".join(found.left_out),
        "agreement": f"{found.after['agreement']:.1%}",
        "potential": f"{found.min_potential:.1%} at worst, {found.mean_potential:.1%} on average",
        "delta": f"{found.delta:.1%}",
        "removed": f"{found.removed:.1%}",
    }


def describe_bits(bits: Bits | None) -> dict[str, Any] | None:
    """The compression table: published rates, and bits by layer."""
    if bits is None:
        return None
    rows = [(row["name"], f"{row['before']:,}", f"{row['after']:,.0f}", f"{row['ratio']:.3g}{_TIMES}")
            for row in bits.rows]  # fmt: skip
    layers = [(layer["name"], f"{layer['dense']:,}", f"{layer['kept']:,}", layer["bits"]) for layer in bits.layers]
    return {"rows": rows, "layers": layers, "notes": bits.notes}


def _count_weights(plan: Plan) -> list[tuple[str, int, int]]:
    """What pruning inside the groups left, if there was any: numbers that are not zero, and the bytes they take."""
    dense, found = plan.parameters[0], plan.rule.get("weights", {})
    rows = [("parameters that are not zero", dense, found["nonzero"])] if found else []
    if found.get("file_bytes"):
        rows.append(("bytes of model.rbc; dense: as float32", _FLOAT_BYTES * dense, found["file_bytes"]))
    return rows


def _row(name: str, before: int, after: int) -> dict[str, str]:
    ratio = f"{before / after:.3g}{_TIMES}" if after else ""
    return {"name": name, "dense": f"{before:,}", "compact": f"{after:,}", "ratio": ratio}


def _format_measure(name: str, row: Mapping[str, Any], likelihood: str) -> str:
    value = row[name]
    if name == "error":
        low, high = row["error_low"], row["error_high"]
        if likelihood == "normal":
            return f"{value:.4g} [{low:.4g}, {high:.4g}]"
        return f"{100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{value:.3g}" if name == "latency_ms" else f"{value:,}"


def _say(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_say(part)}" for key, part in value.items())
    return "none" if value is None else say_number(value, ".4g") if isinstance(value, float) else value
