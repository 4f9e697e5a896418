"""Settings and rows that make no sense are refused before anything is trained."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import pyrobc as bc
from pyrobc.errors import CheckpointError, ConfigError, DataError, FitError, PlanError, PyrobcError
from pyrobc.plan import Plan


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


X, Y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
NEVER = {"progress": False, "epochs": 10**9}  # a run that is not refused at once would never end


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0}, {"epochs": 1.5}, {"seed": -1}, {"lr": -1.0}, {"lr": float("nan")},
        {"clip_norm": -1.0}, {"warmup_epochs": -5}, {"patience": 0}, {"batch_size": 0}, {"temperature": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_fit_refuses(setting):
    model = bc.lift(network(), "log_uniform", "categorical", X[:1])
    with pytest.raises(FitError, match=next(iter(setting))):
        bc.fit(model, (X, Y), **NEVER | setting)
    with pytest.raises(FitError, match=next(iter(setting))):
        bc.compress(network(), (X, Y), **NEVER | setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"epsilon": 0.0}, {"epsilon": 2.0}, {"prior_odds": 0.0}, {"prior_odds": "implid"}, {"num_draws": 10},
        {"evidence_rows": 0}, {"reduction": "ropes"}, {"rounds": 0}, {"readapt_epochs": -1}, {"max_worse": -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_compress_refuses_what_would_fail_after_the_fit(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        bc.compress(network(), (X, Y), **NEVER | setting)


@pytest.mark.parametrize("role", ["test", "validation"])
@pytest.mark.parametrize(
    "rows", [(X[:0], Y[:0]), (X * torch.nan, Y), (X, Y + 1), (X, Y - 1), (X[:, :3], Y), (X, Y.double())], ids=range(6)
)
def test_rows_that_are_not_trained_on_are_checked_too(role, rows):
    with pytest.raises(DataError):
        bc.compress(network(), (X, Y), **NEVER, **{role: rows})


@pytest.mark.parametrize("data", [[], (X[:0], Y[:0])], ids=["list", "arrays"])
def test_no_rows(data):
    with pytest.raises(DataError, match="no rows"):
        bc.compress(network(), data, **NEVER)


def test_things_of_another_kind():
    for wrong in ("net", nn.Linear):
        with pytest.raises(PyrobcError, match=r"torch\.nn\.Module"):
            bc.compress(wrong, (X, Y), **NEVER)
    with pytest.raises(ConfigError, match="what bc.lift returns"):
        bc.fit(network(), (X, Y), epochs=1)


def test_double_arrays_are_taken():
    result = bc.compress(network(), (X.double().numpy(), np.asarray(Y)), epochs=1, num_draws=25, progress=False)
    assert next(result.net.parameters()).dtype == torch.float32


def test_a_checkpoint_knows_its_data_its_schedule_and_its_length(tmp_path):
    def cosine(epochs):
        return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def run(x, epochs, length):
        model = bc.lift(network_of_one_seed(), "log_uniform", "categorical", X[:1])
        options = {"schedule": cosine(length), "checkpoint": tmp_path / "c.pt", "progress": False}
        return bc.fit(model, (x, Y), epochs=epochs, **options)

    run(X, 3, 3)
    with pytest.raises(CheckpointError, match="schedule"):
        run(X, 6, 6)
    with pytest.raises(CheckpointError, match="data"):
        run(X + 5, 3, 3)
    with pytest.raises(CheckpointError, match="3 epochs, more than the 2"):
        run(X, 2, 3)


def network_of_one_seed() -> nn.Module:
    torch.manual_seed(0)
    return network()


def test_a_plan_must_leave_what_it_announces(compressed):
    plan, net = compressed.plan, compressed.posterior.to_module()
    first = plan.slices[0]
    fewer = dataclasses.replace(plan, slices=plan.slices[1:])
    with pytest.raises(PlanError):
        bc.apply(fewer, copy.deepcopy(net))
    for change in ({"slices": ()}, {"blocks": ()}, {"macs": (-1, -2)}, {"parameters": (1, 2)}):
        with pytest.raises(PlanError):
            Plan.from_json(dataclasses.replace(plan, **change).to_json())
    assert first in plan.slices
