"""Run files: every key reaches ``compress``, and whatever is wrong is said in one line."""

import dataclasses
import inspect
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyrobc.arrays import read_arrays
from pyrobc.compress import compress
from pyrobc.config import BUILT_IN, RunConfig, build_run, read_config
from pyrobc.errors import ConfigError, DataError
from pyrobc.negligible import DEFAULT_EPSILON

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def build(width=4):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))

def rows():
    return TensorDataset(torch.randn(20, 6), torch.randint(2, (20,)))

none = TensorDataset(torch.randn(0, 6), torch.randint(2, (0,)))

def broken():
    raise RuntimeError("no such thing")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with arrays, a module of the user's and a run file."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(30, 6)), generator.integers(0, 2, 30)
    np.savez("train.npz", x=x, y=y)
    np.save("x.npy", x)
    np.save("y.npy", y)
    (tmp_path / "users_own.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text("model: users_own:build\ndata: {train: train.npz}\nepochs: 7\nlr: 3e-3\n")
    yield tmp_path
    sys.modules.pop("users_own", None)


def test_file_becomes_arguments_of_compress(here):
    path = list(sys.path)
    run = build_run(read_config("run.yaml", ["--family_args.gate_lr", "2", "--epochs=9", "--dtype", "float64"]))
    assert sys.path == path
    assert run["epochs"] == 9 and run["lr"] == 0.003 and run["family_args"] == {"gate_lr": 2}
    assert run["dtype"] == torch.float64 and run["data"][0].dtype == torch.float64
    assert next(run["net"].parameters()).dtype == torch.float64
    inspect.signature(compress).bind(**run)


def test_keys_and_defaults_are_those_of_compress():
    defaults = {n: p.default for n, p in inspect.signature(compress).parameters.items()}
    for part in dataclasses.fields(RunConfig):
        if part.name in ("model", "data", "model_args", "state_dict", "family_args", "dtype", "output"):
            continue
        assert part.default == defaults[part.name], part.name
    assert RunConfig.__dataclass_fields__["epsilon"].default == DEFAULT_EPSILON


def test_initial_weights_follow_the_seed(here):
    first, same, other = (
        build_run(read_config("run.yaml", ["--seed", seed]))["net"][0].weight for seed in ("1", "1", "2")
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_networks(here, name):
    assert isinstance(build_run(read_config("run.yaml", ["--model", name]))["net"], nn.Module)


def test_trained_weights_are_loaded(here):
    net = build_run(read_config("run.yaml"))["net"]
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in net.state_dict().items()}
    save_file(state, "net.safetensors")
    net = build_run(read_config("run.yaml", ["--state_dict", "net.safetensors"]))["net"]
    assert float(net[0].weight.detach().mean()) == 0.5
    with pytest.raises(ConfigError, match="a safetensors file of this network"):
        build_run(read_config("run.yaml", ["--state_dict", "net.safetensors", "--model_args.width", "5"]))


def test_data_sets_by_import_path(here):
    run = build_run(read_config("run.yaml", ["--data.train", "users_own:rows", "--data.test", "users_own:rows"]))
    assert len(next(iter(run["data"]))[0]) == 20 and run["data"].batch_size == 128
    before = torch.random.get_rng_state()
    list(run["data"])
    assert torch.equal(before, torch.random.get_rng_state()), "shuffling has a generator of its own"


def test_two_files(here):
    x, y = read_arrays({"x": "x.npy", "y": "y.npy"}, are_labels=True)
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and len(x) == len(y) == 30
    assert read_arrays("train.npz", are_labels=False)[1].dtype == torch.float32


OPTIONS = {
    "--model=nosuch:thing": "No module named 'nosuch'",
    "--model=users_own:buidl": "did you mean 'build'",
    "--model=users_own:broken": "RuntimeError: no such thing",
    "--model=users_own:rows": "got TensorDataset; allowed: a callable that returns a torch.nn.Module",
    "--model=lenet5": "did you mean 'lenet_5'",
    "--model_args.depth=3": "unexpected keyword argument 'depth'",
    "--data.train=users_own:build": "got Sequential; allowed: a torch Dataset",
    "--data.train=users_own:broken": "no such thing",
    "--data.train=nosuch.npz": "no such file",
    "--state_dict=nosuch.safetensors": "nosuch.safetensors",
    "--device=gpu": "see pyrobc doctor",
    "--dtype=float16": "setting dtype",
    "--epochs=many": "setting epochs: got 'many'; allowed: int",
    "--prior_odds=sometimes": "'implied', 'learned'",
    "--epoch=3": "did you mean '--epochs'",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_options_are_refused(here, option):
    with pytest.raises((ConfigError, DataError), match=OPTIONS[option]):
        build_run(read_config("run.yaml", [option]))


FILES = {
    "epoch: 3": "the key 'epoch'; .*did you mean 'epochs'",
    "data: {train: train.npz, trian: x}": "did you mean 'data.train'",
    "epochs: ten": "setting epochs: got 'ten'; allowed: int",
    "epochs: [": "run file",
    "- a": "run file",
}


@pytest.mark.parametrize("line", FILES)
def test_wrong_files_are_refused(here, line):
    (here / "bad.yaml").write_text(f"{line}\n" if line == "- a" else f"model: mlp\n{line}\n")
    with pytest.raises(ConfigError, match=FILES[line]) as caught:
        read_config("bad.yaml", [] if "data:" in line else ["--data.train", "train.npz"])
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_keys(here):
    with pytest.raises(ConfigError, match="File does not exist"):
        read_config("nosuch.yaml")
    (here / "bad.yaml").write_text("model: mlp\n")
    with pytest.raises(ConfigError, match="no data.train.*give --data.train"):
        read_config("bad.yaml")


ARRAYS = {
    "no rows": ({"x": np.zeros((0, 6)), "y": np.zeros(0, int)}, "got no rows"),
    "lengths": ({"x": np.zeros((3, 6)), "y": np.zeros(2, int)}, "3 inputs and 2 targets"),
    "nan": ({"x": np.full((3, 6), np.nan), "y": np.zeros(3, int)}, "x: got NaN"),
    "infinite": ({"x": np.full((3, 6), np.inf), "y": np.zeros(3, int)}, "x: got NaN or infinite"),
    "bytes": ({"x": np.zeros((3, 6), np.uint8), "y": np.zeros(3, int)}, r"uint8.*astype\('float32'\)"),
    "real labels": ({"x": np.zeros((3, 6)), "y": np.zeros(3)}, "integer labels"),
    "text": ({"x": np.zeros((3, 6)), "y": np.array(["a", "b", "c"])}, "y: got <U1"),
    "objects": ({"x": np.array([{}, {}]), "y": np.zeros(2, int)}, "without objects"),
    "names": ({"inputs": np.zeros((3, 6)), "y": np.zeros(3, int)}, "name the inputs x"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_unusable_arrays_are_refused(here, case):
    arrays, message = ARRAYS[case]
    np.savez("bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_arrays("bad.npz", are_labels=True)


def test_damaged_array_files_are_refused(here):
    content = (here / "train.npz").read_bytes()
    for damaged in (b"", b"text", content[:200], content.replace(b"x.npy", b"x.npz")[: len(content) - 5]):
        (here / "bad.npz").write_bytes(damaged)
        with pytest.raises(DataError):
            read_arrays("bad.npz", are_labels=True)
    with pytest.raises(DataError, match="one array"):
        read_arrays("x.npy", are_labels=True)
    with pytest.raises(DataError, match="several arrays"):
        read_arrays({"x": "train.npz", "y": "y.npy"}, are_labels=True)
    with pytest.raises(DataError, match="no rows"):
        build_run(read_config("run.yaml", ["--data.train", "users_own:none"]))
