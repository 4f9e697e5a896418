"""``report.json``: what a report shows that neither the plan nor the evidence holds, so that it can be written again.

Numbers that were measured on test rows are in it, but no data and no draws: a report is rebuilt without either.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pyrobc.accounting import compression_table
from pyrobc.diagnose import CalibrationBin, Diagnosis, Shifted
from pyrobc.errors import OutputError, PyrobcError
from pyrobc.evidence import Evidence
from pyrobc.evidence_file import read_evidence
from pyrobc.export import FILES
from pyrobc.json_numbers import decode_numbers, encode_numbers
from pyrobc.plan import Plan, read_plan
from pyrobc.sensitivity import Sensitivity

__all__ = ["Bits", "Compression", "Record", "Run", "make_record", "read_run"]

_FORMAT = 1
NAME = "report.json"
_CODED_AT_MOST = 2_000_000  # parameters: coding takes about 10 microseconds each


class Compression(Protocol):
    """What ``compress`` returns, as far as a report reads it; ``evidence`` may be None and ``table`` empty.

    ``diagnosis``, ``sensitivity``, and ``net`` with ``posterior`` are read where they are there.
    """

    plan: Plan
    evidence: Any
    history: Sequence[Mapping[str, float]]
    table: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Bits:
    """The compression table: counts and bits of each layer, rows of the published rates, and notes."""

    layers: tuple[dict[str, Any], ...]
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What a report shows besides the plan and the evidence.

    Attributes:
        command: how the run was started.
        python: version of the interpreter.
        table: measured rows, dense and compact.
        history: numbers of every epoch.
        differences: of each file's outputs from the network's, by file.
        notes: what was left out of the files, and why.
        diagnosis: what else compression changed.
        sensitivity: groups kept at other epsilons.
        bits: the compression table.
    """

    command: str = ""
    python: str = ""
    table: tuple[Mapping[str, Any], ...] = ()
    history: tuple[Mapping[str, float], ...] = ()
    differences: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    diagnosis: Diagnosis | None = None
    sensitivity: Sensitivity | None = None
    bits: Bits | None = None

    def to_json(self) -> str:
        """JSON text, the same for the same record."""
        return json.dumps(encode_numbers({"format": _FORMAT, **dataclasses.asdict(self)}), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = NAME) -> Record:
        """Read back what ``to_json`` wrote.

        Raises:
            OutputError: it is damaged, or of another format.
        """
        try:
            data = decode_numbers(json.loads(text))
            if data.pop("format") != _FORMAT:
                raise ValueError("another format")
            data |= {name: tuple(data[name]) for name in ("table", "history", "notes")}
            data["diagnosis"] = data["diagnosis"] and _read_diagnosis(data["diagnosis"])
            data["sensitivity"] = data["sensitivity"] and _read_sensitivity(data["sensitivity"])
            data["bits"] = data["bits"] and Bits(**{name: tuple(part) for name, part in data["bits"].items()})
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise OutputError(
                f"record {source}", got=f"{type(error).__name__}: {error}", allowed=f"format {_FORMAT}, as written",
                fix="compress again, or delete it for a report without measurements",
            ) from error  # fmt: skip


@dataclass(frozen=True)
class Run:
    """All that a report is made of.

    Attributes:
        plan: what was removed, and why.
        evidence: nested candidates, if there were any.
        record: everything else.
        files: what was written, by name.
    """

    plan: Plan
    evidence: Evidence | None
    record: Record
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def table(self) -> tuple[Mapping[str, Any], ...]:
        """Measured rows, dense and compact."""
        return self.record.table


def make_record(
    result: Compression,
    *,
    command: str | None = None,
    differences: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Record:
    """The record of what ``compress`` returned.

    Args:
        result: its plan, history, table and, where they are there, diagnosis, sensitivity and posterior.
        command: how the run was started; the running command if None.
        differences: what ``verify`` measured.
        notes: those of ``save``.
    """
    return Record(
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) if command is None else command,
        python=platform.python_version(),
        table=tuple(result.table),
        history=tuple(result.history),
        differences=dict(differences or {}),
        notes=tuple(notes),
        diagnosis=getattr(result, "diagnosis", None),
        sensitivity=getattr(result, "sensitivity", None),
        bits=_count_bits(result),
    )


def read_run(folder: str | Path) -> Run:
    """What lies in the directory of a run: plan.json, and posterior.nc and report.json where they are there.

    Raises:
        OutputError: there is no plan, or a file is damaged.
        PlanError: the plan is damaged.
    """
    folder = Path(folder)
    if not (folder / "plan.json").is_file():
        raise OutputError(
            f"run {folder}", got="no plan.json", allowed="a directory that compress or save wrote",
            fix="name the output directory of the run",
        )  # fmt: skip
    file = folder / NAME
    return Run(
        plan=read_plan(folder / "plan.json"),
        evidence=read_evidence(folder) if (folder / "posterior.nc").is_file() else None,
        record=Record.from_json(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else Record(),
        files={name: folder / name for name in FILES if (folder / name).is_file()},
    )


def _count_bits(result: Compression) -> Bits | None:
    """Bits by the posterior's variances where they are known, else by the plan; None where nothing can be counted."""
    plan, net, posterior = result.plan, getattr(result, "net", None), getattr(result, "posterior", None)
    notes = []
    if plan.parameters[1] > _CODED_AT_MOST:
        net = posterior = None
        notes.append(f"More than {_CODED_AT_MOST:,} parameters are left: bits are those of the plan, nothing is coded.")
    for given in (posterior, None):
        try:
            table = compression_table(plan, net, posterior=given)
        except PyrobcError as error:
            notes.append(f"{error.subject}: {error.got}.")
        else:
            layers = tuple(dataclasses.asdict(layer) for layer in table.layers)
            return Bits(layers, tuple(table.rows), (*notes, *table.notes))
    return None


def _read_diagnosis(data: dict[str, Any]) -> Diagnosis:
    before, after = (tuple(CalibrationBin(**one) for one in part) for part in data["calibration"])
    shifts, left_out = tuple(Shifted(**one) for one in data["shifts"]), tuple(data["left_out"])
    return Diagnosis(**data | {"calibration": (before, after), "shifts": shifts, "left_out": left_out})


def _read_sensitivity(data: dict[str, Any]) -> Sensitivity:
    kept = {name: tuple(counts) for name, counts in data["kept"].items()}
    return Sensitivity(data["chosen"], tuple(data["epsilon"]), kept)
