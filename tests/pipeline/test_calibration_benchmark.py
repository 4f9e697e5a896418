"""The calibration's data, jobs and table, where the answer is known."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the benchmarks are not installed")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT)

    def find(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return find


def test_planted_inputs_have_the_stated_law(load) -> None:
    """Correlation 0.5 to the power of the distance; least squares on many rows finds the slopes that are there."""
    data = load("_planted").draw_regression(3, 20_000)
    x, y = data.x.double().numpy(), data.y.double().numpy()[:, 0]
    found = np.corrcoef(x.T)
    distance = np.abs(np.subtract.outer(np.arange(40), np.arange(40)))
    np.testing.assert_allclose(found, 0.5**distance, atol=5 / np.sqrt(20_000))
    slopes = np.linalg.lstsq(x, y, rcond=None)[0]
    is_active = np.isin(np.arange(40), list(data.active))
    assert is_active.sum() == 6
    assert (np.abs(slopes[is_active]) > 0.4).all() and (np.abs(slopes[~is_active]) < 0.1).all()
    assert np.std(y - x @ slopes) == pytest.approx(1.0, abs=0.03)


def test_a_teacher_has_the_stated_noise(load) -> None:
    clean, noisy = (load("_planted").draw_teacher(1, rows=20_000, noise=noise) for noise in (0.0, 0.5))
    assert float((clean.y - noisy.y).std()) == pytest.approx(0.5, abs=0.02)
    assert 1.1 < float(clean.y.std()) < 1.5


def test_every_job_is_told_from_every_other(load) -> None:
    study, record = load("decision_calibration"), load("_record")
    jobs = list(study.list_jobs(list(study.MEASURES), 20, ["log_uniform", "group_horseshoe"], 1.0))
    names = {record.fingerprint({"part": job.part} | job.settings) for job in jobs}
    assert len(names) == len(jobs) == 2 + 4 + 2 * 4 + 2 * (20 + 80)
    sets = [which for job in jobs if job.part == "change" for which in job.settings["sets"]]
    assert sorted(sets) == sorted([*range(40)] * 2), "the default family's are always among them"


def test_the_table_counts_what_was_kept(load, tmp_path: Path) -> None:
    """Ten seeds: one active input lost beside 34 others, once; nothing pruned at the strictest level."""
    common = {"part": "regression", "rows": 200, "family": "log_uniform", "seconds": 1.0, "place": "here"}
    for seed in range(10):
        lost = int(seed == 0)
        rules = {"default": [lost, 33, 0], "fdr 0.01": [0, 0, 40], "fdr 0.05": [lost, 34, 0], "fdr 0.1": [6, 34, 0]}
        run = common | {"seed": seed, "rules": rules}
        (tmp_path / f"{seed}.json").write_text(json.dumps(run))
    report = load("_calibration_report")
    rows = {row["what"]: row for row in report._report_regression("log_uniform", report_runs(tmp_path))}
    kept, pruned, *rates = rows.values()
    assert kept["value"] == pytest.approx(100 * 59 / 60) and kept["met"] == "yes"
    assert pruned["value"] == pytest.approx(100 * 33 / 34) and pruned["met"] == "yes"
    assert [rate["met"] for rate in rates] == ["-", "yes", "MISSED"]
    assert rates[1]["value"] == pytest.approx(1 / 35 / 10) and rates[2]["value"] == pytest.approx(6 / 40)


def report_runs(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_the_table_ranks_changes_and_leaves_bad_khats_out(load) -> None:
    run = {"elbo_gain": [1.0, -5.0, -50.0, -9.0, 3.0], "realised": [2.0, -1.0, -9.0, -3.0, -80.0]}
    run |= {
        "early": [2.0, -2.0, -8.0, -3.0, -70.0],
        "delta_f": [0.0, -6.0, -40.0, -50.0, -60.0],
        "elbo_gain_se": [1.0] * 5,
    }
    run |= {"size": [1, 2, 4, 2, 1], "wanted": [1, 1, 1, 1, 1]}
    run |= {"khat": [0.1, 0.2, 0.3, 0.4, 1.5], "good_k": 0.57, "posterior_khat": 0.4}
    rows = load("_calibration_report")._report_change("log_uniform", [run])
    assert rows[0]["value"] == pytest.approx(0.9) and rows[0]["met"] == "yes" and "ΔF" in rows[0]["what"]
    assert rows[3]["value"] == pytest.approx(0.0) and rows[3]["met"] == "MISSED"
    assert "of the 3 sets with" in rows[4]["what"] and rows[4]["value"] == pytest.approx(1.0)
    assert rows[5]["value"] == pytest.approx(1.0) and rows[5]["met"] == "yes" and "bad k-hat" in rows[5]["what"]
    assert rows[6]["value"] == pytest.approx(1.0) and "twelfth" in rows[6]["what"]
    assert rows[9]["value"] == 4 and "covers" in rows[9]["what"]
