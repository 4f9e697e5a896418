"""What a run keeps for its report comes back as it was."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

import pyrobc as bc
from pyrobc import run_record
from pyrobc.decide import decide
from pyrobc.diagnose import diagnose
from pyrobc.errors import OutputError
from pyrobc.run_record import Record, make_record
from pyrobc.sensitivity import Sensitivity


@pytest.fixture
def result(compressed):
    found = diagnose(compressed.posterior.to_module(), compressed.net, compressed.data)
    sensitivity = Sensitivity(0.01, (0.001, 0.01), {"input": (3, 2), "0": (4, 2)})
    return SimpleNamespace(
        **vars(compressed)
        | {"diagnosis": found, "sensitivity": sensitivity, "table": [{"name": "dense", "error": 0.1}]}
    )


def test_record_comes_back(result):
    record = make_record(result, command="pyrobc demo", differences={"model.pt2": 1e-7}, notes=("left out",))
    odd = dataclasses.replace(record, table=({"name": "dense", "error": float("inf")},))
    for one in (record, odd, Record()):
        assert Record.from_json(one.to_json()) == one
    assert record.history == tuple(result.history) and record.diagnosis == result.diagnosis
    assert "NaN" not in odd.to_json() and "Infinity" not in odd.to_json()
    for text in ("", "[]", "{}", '{"format": 2}', record.to_json().replace('"history"', '"histories"')):
        with pytest.raises(OutputError, match="record report.json: got .*as written"):
            Record.from_json(text)


def test_bits_are_those_of_the_compression_table(result, monkeypatch):
    """Log-uniform weights are points: their gates have variances, and no layer needs 32 bits."""
    table = bc.compression_table(result.plan, result.net, posterior=result.posterior)
    found = make_record(result).bits
    assert [layer["bits"] for layer in found.layers] == [layer.bits for layer in table.layers]
    assert found.rows == tuple(table.rows) and found.notes == table.notes
    monkeypatch.setattr(run_record, "_CODED_AT_MOST", 3)
    large = make_record(result).bits
    assert {layer["bits"] for layer in large.layers} == {32} and "More than 3 parameters" in large.notes[0]
    assert [row["name"] for row in large.rows] == [row["name"] for row in table.rows[:2]]


def test_evidence_comes_back(result, tmp_path):
    """The tree, the candidates and what decisions read: the same plan from the file."""
    bc.save(
        result.net, result.plan, tmp_path, evidence=result.evidence, example_inputs=result.example_inputs, onnx=False
    )
    found = bc.read_evidence(tmp_path)
    assert found.candidates == result.evidence.candidates
    np.testing.assert_array_equal(found.order, result.evidence.order)
    for name in ("posterior_khat", "good_k", "method"):
        assert getattr(found, name) == getattr(result.evidence, name)
    for name, group in result.evidence.tree.children.items():
        xr.testing.assert_equal(found.tree[name].to_dataset(), group.to_dataset())
    np.testing.assert_array_equal(found.hdi(0.9), result.evidence.hdi(0.9))
    assert decide(result.score, found) == decide(result.score, result.evidence)
    assert list(found.to_arviz().posterior.data_vars) == ["multiplier"]


def test_evidence_keeps_what_was_found_row_by_row(result):
    rows = result.evidence.tree["pointwise"]
    for i, candidate in enumerate(result.evidence.candidates):
        assert float(rows["elpd"][i].sum()) == pytest.approx(candidate.elpd)
        assert float((rows["khat"][i] > result.evidence.good_k).mean()) == candidate.khat_bad


def test_files_that_are_no_evidence_are_refused(tmp_path):
    with pytest.raises(OutputError, match="evidence .*nowhere: got FileNotFoundError"):
        bc.read_evidence(tmp_path / "nowhere")
    xr.DataTree.from_dict({"posterior": xr.Dataset({"x": ("draw", [1.0])})}).to_netcdf(
        tmp_path / "other.nc", engine="h5netcdf"
    )
    with pytest.raises(OutputError, match="of this release"):
        bc.read_evidence(tmp_path / "other.nc")
