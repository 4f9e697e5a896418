"""Two processes that train one network, over gloo on this machine."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyrobc.distributed import Team, find_team, joined
from pyrobc.errors import ConfigError, DataError
from pyrobc.plan import Plan

ROOT = Path(__file__).parents[2]
MEMBER = Path(__file__).with_name("team_member.py")


@pytest.fixture(scope="module")
def member():
    spec = importlib.util.spec_from_file_location("team_member", MEMBER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(command, size, folder, **more):
    """So many processes as ``torchrun`` starts them, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"} | more
    return [
        subprocess.Popen(
            command, cwd=folder, env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in range(size)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two(member, tmp_path_factory):
    """What two processes found, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    member.fit_still(2, folder / "from_one.pt")  # begun by one process, ended by two
    processes = start([sys.executable, str(MEMBER), str(folder)], 2, folder)
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return folder, [torch.load(folder / f"found_{r}.pt", weights_only=True) for r in range(2)], said


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rows", [1, 2, 75])
def test_the_gradient_is_that_of_the_joined_batch(two, member, rows):
    """Of a batch that one process has to itself, of one with a row for each, and of one that does not divide."""
    _, found, _ = two
    alone = member.find_gradient(Team(), rows)
    for each in found:
        together = each[f"gradient {rows}"]
        scale = max(float(value.abs().max()) for value in alone.values())
        assert_same(together, alone, rtol=1e-5, atol=1e-6 * scale)
    assert any(float(value.abs().max()) > 1 for name, value in alone.items() if name != "value")


def test_a_fit_without_noise_is_that_of_one_process(two, member):
    _, found, _ = two
    alone = member.fit_still(3).guide.state_dict()
    moved = [not torch.equal(v, member.make_model().new_guide().state_dict()[n]) for n, v in alone.items()]
    assert any(moved)
    for each in found:
        assert_same(each["still"], alone, rtol=1e-5, atol=1e-6)


def test_another_number_of_processes_goes_on(two, member):
    """A fit that one process began and two ended, and the other way round."""
    folder, found, _ = two
    alone = member.fit_still(4).guide.state_dict()
    assert_same(found[0]["resumed"], alone, rtol=1e-5, atol=1e-6)
    shown = member.fit_still(4, folder / "from_two.pt")
    assert [numbers["epoch"] for numbers in shown.history] == [1, 2, 3, 4]
    assert_same(shown.guide.state_dict(), alone, rtol=1e-5, atol=1e-6)


def test_all_processes_end_with_the_same_network_and_plan(two):
    """With noise, cuts on the way, batch normalisation, early stopping, and deletions of single weights."""
    _, (first, second), _ = two
    for what in ("pruned", "compact"):
        assert_same(first[what], second[what], rtol=0, atol=0)
    assert first["plan"] == second["plan"]
    plan = Plan.from_json(first["plan"])
    assert plan.parameters[1] < plan.parameters[0]


def test_noise_differs(two):
    _, (first, second), _ = two
    assert not torch.equal(first["noise"], second["noise"])


def test_the_first_process_alone_measures_and_shows(two):
    _, found, said = two
    assert [each["rows"] for each in found] == [2, 0]
    assert "fit group_normal_jeffreys" in said[0][1]
    assert said[1] == ("", "")


def test_all_hear_what_the_first_answers(two):
    _, found, _ = two
    assert [each["answer"] for each in found] == [0, 0]
    assert all(each["refused"] == found[0]["refused"] and "question: got none" in each["refused"] for each in found)


def test_alone_nothing_is_shared():
    assert find_team() == Team() and find_team().is_first
    with joined() as team:
        assert team == Team()
    x, y = torch.rand(5, 2), torch.arange(5)
    assert all(a is b for a, b in zip(Team().share(x, y), (x, y), strict=True))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_shares_are_the_batch(size):
    x, y = {"a": torch.rand(5, 2), "b": (torch.rand(5), torch.rand(5, 1))}, torch.arange(5)
    shares = [Team(rank, size).share(x, y) for rank in range(size)]
    assert torch.equal(torch.cat([targets for _, targets in shares]), y)
    assert torch.equal(torch.cat([inputs["a"] for inputs, _ in shares]), x["a"])
    assert torch.equal(torch.cat([inputs["b"][1] for inputs, _ in shares]), x["b"][1])
    sizes = [len(targets) for _, targets in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_loader_that_divides_rows_itself_is_refused():
    data = TensorDataset(torch.rand(6, 2), torch.zeros(6))
    loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    Team().check_loader(loader)
    with pytest.raises(DataError, match="a loader with a DistributedSampler"):
        Team(0, 2).check_loader(loader)


def test_devices_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="got 1 GPUs for process 2 of this machine"), joined("cuda"):
        pass
    with pytest.raises(ConfigError, match="got cuda:1; allowed: cuda, of which each takes its own"), joined("cuda:1"):
        pass


ROWS = """
import os, pathlib, signal
import torch

class Rows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x, self.reads = torch.randn(64, 4, generator=generator), 0
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        self.reads += 1
        here = pathlib.Path("killed")
        if os.environ["RANK"] == "1" and self.reads > 64 * 6 and pathlib.Path("out/checkpoints/fit_0.pt").exists():
            if not here.exists():
                here.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.x[i], int(self.x[i, 0] > 0)

def rows():
    return Rows()

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
"""


def test_a_killed_process_ends_the_job_and_the_same_command_resumes(tmp_path):
    """By ``torchrun`` itself; what was begun goes on from the checkpoint, and one process writes the run."""
    (tmp_path / "rows.py").write_text(ROWS)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "pyrobc", "compress", "--model=rows:build",
        "--data.train=rows:rows", "--data.test=rows:rows", "--epochs=30", "--num_draws=25", "--output=out",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    killed = subprocess.run(command, **options)
    assert killed.returncode != 0 and (tmp_path / "killed").exists()
    assert "SIGKILL" in killed.stderr or "Signal 9" in killed.stderr, killed.stderr
    assert not (tmp_path / "out" / "plan.json").exists()
    reached = torch.load(tmp_path / "out/checkpoints/fit_0.pt", weights_only=True)["state"]["epoch"]
    assert 0 < reached < 30
    resumed = subprocess.run(command, **options)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("report: out/report.html") == 1
    plan = Plan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert np.isfinite(plan.compression_ratio)
