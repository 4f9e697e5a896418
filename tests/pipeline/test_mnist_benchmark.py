"""The MNIST benchmarks go through from IDX files to their tables, on digits that are no MNIST."""

import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the benchmarks are not installed")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), compresslevel=1))


def write_digits(folder: Path) -> None:
    """scikit-learn's digits, blown up to 28 x 28, as MNIST's four files."""
    data = load_digits()
    images = np.kron(data.images * 15.9, np.ones((1, 3, 3))).astype(np.uint8)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    for part, repeats in (("train", 4), ("t10k", 1)):
        rows = np.tile(np.arange(len(images)), repeats)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", data.target[rows])


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_the_smoke_run_writes_tables_and_does_not_train_twice(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    write_digits(tmp_path)
    options = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--seeds", "0", "--networks", "lenet_300_100"]
    first = run("mnist_compression", *options)
    assert first.returncode == 0, first.stderr
    record = json.loads((tmp_path / "runs" / "mnist_compression.json").read_text())
    points = record["networks"]["lenet_300_100"]["points"]
    assert {p["method"] for p in points} == {"group_normal_jeffreys", "group_horseshoe", "recipe"}
    assert all(0 < p["bytes"] < 40_000 and 0 <= p["test_error"] <= 100 for p in points)
    assert (tmp_path / "runs" / "mnist_compression.png").stat().st_size > 10_000
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("*.rbc")}
    second = run("mnist_compression", *options)
    assert second.returncode == 0, second.stderr
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("*.rbc")} == files


@pytest.mark.slow
def test_spikes_and_slabs_are_measured_from_their_files(tmp_path: Path) -> None:
    write_digits(tmp_path)
    runs = tmp_path / "runs"
    options = ["--data", str(tmp_path), "--runs", str(runs)]
    fitted = run("spike_and_slab", *options, "--cases", "MLP 400-400, SS-GHS", "--part")
    assert fitted.returncode == 0, fitted.stderr
    assert not (runs / "spike_and_slab.json").exists()
    measured = run("spike_and_slab", *options, "--measure")
    assert measured.returncode == 0, measured.stderr
    rows = {
        row["what"].partition(": ")[2]: row for row in json.loads((runs / "spike_and_slab.json").read_text())["rows"]
    }
    assert rows["parameters kept"]["target"] == "<= 6.2" and 0 < rows["parameters kept"]["value"] <= 100
    assert 0 <= rows["test error"]["value"] <= 100


@pytest.mark.slow
def test_methods_go_their_road_and_are_measured_from_their_files(tmp_path: Path) -> None:
    write_digits(tmp_path)
    runs = tmp_path / "runs"
    options = ["--data", str(tmp_path), "--runs", str(runs), "--networks", "lenet_300_100", "--seeds", "0"]
    methods = ("Gumbel-softmax", "Turbo-VBI, chain", "magnitude recipe")
    for method in methods:
        fitted = run("methods_mnist", *options, "--methods", method, "--part")
        assert fitted.returncode == 0, fitted.stderr
    assert not (runs / "methods_mnist.json").exists()
    files = {f: f.stat().st_mtime_ns for f in runs.rglob("*.rbc")}
    again = run("methods_mnist", *options, "--methods", *methods)
    assert again.returncode == 0, again.stderr
    assert {f: f.stat().st_mtime_ns for f in runs.rglob("*.rbc")} == files, "what is there is not made again"
    record = json.loads((runs / "methods_mnist.json").read_text())
    points = record["networks"]["lenet_300_100"]["points"]
    assert {p["method"] for p in points} == set(methods) and len(points) == len(files)
    for point in points:
        assert 0 < point["nonzero"] <= point["parameters"] <= 266_610 and point["clusters"] <= point["nonzero"]
        assert 0 <= point["test_error"] <= 100 and point["nll"] > 0 and 0 <= point["ece"] <= 1
    assert (runs / "methods_mnist.png").stat().st_size > 10_000


def test_a_run_that_is_done_replaces_an_earlier_result_and_no_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    join_points = importlib.import_module("benchmarks._record").join_points
    stored = [{"method": "a", "seed": 0, "bytes": 1}, {"method": "a", "seed": 1, "bytes": 2}]
    here = [
        {"method": "a", "seed": 0, "bytes": 3},  # done
        {"method": "a", "seed": 1, "bytes": 4},  # begun only
        {"method": "b", "seed": 0, "bytes": 5},  # begun, and never measured before
    ]
    joined = join_points(here, {("a", 0)}, stored, ("method", "seed"), "2026-01-01")
    assert joined == [here[0], here[2], {"measured": "2026-01-01"} | stored[1]]
    again = join_points([], set(), joined, ("method", "seed"), "2026-02-02")
    assert again[2]["measured"] == "2026-01-01" and again[0]["measured"] == "2026-02-02"
