"""``pyrobc pack`` and ``pyrobc unpack`` as users run them: what is written, what is printed, what is refused."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pyrobc import codec
from pyrobc.batches import seeded
from pyrobc.cli import main
from pyrobc.export import load, save

NETWORK = """
from torch import nn
def build(width=8):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 2))
def norm():
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8))
"""


@pytest.fixture(scope="module")
def run(compressed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    save(compressed.net, compressed.plan, folder, onnx=False)
    return folder


@pytest.fixture
def here(run, compressed, tmp_path, monkeypatch):
    """A directory with a run, a coded file alone, damaged ones, and weights of a network of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("run").symlink_to(run)
    codec.pack(compressed.net, "alone.rbc")
    content = Path("alone.rbc").read_bytes()
    for name, damaged in {"cut": content[:-3], "text": b"nothing at all", "empty": b""}.items():
        Path(f"{name}.rbc").write_bytes(damaged)
    Path("coded_files_network.py").write_text(NETWORK)
    with seeded(0):
        save_file(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict(), "own.safetensors")
        save_file(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8)).state_dict(), "norm.safetensors")
        codec.pack(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), "conv.rbc")
        codec.pack(nn.Sequential(nn.Linear(7, 2)), "linear.rbc")
    Path("widths.json").write_text('{"2.weight": 3}')
    for name, text in {"unknown": '{"0.wait": 3}', "half": '{"2.weight": 3.5}', "list": "[3]", "torn": "{"}.items():
        Path(f"{name}.json").write_text(text)
    Path("other").mkdir()
    Path("other/model.rbc").write_bytes(Path("linear.rbc").read_bytes())
    Path("other/plan.json").write_text(compressed.plan.to_json())
    Path("nothing").mkdir()
    return tmp_path


def printed(capsys, *arguments):
    """Run a command that must work; returns its lines, their cells split at two or more spaces."""
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return [re.split(r"\s{2,}", line) for line in output.out.splitlines()]


def test_run_to_quantised_file(here, compressed, capsys):
    lines = printed(capsys, "pack", "run", "--output", "small.rbc", "--bits", "4")
    assert Path("small.rbc").read_bytes() == codec.encode(compressed.net, bits=4)[0]
    size, dense = Path("small.rbc").stat().st_size, 4 * compressed.plan.parameters[0]
    assert lines[1] == ["float32 parameters before compression", f"{dense:,}", "1\u00d7"]
    assert lines[2][1] == f"{4 * compressed.plan.parameters[1]:,}"
    assert lines[3] == ["small.rbc", f"{size:,}", f"{dense / size:.3g}\u00d7"]
    end = next(i for i, line in enumerate(lines) if line[0] == "all")
    assert lines[end][1:3] == [f"{8 * size:,}", "100.0%"]
    assert sum(int(line[1].replace(",", "")) for line in lines[5:end]) == pytest.approx(8 * size, abs=end)
    change = float(lines[-2][0].split()[-1])
    assert 0 < change <= 2.0**-5
    assert lines[-1] == ["written: small.rbc"]
    net = load("small.rbc")
    weights = net[0].weight.detach() * 16
    assert torch.equal(weights, weights.round())


def test_same_input_same_bytes(here, capsys):
    for name in ("a", "b"):
        printed(capsys, "pack", "run", "--output", f"{name}.rbc", "--bits-file", "widths.json")
        printed(capsys, "unpack", "run", "--output", name)
    assert Path("a.rbc").read_bytes() == Path("b.rbc").read_bytes()
    names = {path.name for path in Path("a").iterdir()}
    assert names >= {"model.safetensors", "model.pt2"} and names <= {"model.safetensors", "model.pt2", "model.onnx"}
    for name in names:
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name


def test_widths_by_tensor(here, compressed, capsys):
    printed(capsys, "pack", "alone.rbc", "--output", "some.rbc", "--bits-file", "widths.json")
    got, original = load("some.rbc").state_dict(), compressed.net.state_dict()
    assert torch.equal(got["2.weight"], (original["2.weight"] * 8).round() / 8)
    assert all(torch.equal(got[name], value) for name, value in original.items() if name != "2.weight")


def test_without_a_plan_the_network_itself_is_the_measure(here, compressed, capsys):
    lines = printed(capsys, "pack", "alone.rbc", "--output", "copy.rbc")
    assert lines[1] == ["float32 parameters of this network", f"{4 * compressed.plan.parameters[1]:,}", "1\u00d7"]
    assert lines[-2] == ["largest change of a number: 0"]
    assert Path("copy.rbc").read_bytes() == Path("alone.rbc").read_bytes()
    Path("plan.json").write_text('{"another": "program\'s"}')
    assert printed(capsys, "pack", "alone.rbc", "--output", "copy.rbc") == lines


def test_network_of_ones_own(here, capsys):
    own = ("--network", "coded_files_network:build", "--weights", "own.safetensors")
    printed(capsys, "pack", *own, "--network-args.width", "8", "--output", "own.rbc")
    got = load("own.rbc").state_dict()
    assert all(torch.equal(got[name], value) for name, value in load_file("own.safetensors").items())


def test_unpacked_files_compute_the_same(here, run, compressed, capsys):
    x = compressed.data[0]
    lines = printed(capsys, "unpack", "run", "--output", "plain")
    assert lines[0] == ["input shape: 6, from plan.json"]
    assert all(float(line[2]) <= 1e-5 for line in lines[3:] if len(line) == 3)
    assert torch.equal(load("plain")(x), load(run)(x))
    printed(capsys, "unpack", "alone.rbc", "--output", "again", "--input-shape", "6")
    assert torch.equal(load("again")(x), load(run)(x))
    assert printed(capsys, "unpack", "linear.rbc", "--output", "l")[0] == ["input shape: 7, from the first layer"]
    assert printed(capsys, "unpack", "conv.rbc", "--output", "c", "--input-shape", "1,4,4")[0][0].endswith("as given")
    assert load("c")(torch.zeros(5, 1, 4, 4)).shape == (5, 2)


PACK = "--output out.rbc"
REFUSED = {
    f"pack {PACK}": "got neither or both of a source and --network",
    "pack run": "no output; allowed: a value for output; fix: give --output$",
    f"pack nosuch {PACK}": "source nosuch: got no such file",
    f"pack own.safetensors {PACK}": "allowed: the directory of a run, or an .rbc file",
    f"pack nothing {PACK}": "run nothing: got no model.rbc",
    f"pack other {PACK}": "got a plan of another network",
    f"pack cut.rbc {PACK}": "network cut.rbc: got ",
    f"pack text.rbc {PACK}": "network text.rbc: got ",
    f"pack empty.rbc {PACK}": "network empty.rbc",
    "pack run --output out.bin": "allowed: a name that ends in .rbc",
    "pack run --output run/model.rbc": "got the source itself",
    "pack run --output own.safetensors/out.rbc": "a directory that can be written",
    f"pack run {PACK} --bits 4.5": "setting bits: got '4.5'",
    f"pack run {PACK} --bits 400": "bits of '0.weight': got 400",
    f"pack run {PACK} --bits 4 --bits-file widths.json": "got --bits and --bits-file",
    f"pack run {PACK} --bits-file nosuch.json": "widths nosuch.json: got FileNotFoundError",
    f"pack run {PACK} --bits-file torn.json": "JSONDecodeError",
    f"pack run {PACK} --bits-file list.json": "got list; allowed: a JSON object",
    f"pack run {PACK} --bits-file half.json": "widths half.json: 2.weight: got 3.5; allowed: a whole number",
    f"pack run {PACK} --bits-file unknown.json": "bits of '0.wait': got no such tensor",
    f"pack run {PACK} --bit-file widths.json": "did you mean '--bits-file'",
    f"pack run {PACK} --weights own.safetensors": "--weights: got no --network",
    f"pack --network coded_files_network:build {PACK}": "--network: got no --weights",
    f"pack --network coded_files_network:biuld --weights own.safetensors {PACK}": "did you mean 'build'",
    f"pack --network coded_files_network:build --weights norm.safetensors {PACK}": "a safetensors file of this network",
    f"pack --network coded_files_network:norm --weights norm.safetensors {PACK}": "layer 1: got LayerNorm",
    "unpack alone.rbc": "no output",
    "unpack nosuch.rbc --output out": "source nosuch.rbc: got no such file",
    "unpack cut.rbc --output out": "network cut.rbc: got ",
    "unpack alone.rbc --output out": "begins with SelectLinear, which does not tell it",
    "unpack conv.rbc --output out": "begins with Conv2d, which does not tell it",
    "unpack conv.rbc --output out --input-shape 1,5,5": r"got 1,5,5 \(as given\): mat1 and mat2",
    "unpack conv.rbc --output out --input-shape 1,-4": "allowed: positive whole numbers",
    "unpack conv.rbc --output out --input-shape big": "allowed: positive whole numbers",
    "unpack conv.rbc --output out --input-shap 4": "did you mean '--input-shape'",
    "unpack linear.rbc --output other": "other: got the files of a run",
    "unpack linear.rbc --output own.safetensors": "a directory that can be written",
}


@pytest.mark.parametrize("command", REFUSED)
def test_refusals_are_one_line_and_leave_nothing(here, capsys, command):
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if "__pycache__" not in str(path)}
    assert main(command.split()) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("pyrobc: ") and output.err.count("\n") == 1
    assert re.search(REFUSED[command], output.err.rstrip("\n")), output.err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*") if "__pycache__" not in str(path)} == before


def test_plan_of_another_network_is_no_measure(here, compressed, capsys):
    shapes = {name: tuple(t.shape) for name, t in compressed.net.state_dict().items()}
    assert compressed.plan.network_left() == shapes
    Path("plan.json").write_text(compressed.plan.to_json())
    assert printed(capsys, "pack", "alone.rbc", "--output", "copy.rbc")[1][0] == "float32 parameters before compression"
    assert printed(capsys, "pack", "linear.rbc", "--output", "copy.rbc")[1][0] == "float32 parameters of this network"
