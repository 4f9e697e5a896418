"""Files of a compact network: equal outputs, whole or absent, and nothing in them that could run."""

import copy
import dataclasses
import errno
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from pyrobc import archive, codec, export
from pyrobc.batches import seeded
from pyrobc.errors import ConfigError, MissingExtraError, OutputError, PlanError
from pyrobc.export import convert, load, save, verify
from pyrobc.surgery import apply

HAS_ONNX = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs the extra onnx")


@pytest.fixture(scope="module")
def saved(compressed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    files = save(compressed.net, compressed.plan, folder, evidence=compressed.evidence)
    return folder, files


def test_reloaded_files_compute_the_same(saved, compressed):
    """Issue row: at most 1e-5, for many rows, for one row, and for as many as were never traced."""
    folder, _ = saved
    x = compressed.data[0]
    for rows in (x, x[:1], x[:2]):
        differences = verify(compressed.net, folder, rows)
        assert ("model.onnx" in differences) == HAS_ONNX
        assert max(differences.values()) <= 1e-5
        assert differences["model.rbc"] == 0
    assert load(folder)(x[:0]).shape == (0, 2)


def test_convolutional_network_computes_the_same(traced, keeping, tmp_path):
    net, spec, inputs = traced
    plan = keeping(spec, {b.name: range(0, b.size, 2) for b in spec.blocks})
    small = apply(plan, net, example_inputs=inputs)
    before = copy.deepcopy(small.state_dict())
    save(small.train(), plan, tmp_path, example_inputs=inputs, onnx=False)
    assert small.training, "the network given is left as it was"
    assert max(verify(small, tmp_path, inputs[:1]).values()) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before.values(), small.state_dict().values(), strict=True))


def test_every_file_is_there(saved, compressed):
    folder, files = saved
    expected = {"model.safetensors", "model.pt2", "model.rbc", "posterior.nc", "plan.json"}
    expected |= {"model.onnx"} if HAS_ONNX else set()
    assert files.notes == ()
    assert files.keys() == expected == {path.name for path in folder.iterdir()}
    assert files["plan.json"].read_text() == compressed.plan.to_json()


def test_safetensors_hold_the_state_and_the_plan(saved, compressed):
    folder, _ = saved
    state = load_file(folder / "model.safetensors")
    twin = copy.deepcopy(compressed.net)
    twin.load_state_dict(state)
    for name, tensor in compressed.net.state_dict().items():
        assert torch.equal(state[name], tensor)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert len(file.metadata()["plan_sha256"]) == 64


def named(*layers):
    """Layers whose tensors have names that no plan here knows."""
    return nn.Sequential(OrderedDict((f"layer_{number}", layer) for number, layer in enumerate(layers)))


def test_a_network_that_its_plan_does_not_leave_is_not_saved(compressed, tmp_path):
    with pytest.raises(PlanError, match=r"got 0\.weight of shape \(8, 6\).*what bc\.apply"):
        save(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), compressed.plan, tmp_path)
    with pytest.raises(ConfigError, match=r"save\(net, plan, directory\)"):
        save(compressed.plan, compressed.net, tmp_path)
    assert not list(tmp_path.iterdir())


def test_shared_tensors_are_written_once(compressed, tmp_path):
    net = named(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net.layer_2.weight = net.layer_0.weight
    save(net, compressed.plan, tmp_path, onnx=False)
    assert load_file(tmp_path / "model.safetensors").keys() == {"layer_0.weight", "layer_0.bias", "layer_2.bias"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["aliases"]) == {"layer_2.weight": "layer_0.weight"}
    assert verify(net, tmp_path, torch.randn(3, 6))["model.pt2"] == 0


def test_posterior_can_be_opened(saved, compressed):
    xarray = pytest.importorskip("xarray")
    with xarray.open_datatree(saved[0] / "posterior.nc", engine="h5netcdf") as tree:
        assert tree["posterior"]["multiplier"].shape[-1] == compressed.score.spec.num_groups


def test_named_inputs(compressed, tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, left, right):
            return self.linear(left) + right.mean(1, keepdim=True)

    inputs = {"left": torch.randn(4, 3), "right": torch.randn(4, 5)}
    net = Sum()
    save(net, compressed.plan, tmp_path, example_inputs=inputs, onnx=False)
    assert verify(net, tmp_path, inputs)["model.pt2"] <= 1e-6
    save(net, compressed.plan, tmp_path, example_inputs=tuple(inputs.values()), onnx=False)
    assert verify(net, tmp_path, tuple(inputs.values()))["model.pt2"] <= 1e-6


def test_loading_needs_neither_pyro_nor_arviz(saved):
    code = (
        "import sys\nfor name in ('pyro', 'arviz', 'arviz_base', 'arviz_stats'): sys.modules[name] = None\n"
        f"import torch\nfrom pyrobc.export import load\nprint(tuple(load({str(saved[0])!r})(torch.zeros(3, 6)).shape))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(3, 2)", done.stderr


def test_loaded_network_behaves_like_one(saved):
    net = load(saved[0])
    assert not net.eval().training
    assert sum(p.numel() for p in net.parameters()) > 0
    with pytest.raises(OutputError, match="evaluation mode"):
        net.train()


def test_files_name_no_path_of_this_machine(saved):
    for name in ("model.pt2", "model.onnx", "plan.json"):
        if (saved[0] / name).exists():
            content = (saved[0] / name).read_bytes()
            if name == "model.pt2":
                with zipfile.ZipFile(io.BytesIO(content)) as file:
                    content = b"".join(file.read(part) for part in file.namelist())
            assert str(Path(torch.__file__).parent).encode() not in content, name


@needs_onnx
def test_exporting_is_silent(compressed, tmp_path, capfd, recwarn):
    save(compressed.net, compressed.plan, tmp_path, onnx=True)
    output = capfd.readouterr()
    assert output.out == output.err == ""
    assert not recwarn.list


def test_without_the_extra(compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "model.onnx").write_bytes(b"of another network")
    assert "model.onnx" not in save(compressed.net, compressed.plan, tmp_path)
    assert not (tmp_path / "model.onnx").exists()
    with pytest.raises(MissingExtraError, match=r'pip install "pyrobc\[onnx\]"'):
        save(compressed.net, compressed.plan, tmp_path / "other", onnx=True)
    assert not (tmp_path / "other").exists()


def test_full_disk_leaves_nothing_half_written(compressed, tmp_path, monkeypatch):
    def fail(program, path, **extra):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_program", fail)
    with pytest.raises(OutputError, match="No space left"):
        save(compressed.net, compressed.plan, tmp_path, onnx=False)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors"}, "no plan.json: the directory is not whole"


def test_path_that_cannot_be_a_directory(compressed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a directory that can be written"):
        save(compressed.net, compressed.plan, tmp_path / "file" / "run", onnx=False)


def test_network_that_cannot_be_exported(compressed, tmp_path):
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(OutputError, match="keep Python control flow"):
        save(Branching(6, 6), compressed.plan, tmp_path / "run", onnx=False)
    assert not (tmp_path / "run").exists()


def test_missing_and_damaged_networks_are_refused(saved, tmp_path):
    with pytest.raises(OutputError, match="no such file"):
        load(tmp_path)
    content = (saved[0] / "model.pt2").read_bytes()
    flipped = content.replace(b"aten.linear", b"aten.linfar", 1)  # the check sum says no
    for name, damaged in {"empty": b"", "text": b"nothing", "cut": content[:9000], "flipped": flipped}.items():
        (tmp_path / f"{name}.pt2").write_bytes(damaged)
        with pytest.raises(OutputError, match="as pyrobc.save wrote it"):
            load(tmp_path / f"{name}.pt2")


def test_plan_of_another_network_is_noticed(saved, compressed, tmp_path):
    (tmp_path / "model.pt2").write_bytes((saved[0] / "model.pt2").read_bytes())
    (tmp_path / "plan.json").write_text(compressed.plan.to_json().replace("log_uniform", "other"))
    with pytest.raises(OutputError, match="save both again"):
        load(tmp_path)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def rewrite(source, target, changes):
    """Copy an archive with some files replaced or added, check sums included."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        content = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, change in changes.items():
            content[name] = change(content[name]) if callable(change) else change
        for name, data in content.items():
            new.writestr(f"{root}/{name}", data)


def pickled():
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    return buffer.getvalue()


def replacing(old, new):
    return lambda data: data.replace(old, new, 1)


ATTACKS = {
    "pickled weights": {
        "data/weights/weight_0": pickled(),
        "data/weights/model_weights_config.json": replacing(b'"use_pickle": false', b'"use_pickle": true'),
    },
    "pickled inputs": {"data/sample_inputs/model.pt": pickled()},
    "legacy weights": {"data/weights/model.pt": pickled()},
    "opaque constant": {"data/constants/opaque_obj_0": pickle.dumps(Bomb())},
    "compiled library": {"data/aotinductor/model/x.so": b"\x7fELF"},
    "operator": {"models/model.json": replacing(b"torch.ops.aten.linear.default", b"torch.os.system")},
    "library loader": {"models/model.json": replacing(b"torch.ops.aten.linear.default", b"torch.ops.load_library")},
    "name": {"models/model.json": replacing(b'"name": "p_0_weight"', b'"name": "x):\\n import os\\n#"')},
    "expression": {"models/model.json": replacing(b'"expr_str": "', b'"expr_str": "exec(chr(112))+')},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_an_archive_is_refused(saved, tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    rewrite(saved[0] / "model.pt2", tmp_path / "good.pt2", {})
    load(tmp_path / "good.pt2")
    rewrite(saved[0] / "model.pt2", tmp_path / "bad.pt2", ATTACKS[attack])
    assert (tmp_path / "bad.pt2").read_bytes() != (tmp_path / "good.pt2").read_bytes()
    with pytest.raises(OutputError, match="as pyrobc.save wrote it"):
        load(tmp_path / "bad.pt2")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("text", "is_plain"),
    [
        ("Symbol('s31', positive=True, integer=True)", True),
        ("Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))", True),
        ("s0//2 + 1.5", True),
        ("exec(chr(112))", False),
        ("Symbol('s0').__class__", False),
        ("Symbol('__import__')", False),
        ("s0[0]", False),
        ("lambda: 0", False),
        ("open(1)", False),
    ],
)
def test_arithmetic_is_told_from_code(text, is_plain):
    assert archive._is_arithmetic(text) == is_plain


def test_log_level_is_put_back():
    import logging

    before = logging.root.manager.disable
    with pytest.raises(KeyError), archive.quiet():
        raise KeyError
    assert logging.root.manager.disable == before


def test_float64_network(compressed, tmp_path):
    with seeded(0):
        net = named(nn.Linear(6, 3)).double()
    save(net, compressed.plan, tmp_path, onnx=False)
    assert verify(net, tmp_path, torch.randn(4, 6))["model.pt2"] <= 1e-12


def test_coded_file_is_the_module_itself(saved, compressed):
    net = load(saved[0] / "model.rbc")
    assert not net.training
    state = net.state_dict()
    assert state.keys() == compressed.net.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in compressed.net.state_dict().items())


@pytest.mark.parametrize("name", ["model.rbc", "model.pt2"])
def test_facade_loads_without_importing_pyro(saved, name):
    code = (
        f"import sys\nimport pyrobc as bc\nnet = bc.load({str(saved[0] / name)!r})\n"
        "print('pyro' in sys.modules, net.training)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr


def test_coded_file_takes_the_widths_of_the_plan(compressed, tmp_path):
    """Five bits: 0.0625 <= max|w| / 2^4 is the step, where max|w| < 2^E; what has 32 bits is kept as it is."""
    weight = compressed.net[0].weight.detach()
    plan = dataclasses.replace(compressed.plan, bits={**compressed.plan.bits, "0.weight": 5})
    save(compressed.net, plan, tmp_path, onnx=False)
    got = load(tmp_path / "model.rbc").state_dict()
    step = 2.0 ** torch.ceil(weight.abs().max().log2()) / 16
    assert torch.equal((got["0.weight"] / step).round() * step, got["0.weight"])
    assert 0 < (got["0.weight"] - weight).abs().max() <= step / 2
    assert all(torch.equal(got[n], v) for n, v in compressed.net.state_dict().items() if n != "0.weight")


def test_coded_file_takes_the_widths_given(compressed, tmp_path):
    files = save(compressed.net, compressed.plan, tmp_path, onnx=False, bits=3)
    assert files["model.rbc"].read_bytes() == codec.encode(compressed.net, bits=3)[0]
    difference = verify(compressed.net, tmp_path, compressed.data[0])["model.rbc"]
    assert 1e-4 < difference < 1
    with pytest.raises(OutputError, match="bits of '0.wait'"):
        save(compressed.net, compressed.plan, tmp_path / "other", onnx=False, bits={"0.wait": 3})
    assert not (tmp_path / "other").exists()


def test_network_that_the_coded_format_does_not_hold(compressed, tmp_path):
    """It is saved without model.rbc, which a note says; an earlier network's does not stay behind."""
    for net, words in {
        named(nn.Linear(6, 3), nn.LayerNorm(3)): "layer layer_1: LayerNorm",
        named(nn.Linear(6, 3)).double(): "tensor layer_0.weight: torch.float64",
    }.items():
        save(compressed.net, compressed.plan, tmp_path, onnx=False)
        assert (tmp_path / "model.rbc").exists()
        files = save(net, compressed.plan, tmp_path, onnx=False)
        assert "model.rbc" not in files and not (tmp_path / "model.rbc").exists()
        assert files.notes == (f"model.rbc was left out: {words}, which the format does not hold",)
        assert verify(net, tmp_path, torch.randn(2, 6)).keys() == {"model.pt2"}


def test_defect_of_the_coder_does_not_cost_the_other_files(compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(export.codec, "encode", lambda *args, **options: 1 / 0)
    files = save(compressed.net, compressed.plan, tmp_path, onnx=False)
    assert files.keys() == {"model.safetensors", "model.pt2", "plan.json"}
    assert "ZeroDivisionError" in files.notes[0]


def test_damaged_coded_file_is_refused_by_name(saved, tmp_path):
    content = (saved[0] / "model.rbc").read_bytes()
    flipped = bytes([*content[:-1], content[-1] ^ 1])
    for name, damaged in {"empty": b"", "text": b"nothing at all", "cut": content[:-3], "flipped": flipped}.items():
        file = tmp_path / f"{name}.rbc"
        file.write_bytes(damaged)
        with pytest.raises(OutputError, match=f"network .*{name}.rbc: got "):
            load(file)
    with pytest.raises(OutputError, match="no such file"):
        load(tmp_path / "nosuch.rbc")


def test_conversion_touches_nothing_else(saved, compressed, tmp_path):
    (tmp_path / "model.rbc").write_bytes(b"the source")
    (tmp_path / "model.onnx").write_bytes(b"of another network")
    files = convert(compressed.net, tmp_path, example_inputs=compressed.data[0][:1], onnx=False)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "model.pt2", "model.rbc"}
    assert files.keys() == {"model.safetensors", "model.pt2"}
    assert torch.equal(load(tmp_path)(compressed.data[0]), load(saved[0])(compressed.data[0]))
    before = {p.name: p.read_bytes() for p in saved[0].iterdir()}
    with pytest.raises(OutputError, match="choose another output directory"):
        convert(compressed.net, saved[0], example_inputs=compressed.data[0][:1])
    assert before == {p.name: p.read_bytes() for p in saved[0].iterdir()}
