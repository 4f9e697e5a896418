"""One self-contained page about one compression: what came out, why, how sure it is, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pyrobc.accounting import CompressionTable, compression_table
from pyrobc.checkpoint import write_text
from pyrobc.errors import MissingExtraError
from pyrobc.figures import (
    Drawing,
    draw_bits,
    draw_calibration,
    draw_candidates,
    draw_forest,
    draw_khats,
    draw_network,
    draw_odds_sensitivity,
    draw_rope_sensitivity,
    draw_scores,
    draw_shifts,
    draw_training,
)
from pyrobc.plan import Plan
from pyrobc.references import list_references
from pyrobc.report_tables import (
    describe_bits,
    describe_decision,
    describe_diagnosis,
    describe_evidence,
    describe_measurement,
    describe_outcome,
    tabulate,
)
from pyrobc.run_record import Compression, Record, Run, make_record, read_run

__all__ = [
    "CompressionTable",
    "compression_table",
    "describe_measurement",
    "report_run",
    "tabulate",
    "write_report",
]


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
    notes = getattr(files, "notes", ())
    record = make_record(result, command=command, differences=differences, notes=notes)
    plan = Plan.from_json(result.plan.to_json())  # as it is read back, so that the page is the same
    write_text(Path(path), _render(Run(plan, result.evidence, record, dict(files or {}))))
    return Path(path)


def report_run(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run anew from its directory: plan.json, and posterior.nc and report.json if they are there.

    Nothing is fitted, and no data are read.

    Args:
        folder: what the run wrote.
        path: the file to write; ``report.html`` in ``folder`` if None.

    Raises:
        OutputError: there is no plan, a file is damaged, or the report cannot be written.
        PlanError: the plan is damaged.
    """
    target = Path(folder) / "report.html" if path is None else Path(path)
    write_text(target, _render(read_run(folder)))
    return target


def _render(run: Run) -> str:
    import jinja2

    plan, record = run.plan, run.record
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        **describe_outcome(plan),
        **describe_decision(plan),
        **describe_evidence(plan, run.evidence),
        headline=tabulate(run),
        measured_on=describe_measurement(run),
        diagnosis=describe_diagnosis(record.diagnosis),
        bits=describe_bits(record.bits),
        left_out=record.notes,
        figures=_draw(run),
        files=_list_files(run),
        provenance=_describe_origin(plan, record),
        references=list_references(
            plan, has_evidence=run.evidence is not None, has_diagnosis=record.diagnosis is not None
        ),
    )


def _draw(run: Run) -> dict[str, Drawing]:
    """Figures by name; none without matplotlib."""
    plan, evidence, record = run.plan, run.evidence, run.record
    try:
        drawings = [draw_network(plan), draw_scores(plan), draw_odds_sensitivity(plan)]
        if record.sensitivity is not None:
            drawings.append(draw_rope_sensitivity(record.sensitivity))
        if evidence is not None:
            drawings.append(draw_candidates(evidence.candidates, plan))
            drawings += [d for d in (draw_forest(plan, evidence), draw_khats(evidence, plan)) if d is not None]
        if record.history:
            drawings.append(draw_training(record.history))
        if record.diagnosis is not None:
            drawings.append(draw_calibration(record.diagnosis.calibration))
            drawings += [d for d in (draw_shifts(record.diagnosis),) if d is not None]
        if record.bits is not None:
            drawings += [d for d in (draw_bits(record.bits.layers),) if d is not None]
    except MissingExtraError:
        return {}
    return {drawing.name: drawing for drawing in drawings}


def _describe_origin(plan: Plan, record: Record) -> list[tuple[str, str]]:
    facts = plan.provenance
    versions = ({"python": record.python} if record.python else {}) | dict(facts.get("versions", {}))
    settings = ", ".join(f"{k}={v}" for k, v in facts.get("settings", {}).items())
    return [
        ("command", record.command or "not recorded"),
        ("seed", str(facts.get("seed"))),
        ("family", f"{facts.get('family')} ({settings})"),
        ("likelihood", str(facts.get("likelihood"))),
        ("training rows", str(facts.get("num_data"))),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]


def _list_files(run: Run) -> list[dict[str, str]]:
    differences = run.record.differences
    return [
        {
            "name": name,
            "bytes": f"{path.stat().st_size:,}",
            "difference": f"{differences[name]:.2g}" if name in differences else "",
        }
        for name, path in run.files.items()
    ]
