"""``compress`` inside the groups that stay: what is kept, what the plan says of it, and the file that comes out."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import pyrobc as bc
from pyrobc.batches import seeded
from pyrobc.checkpoint import write_checkpoint
from pyrobc.cli import main
from pyrobc.config import read_config
from pyrobc.errors import ConfigError
from pyrobc.export import planned_steps, verify
from pyrobc.plan import Plan, read_plan
from pyrobc.report import tabulate, write_report
from pyrobc.surgery import mask

SETTINGS: dict[str, Any] = {
    "family": "group_normal_jeffreys", "family_args": {"num_draws": 4}, "epochs": 40, "lr": 3e-2, "batch_size": 100,
    "num_draws": 30, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    with seeded(7):
        x = torch.randn(300, 10)
        return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()


def network() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def result(data: tuple[Tensor, Tensor]) -> bc.Result:
    return bc.compress(network(), data, keep_weights=0.15, coarseness=1.5, test=data, **SETTINGS)


def test_a_share_of_the_dense_parameters_is_left_on_grids(result: bc.Result) -> None:
    dense = sum(p.numel() for p in network().parameters())
    weights, steps = result.plan.rule["weights"], result.plan.rule["steps"]
    left = sum(int(p.count_nonzero()) for p in result.net.parameters())
    assert left == weights["nonzero"] <= weights["kept"] <= round(0.15 * dense) < dense == result.plan.parameters[0]
    assert weights["total"] == sum(p.numel() for p in result.net.parameters()) == result.plan.parameters[1]
    state = result.net.state_dict()
    tensors = dict(result.net.named_parameters())
    assert steps.keys() == tensors.keys() == planned_steps(result.plan, state).keys()
    assert all(torch.equal((state[n] / s).round() * s, state[n]) for n, s in steps.items())
    assert result.plan.rule["keep_weights"] == 0.15 and result.plan.rule["coarseness"] == 1.5
    assert any("grid of its own" in note for note in result.plan.notes)
    assert result.table[1]["error"] < 0.15
    assert [h["epoch"] for h in result.history[-10:]] == list(range(1, 11)), "the grids are fitted last"


def test_the_plan_is_that_of_the_network_given(result: bc.Result) -> None:
    """Units that pruning left useless are in it, so that it replays."""
    plan = result.plan
    shapes = {name: tuple(tensor.shape) for name, tensor in result.net.state_dict().items()}
    assert plan.network_left() == {n: s for n, s in shapes.items()} | {
        n: s for n, s in plan.network_left().items() if n.endswith("index")
    }
    replayed = bc.apply(plan, network())
    assert {n: tuple(t.shape) for n, t in replayed.named_parameters()} == {
        n: tuple(t.shape) for n, t in result.net.named_parameters()
    }
    x = torch.randn(5, 10)
    torch.testing.assert_close(replayed(x), mask(plan, network())(x), rtol=1e-4, atol=1e-4)
    assert Plan.from_json(plan.to_json()) == plan
    assert {b.name: b.size for b in result.posterior.model.spec.blocks} == {n: w[1] for n, w in plan.widths.items()}


def test_saved_files_hold_the_very_network_and_are_small(result: bc.Result, tmp_path: Path) -> None:
    files = bc.save(result.net, result.plan, tmp_path, example_inputs=result.example_inputs, onnx=False)
    size = files["model.rbc"].stat().st_size
    assert size == result.plan.rule["weights"]["file_bytes"] < 0.1 * 4 * result.plan.parameters[0]
    expected, got = result.net.state_dict(), bc.load(tmp_path / "model.rbc").state_dict()
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    assert max(verify(result.net, tmp_path, torch.randn(4, 10)).values()) <= 1e-6
    assert bc.compression_table(result.plan, result.net).num_bytes == size
    assert bc.compression_table(result.plan, posterior=result.posterior).num_bytes == size
    with torch.no_grad():  # a network that was trained on is not rounded to a grid it has left
        moved = bc.load(tmp_path / "model.rbc")
        for parameter in moved.parameters():
            parameter.mul_(1.1)
    bc.save(moved, result.plan, tmp_path / "moved", example_inputs=result.example_inputs, onnx=False)
    back = bc.load(tmp_path / "moved" / "model.rbc").state_dict()
    assert all(torch.equal(t, back[n]) for n, t in moved.state_dict().items())


def test_tables_show_what_is_not_zero_and_the_bytes(result: bc.Result, tmp_path: Path) -> None:
    weights = result.plan.rule["weights"]
    untested = dataclasses.replace(result, table=[])
    for shown in (tabulate(result), tabulate(untested)):
        rows = {row["name"]: row for row in shown}
        assert rows["parameters"]["compact"] == str(result.plan.parameters[1]), "zeros are parameters too"
        assert rows["parameters that are not zero"]["compact"] == str(weights["nonzero"])
        row = rows["bytes of model.rbc; dense: as float32"]
        assert row["dense"] == f"{4 * result.plan.parameters[0]:,}" and row["compact"] == f"{weights['file_bytes']:,}"
        assert float(row["ratio"][:-1]) > 10
    page = write_report(result, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "parameters that are not zero" in page and "bytes of model.rbc" in page


def test_without_the_arguments_nothing_changes(data: tuple[Tensor, Tensor]) -> None:
    plain = bc.compress(network(), data, **SETTINGS | {"epochs": 4})
    assert not {"weights", "steps", "keep_weights", "coarseness", "support_weight"} & plain.plan.rule.keys()
    assert [row["name"] for row in tabulate(plain)] == ["parameters", "multiply-accumulates"]


def test_odds_and_numbers_and_grids_alone(data: tuple[Tensor, Tensor]) -> None:
    short = SETTINGS | {"epochs": 12, "readapt_epochs": 3}
    odds = bc.compress(network(), data, keep_weights="odds", **short)
    assert odds.plan.rule["keep_weights"] == "odds" and odds.plan.rule["steps"] == {}
    assert odds.plan.rule["weights"]["kept"] < odds.plan.rule["weights"]["total"] or odds.plan.parameters[1] < 40
    counted = bc.compress(network(), data, keep_weights=30, **short)
    assert 20 <= counted.plan.rule["weights"]["kept"] <= 30 and counted.plan.rule["support_weight"] == 0.0
    supported = bc.compress(network(), data, keep_weights=30, support_weight=0.5, **short)
    assert 20 <= supported.plan.rule["weights"]["kept"] <= 30 and supported.plan.rule["support_weight"] == 0.5
    kept, other = (r.net.state_dict() for r in (counted, supported))
    assert any(kept[n].shape != other[n].shape or ((kept[n] == 0) != (other[n] == 0)).any() for n in kept)
    coarse = bc.compress(network(), data, coarseness=2.0, **short)
    assert coarse.plan.rule["weights"]["kept"] == coarse.plan.rule["weights"]["total"]
    assert coarse.plan.rule["steps"] and coarse.plan.rule["weights"]["file_bytes"] < 2 * coarse.plan.parameters[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_weights": 0}, "keep_weights: got 0; allowed: a whole number from 1, a share"),
        ({"keep_weights": 1.5}, r"keep_weights: got 1\.5"),
        ({"keep_weights": float("nan")}, "keep_weights: got nan"),
        ({"keep_weights": True}, "keep_weights: got True"),
        ({"keep_weights": "odd"}, "keep_weights: got 'odd'.*'odds'"),
        ({"coarseness": 0.0}, r"coarseness: got 0\.0; allowed: a positive number"),
        ({"coarseness": float("inf")}, "coarseness: got inf"),
        ({"keep_weights": 9, "family": "log_uniform", "family_args": {}}, "keep_weights with family 'log_uniform'"),
        ({"coarseness": 1.0, "family": "log_uniform", "family_args": {}}, "coarseness with family 'log_uniform'"),
        ({"keep_weights": 9, "support_weight": -0.1}, r"support_weight: got -0\.1 .*allowed: 0, or a positive"),
        ({"keep_weights": 9, "support_weight": float("nan")}, "support_weight: got nan"),
        ({"support_weight": 0.3}, r"support_weight: got 0\.3 with keep_weights=None.*keep_weights=0\.05"),
        ({"keep_weights": 9, "readapt_epochs": 0}, "keep_weights with readapt_epochs: got 0; allowed: 1 or more"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_followed_are_refused_before_the_fit(
    settings: dict[str, Any], message: str, data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pyrobc.compress"], "fit", None)
    with pytest.raises(ConfigError, match=message):
        bc.compress(network(), data, **SETTINGS | settings)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[Tensor, Tensor]) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    np.savez("train.npz", x=data[0].numpy(), y=data[1].numpy())
    run = {
        "model": "mlp", "model_args": {"in_features": 10, "hidden": [12, 8], "out_features": 3}, "lr": 0.03,
        "data": {"train": "train.npz", "test": "train.npz"}, "family": "group_normal_jeffreys", "epochs": 16,
        "batch_size": 100, "num_draws": 30, "output": "out", "keep_weights": 40, "coarseness": 1.5,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    yield tmp_path


def test_the_command_writes_a_small_file_and_an_interrupted_run_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["compress", "--config", "run.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "parameters that are not zero" in shown and "bytes of model.rbc" in shown
    plan = read_plan("out/plan.json")
    assert plan.rule["weights"]["kept"] <= 40
    assert (here / "out" / "model.rbc").stat().st_size == plan.rule["weights"]["file_bytes"]
    assert max(json.loads((here / "out" / "report.json").read_text())["differences"].values()) <= 1e-5
    assert main(["inspect", "out"]) == 0
    shown = capsys.readouterr().out
    assert "keep_weights 40" in shown and "steps" not in shown.replace("rule's steps", "")

    write, count = write_checkpoint, [0]

    def write_and_stop(*arguments: Any) -> None:
        write(*arguments)
        count[0] += 1
        if count[0] == 23:  # 16 epochs of the first fit, 4 after the cut, some rounds
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pyrobc.fit"], "write_checkpoint", write_and_stop)
        assert main(["compress", "--config", "run.yaml", "--output", "again"]) == 130
    assert list((here / "again" / "checkpoints" / "weights").iterdir())
    assert main(["compress", "--config", "run.yaml", "--output", "again"]) == 0
    assert (here / "again" / "plan.json").read_bytes() == (here / "out" / "plan.json").read_bytes()
    assert (here / "again" / "model.rbc").read_bytes() == (here / "out" / "model.rbc").read_bytes()
    assert not (here / "again" / "checkpoints").exists()


def test_options_win_over_the_file_and_words_are_checked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("0.1", "odds", "25", "null"):
        run = read_config("run.yaml", ["--keep_weights", option])
        assert run.keep_weights == {"0.1": 0.1, "odds": "odds", "25": 25, "null": None}[option]
    assert isinstance(read_config("run.yaml", ["--keep_weights", "25"]).keep_weights, int)
    for option in (["--keep_weights", "some"], ["--keep_weights", "0"], ["--coarseness", "-1"]):
        assert main(["compress", "--config", "run.yaml", *option]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and option[0][2:] in error
    assert not (here / "out" / "plan.json").exists()
