"""Settings and rows that make no sense are refused before anything is trained."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import pyrobc as bc
from pyrobc.batches import TensorLoader
from pyrobc.errors import CheckpointError, ConfigError, DataError, FamilyError, FitError, PlanError, PyrobcError
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
        {"lr": "0.01"}, {"epochs": True}, {"seed": 2**64}, {"dtype": torch.float16}, {"dtype": "float64"},
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
        {"num_draws": 100.0}, {"rounds": 1.5}, {"round_to": 2.5}, {"epsilon": "0.01"}, {"budget": 0.1}, {"budget": 0},
        {"device": "gpu"},
    ],
    ids=str,
)  # fmt: skip
def test_compress_refuses_what_would_fail_after_the_fit(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        bc.compress(network(), (X, Y), **NEVER | setting)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("log_uniform", {"num_draws": "many"}), ("log_uniform", {"num_draws": -1}), ("log_uniform", {"num_draws": 2.5}),
        ("log_uniform", {"gate_lr": "many"}), ("group_horseshoe", {"slab": "x"}), ("group_horseshoe", {"scale_lr": -1}),
        ("group_normal_jeffreys", {"divergence": -1}), ("turbo_vbi", {"learns": "yes"}),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_family_of_another_kind(family, settings):
    name = next(iter(settings))
    with pytest.raises(FamilyError, match=rf"setting '{name}' of family '{family}'.*the default, or leave it out"):
        bc.compress(network(), (X, Y), family=family, family_args=settings, **NEVER)


def test_classes_where_instances_are_wanted():
    with pytest.raises(FamilyError, match=r"pass an instance, LogUniform\(\)"):
        bc.lift(network(), bc.families.LogUniform, "categorical", X[:1])
    model = bc.lift(network(), "log_uniform", "categorical", X[:1])
    for wrong in (True, bc.PruneEachEpoch):
        with pytest.raises(ConfigError, match=r"pass PruneEachEpoch\(\)"):
            bc.fit(model, (X, Y), prune=wrong, **NEVER)


class Dictionaries(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": X[index], "y": Y[index]}


WRONG_DATA = {
    "inputs alone": X,
    "array alone": X.numpy(),
    "dictionary": {"x": X, "y": Y},
    "dictionaries": torch.utils.data.DataLoader(Dictionaries(), 4),
    "no targets": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), 4),
    "once": zip(X.split(8), Y.split(8), strict=True),
    "arrays in batches": [(X.numpy(), Y.numpy())],
    "words": (X, np.array(["a", "b"] * 20)),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_of_another_kind(name):
    with pytest.raises(DataError, match="got .*allowed: .*fix: "):
        bc.compress(network(), WRONG_DATA[name], **NEVER)
    if name != "words":
        model = bc.lift(network(), "log_uniform", "categorical", X[:1])
        with pytest.raises(DataError, match="got .*allowed: .*fix: "):
            bc.fit(model, WRONG_DATA[name], **NEVER)


def test_lists_of_two_arrays_and_labels_in_bytes_are_taken():
    for data in ([X, Y], (X.numpy(), Y.numpy().astype(np.uint8)), (X, Y.to(torch.int32)), (X, Y > 0)):
        bc.compress(network(), data, epochs=1, num_draws=25, progress=False)


def test_a_last_row_alone_joins_the_batch_before_it():
    loader = TensorLoader(X[:33], Y[:33], batch_size=16)
    assert [len(y) for _, y in loader] == [16, 17] and len(loader) == 2
    assert [len(y) for _, y in TensorLoader(X[:1], Y[:1], batch_size=16)] == [1]
    assert [len(y) for _, y in TensorLoader(X[:3], Y[:3], batch_size=1)] == [1, 1, 1]
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    bc.fit(bc.lift(net, "log_uniform", "categorical", X[:1]), (X[:33], Y[:33]), epochs=1, batch_size=16, progress=False)


def test_the_network_given_keeps_its_statistics_and_modes():
    """A network in training mode: neither the table's timing nor the checks of rows may train its batch norm."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    net.train()
    net[1].eval()  # frozen by its owner
    for frozen in (False, True):
        net[1].train(not frozen)
        before = copy.deepcopy(net.state_dict())
        rows = (5 + 3 * X, Y)
        result = bc.compress(net, (X, Y), test=rows, validation=rows, epochs=1, num_draws=25, progress=False)
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert net.training and net[0].training and net[1].training is not frozen
        twin = copy.deepcopy(net).eval()
        assert result.table[0]["error"] == pytest.approx(float((twin(rows[0]).argmax(1) != Y).float().mean()))
    with pytest.raises(DataError):
        bc.compress(net, (X, Y), test=(X, Y + 5), **NEVER)
    assert net.training and not net[1].training


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
    model = bc.lift(network(), "log_uniform", "categorical", X[:1])
    posterior = bc.fit(model, (X, Y), epochs=1, progress=False)
    scored = bc.score(posterior)
    plan = bc.decide(scored)
    for call, words in (
        (lambda: bc.score(model), "what bc.fit returns"),
        (lambda: bc.evidence(scored, posterior, (X, Y)), r"evidence\(posterior, score, data\)"),
        (lambda: bc.decide(posterior), "what bc.score returns"),
        (lambda: bc.apply(network(), plan), r"apply\(plan, net\)"),
        (lambda: bc.compare(network(), (X, Y), "categorical"), "networks by name"),
        (lambda: bc.add_levels(plan, scored, 0.5), "for one"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


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


def test_a_checkpoint_knows_its_network(tmp_path):
    """Weights, and what the network computes with them: another activation has the same tensors."""

    def run(net):
        model = bc.lift(net, "log_uniform", "categorical", X[:1])
        return bc.fit(model, (X, Y), epochs=1, checkpoint=tmp_path / "c.pt", progress=False)

    run(network_of_one_seed())
    run(network_of_one_seed())
    torch.manual_seed(1)
    bent = network_of_one_seed()
    bent[1] = nn.Tanh()
    for other in (network(), bent):
        with pytest.raises(CheckpointError, match="parameters and outputs before the fit"):
            run(other)


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
