"""A run killed after any epoch resumes to the very bits of the uninterrupted run; other checkpoints are refused."""

import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import pyrobc
from pyrobc.checkpoint import read_checkpoint, write_atomically, write_checkpoint
from pyrobc.errors import CheckpointError, OutputError
from pyrobc.fit import fit
from pyrobc.guides.group_horseshoe import GroupHorseshoe
from pyrobc.lift import LiftedModel, lift
from pyrobc.models.mlp import build
from pyrobc.posterior import Posterior

EPOCHS = 4


class Kill(Exception):
    """Raised where the process would have died."""


def data(rows: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, 1, 4, 4, generator=generator), torch.arange(rows) % 3)


def model(family: Any = "group_horseshoe") -> LiftedModel:
    torch.manual_seed(7)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                        nn.Linear(12, 3))  # fmt: skip
    return lift(net, family, "categorical", torch.zeros(1, 1, 4, 4))


def batches() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=10, shuffle=True)


def own_generator() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(3))


def sampler_with_generator() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(data(), batch_size=10, sampler=RandomSampler(data(), generator=generator))


def arrays() -> tuple[Tensor, Tensor]:
    return data().tensors[0], data().tensors[1]


def mislabelled() -> DataLoader[Any]:
    """Validation data on which learning is a loss, so that the first epochs are the best."""
    x, y = data().tensors
    return DataLoader(TensorDataset(x, (y + 1) % 3), batch_size=10)


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)


def momentum(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "cosine": (batches, {"schedule": cosine, "warmup_epochs": 2, "clip_norm": 1.0}),
    "own generator": (own_generator, {"lr": 1e-2}),
    "sampler's generator": (sampler_with_generator, {"optimizer": momentum}),
    "early stopping": (
        arrays,
        {"batch_size": 7, "validation": mislabelled(), "patience": 2, "schedule": plateau, "lr": 0.1},
    ),
    "traced": (batches, {"path": "traced", "lr": 1e-2}),
}


def run(
    checkpoint: Path | None, load: Callable[[], Any], options: dict[str, Any], family: Any, **more: Any
) -> Posterior:
    return fit(model(family), load(), epochs=EPOCHS, seed=11, progress=False, checkpoint=checkpoint, **options, **more)


def bits(posterior: Posterior) -> dict[str, Tensor]:
    return (
        {f"guide/{n}": t for n, t in posterior.guide.state_dict().items()}
        | {f"model/{n}": t for n, t in posterior.model.state_dict().items()}
        | {f"rms/{n}": t for n, t in posterior.input_rms.items()}
    )


def assert_same_bits(a: Posterior, b: Posterior) -> None:
    left, right = bits(a), bits(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[n], right[n]) for n in left), [n for n in left if not torch.equal(left[n], right[n])]
    assert a.history == b.history


@pytest.mark.parametrize("family", ["group_horseshoe", "log_uniform"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_after_any_epoch_resumes_to_the_same_bits(case: str, family: str, tmp_path: Path) -> None:
    load, options = CASES[case]
    whole = run(None, load, options, family)
    assert any("running_mean" in n and bool(t.any()) for n, t in bits(whole).items())
    if case == "early stopping":
        losses = [h["validation_loss"] for h in whole.history]
        assert losses.index(min(losses)) < len(losses) - 1, "the best must not be the last for this to test anything"
    for last in range(1, len(whole.history) + 1):
        path = tmp_path / f"{last}.pt"

        def die(numbers: dict[str, float], last: int = last) -> None:
            if numbers["epoch"] == last:
                raise Kill

        with pytest.raises(Kill):
            run(path, load, options, family, on_epoch=die)
        torch.rand(last)  # what happened in between does not matter
        assert_same_bits(run(path, load, options, family), whole)
    assert_same_bits(run(path, load, options, family), whole)  # resuming what is finished repeats its answer


def test_more_epochs_continue_a_finished_run(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    for epochs in (1, 3):
        part = fit(model(), batches(), epochs=epochs, seed=11, progress=False, checkpoint=path)
    assert_same_bits(part, fit(model(), batches(), epochs=3, seed=11, progress=False))


def test_sigkill_between_epochs_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is really killed resumes, and what a kill in the middle of writing leaves is no obstacle."""
    program = """
        import os, signal, sys
        import torch
        from pyrobc.fit import fit
        from pyrobc.lift import lift
        from pyrobc.models.mlp import build

        torch.manual_seed(0)
        net, x, y = build(4, (3,), 2), torch.randn(20, 4), torch.arange(20) % 2
        def die(numbers):
            if numbers["epoch"] == 2 and sys.argv[1] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        post = fit(lift(net, "log_uniform", "categorical", x[:1]), (x, y), epochs=4, seed=1, batch_size=8,
                   checkpoint=sys.argv[2], progress=False, on_epoch=die)
        torch.save(post.guide.state_dict(), sys.argv[3])
    """
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(program))

    def arguments(mode: str, name: str) -> list[str]:
        return [str(script), mode, str(tmp_path / f"{name}.pt"), str(tmp_path / f"{name}.guide")]

    here = os.environ | {"PYTHONPATH": str(Path(pyrobc.__file__).parents[1])}  # this code, not what is installed
    killed = subprocess.run([sys.executable, *arguments("die", "killed")], timeout=120, check=False, env=here)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed.pt").exists() and not (tmp_path / "killed.guide").exists()
    (tmp_path / ".killed.pt.half").write_bytes(b"half a checkpoint, as a kill while writing would leave")
    for name in ("killed", "whole"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", arguments("live", name))
            runpy.run_path(str(script))
    a, b = (torch.load(tmp_path / f"{name}.guide", weights_only=True) for name in ("killed", "whole"))
    assert all(torch.equal(a[n], b[n]) for n in b)


def other_network() -> LiftedModel:
    return lift(build(16, (5,), 3), "group_horseshoe", "categorical", torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: other_network(), {}, r"network: got .*0\.weight.*allowed.*1\.weight"),
        (lambda: model("log_uniform"), {}, "family: got .*GroupHorseshoe.*allowed: .*LogUniform"),
        (lambda: model(GroupHorseshoe(global_scale=0.1)), {}, r"family: got .*global_scale=1\.0.*global_scale=0\.1"),
        (lambda: model(), {"seed": 12}, "seed: got 11; allowed: 12"),
        (lambda: model(), {"lr": 0.5}, r"optimizer: got \[\"Adam\", 0\.001\]; allowed: \[\"Adam\", 0\.5\]"),
        (lambda: model(), {"optimizer": momentum}, "optimizer: got .*Adam.*allowed.*SGD"),
        (lambda: model(), {"schedule": cosine}, "schedule: got .*None.*allowed.*Cosine"),
        (lambda: model(), {"temperature": 0.5}, "temperature"),
        (lambda: model(), {"path": "traced"}, "path: got .*fast.*allowed.*traced"),
        (lambda: model(), {"dtype": torch.float64}, "dtype: got .*float32.*allowed.*float64"),
    ],
)
def test_checkpoints_of_other_runs_are_refused_and_say_what_differs(
    make: Callable[[], LiftedModel], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    fit(model(), batches(), epochs=1, seed=11, progress=False, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=message) as caught:
        fit(make(), batches(), epochs=1, progress=False, checkpoint=path, **({"seed": 11} | options))
    assert "delete it" in caught.value.fix and len(str(caught.value)) < 700
    assert path.read_bytes() == before


def test_checkpoints_of_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pyrobc.fit"], "__version__", "0.0.1")
        fit(model(), batches(), epochs=1, seed=11, progress=False, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"version: got \"0\.0\.1\""):
        fit(model(), batches(), epochs=1, seed=11, progress=False, checkpoint=path)
    monkeypatch.setattr("pyrobc.checkpoint._FORMAT", 99)
    with pytest.raises(CheckpointError, match="format 1; allowed: format 99"):
        fit(model(), batches(), epochs=1, seed=11, progress=False, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip", b"\x80\x04\x95junk."])
def test_files_that_are_no_checkpoint_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="unreadable file.*delete it"):
        fit(model(), batches(), epochs=1, progress=False, checkpoint=path)
    with pytest.raises(CheckpointError, match="unreadable"):
        read_checkpoint(tmp_path, {})


def test_truncated_and_damaged_checkpoints_are_refused_or_unharmed(tmp_path: Path) -> None:
    path, identity = tmp_path / "run.pt", {"seed": 1}
    state = {"weights": torch.arange(500.0), "epoch": 3, "history": [{"elbo": -1.0}]}
    write_checkpoint(path, identity, state)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 23):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="unreadable"):
            read_checkpoint(path, identity)
    refused = 0
    for position in range(0, len(whole), len(whole) // 61):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            found = read_checkpoint(path, identity)
        except CheckpointError:
            refused += 1
        else:  # the bit was in padding or a header field that nothing reads
            assert torch.equal(found["weights"], state["weights"]) and found["epoch"] == 3
    assert refused > 20


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"format": 1, "identity": {}, "state": Evil()}, path)
    with pytest.raises(CheckpointError, match="unreadable"):
        read_checkpoint(path, {})
    assert not (tmp_path / "pwned").exists()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"output .*run\.pt: got .*allowed: a directory that can be written"):
        fit(model(), batches(), epochs=1, progress=False, checkpoint=tmp_path / "file" / "run.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission"):
        write_checkpoint(tmp_path / "run.pt", {}, {})


def test_a_full_disk_keeps_the_checkpoint_of_the_epoch_before(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    write_checkpoint(path, {}, {"epoch": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses to write more, as on a full disk
    try:
        with pytest.raises(OutputError, match="room on its disk"):
            write_checkpoint(path, {}, {"epoch": 2, "weights": torch.zeros(100_000)})
        with pytest.raises(OutputError, match="room on its disk"):  # torch's own writer, which raises RuntimeError
            write_atomically(path, lambda temporary: torch.save({"weights": torch.zeros(100_000)}, temporary))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"], "something was left behind"


def test_errors_of_the_writer_itself_are_not_disguised(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as caught:
        write_atomically(tmp_path / "x.json", fail)
    assert not isinstance(caught.value, OutputError) and not list(tmp_path.iterdir())
    assert re.fullmatch(r"a bug", str(caught.value))
