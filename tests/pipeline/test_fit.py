"""What training does, and what it refuses."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyrobc.batches import TensorLoader, count_rows, seeded
from pyrobc.errors import DataError, FitError, PyrobcError
from pyrobc.fit import fit
from pyrobc.lift import LiftedModel, lift
from pyrobc.models.mlp import build
from pyrobc.scores import score

FAMILIES = ["log_uniform", "group_horseshoe"]


def classes(rows: int = 120) -> tuple[Tensor, Tensor]:
    """Two informative features and three idle ones."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 5, generator=generator)
    return x, (x[:, 0] + 2 * x[:, 1] > 0).long()


def lifted(family: Any = "log_uniform", likelihood: str = "categorical", **kwargs: Any) -> LiftedModel:
    torch.manual_seed(2)
    return lift(build(5, (6,), 2), family, likelihood, torch.zeros(1, 5), **kwargs)


def quick(model: LiftedModel | None = None, data: Any = None, **options: Any) -> Any:
    options = {"epochs": 2, "progress": False} | options
    return fit(model or lifted(), classes() if data is None else data, **options)


@pytest.mark.parametrize("path", ["fast", "traced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_learns(family: str, path: Any) -> None:
    model = lifted(family)
    post = quick(model, epochs=40, lr=3e-2, batch_size=40, path=path)
    first, last = post.history[0], post.history[-1]
    assert last["elbo"] > first["elbo"] and last["error"] < 0.1
    x, y = classes()
    assert float((post.to_module()(x).argmax(1) != y).float().mean()) < 0.1
    assert [h["epoch"] for h in post.history] == list(range(1, 41))
    assert 0 <= last["groups"] <= model.spec.num_groups
    assert post.num_data == 120


@pytest.mark.parametrize("family", FAMILIES)
def test_both_paths_see_the_same_objective(family: str) -> None:
    """A learning rate of zero makes every epoch a draw of the ELBO of the start."""
    elbos = {
        path: np.array([h["elbo"] for h in quick(lifted(family), epochs=40, lr=0.0, path=path).history])
        for path in ("fast", "traced")
    }
    fast, traced = elbos["fast"], elbos["traced"]
    assert abs(fast.mean() - traced.mean()) < 4 * math.hypot(fast.std(), traced.std()) / math.sqrt(40) + 1e-4


def test_minibatches_are_scaled_to_the_data() -> None:
    whole = quick(epochs=1, lr=0.0, batch_size=120).history[0]["elbo"]
    parts = quick(epochs=1, lr=0.0, batch_size=8).history[0]["elbo"]
    assert parts == pytest.approx(whole, rel=0.02)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    a, b, c = (quick(seed=seed).guide.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize("seed", [0, 4_295, 2**32 - 1, 2**40])
def test_any_seed_will_do(seed: int) -> None:
    assert math.isfinite(quick(epochs=1, seed=seed).history[0]["elbo"])


@torch.no_grad()
def kl_at_the_start() -> float:
    model = lifted()
    return float(sum(model.family.kl(model.new_guide().distributions(), model.priors()).values()))


class Stream(IterableDataset[Any]):
    """Rows without a length, drawn from torch and numpy."""

    def __iter__(self) -> Iterator[Any]:
        for i in range(20):
            yield torch.randn(5) + float(np.random.rand()), i % 2  # noqa: NPY002


@pytest.mark.parametrize("kind", ["arrays", "loader", "stream"])
def test_random_states_outside_are_unchanged(kind: str) -> None:
    x, y = classes()
    data = {
        "arrays": (x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True),
        "stream": DataLoader(Stream(), batch_size=8),
    }[kind]
    held_out = DataLoader(TensorDataset(x, y), batch_size=64)
    before = pyro.util.get_rng_state()
    model = lifted()
    torch.manual_seed(0)
    before["torch"] = torch.get_rng_state()
    runs = [quick(model, data, validation=held_out, patience=5).history for model in (model, lifted())]
    torch.manual_seed(0)
    quick(model, data, validation=held_out, patience=5)
    after = pyro.util.get_rng_state()
    assert torch.equal(before["torch"], after["torch"]) and before["random"] == after["random"]
    assert all(np.array_equal(a, b) for a, b in zip(before["numpy"], after["numpy"], strict=True))
    assert runs[0] == runs[1]
    assert not list(pyro.get_param_store().keys())


def test_random_states_outside_survive_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(before, torch.get_rng_state())


def test_the_model_in_float64_stays_in_float64() -> None:
    post = quick(dtype=torch.float64)
    assert {p.dtype for p in post.guide.parameters()} == {torch.float64}
    assert post.to_module()(classes()[0].double()).dtype == torch.float64


def test_temperature_and_warm_up_weigh_the_kl() -> None:
    post = quick(epochs=5, temperature=0.5, warmup_epochs=3)
    assert [h["temperature"] for h in post.history] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    cold, warm = (quick(epochs=1, lr=0.0, temperature=t, batch_size=120).history[0]["elbo"] for t in (1e-9, 1.0))
    kl = kl_at_the_start()
    assert cold - warm == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("path", ["fast", "traced"])
def test_temperature_means_the_same_on_both_paths(path: Any) -> None:
    a, b = (quick(epochs=1, lr=0.0, temperature=t, batch_size=120, path=path).history[0]["elbo"] for t in (0.2, 0.7))
    kl = kl_at_the_start()
    assert a - b == pytest.approx(0.5 * kl, rel=1e-3)


def test_gradients_are_clipped() -> None:
    def plain(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0)

    model = lifted()
    start = torch.cat([p.detach().flatten() for p in model.new_guide().parameters()])
    post = quick(model, epochs=1, batch_size=120, clip_norm=1e-3, optimizer=plain)
    end = torch.cat([p.detach().flatten() for p in post.guide.parameters()])
    assert 1e-5 < float((end - start).norm()) <= 1e-3 * 1.001


def test_schedules_are_stepped_once_an_epoch() -> None:
    rates: list[float] = []

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        made = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        rates.append(0.0)
        schedules.append(made)
        return made

    schedules: list[Any] = []
    quick(epochs=3, lr=0.08, schedule=schedule, on_epoch=lambda _: rates.append(schedules[0].get_last_lr()[0]))
    assert rates[1:] == pytest.approx([0.04, 0.02, 0.01])


def test_early_stopping_restores_the_best() -> None:
    x, y = classes()
    post = quick(data=(x[:60], y[:60]), epochs=60, lr=0.3, validation=(x[60:], y[60:]), patience=3, batch_size=20)
    losses = [h["validation_loss"] for h in post.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 3 < 60
    with torch.no_grad():
        logits = post.to_module()(x[60:])
    assert float(nn.functional.cross_entropy(logits, y[60:])) == pytest.approx(losses[best], rel=1e-4)


def test_early_stopping_waits_for_the_warm_up() -> None:
    x, y = classes()
    post = quick(data=(x, y), epochs=9, lr=0.0, validation=(x, y), patience=2, warmup_epochs=4)
    assert len(post.history) == 5 + 2


def test_batch_norm_statistics_are_those_of_the_best_epoch() -> None:
    x, y = classes()
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    seen: list[Tensor] = []
    model = lift(net, "log_uniform", "categorical", x[:2])
    post = quick(
        model, (x, y), epochs=5, lr=10.0, clip_norm=1e3, validation=(x, y), patience=3,
        on_epoch=lambda _: seen.append(model.net[1].running_mean.clone()),
    )  # fmt: skip
    best = int(np.argmin([h["validation_loss"] for h in post.history]))
    assert best < len(seen) - 1, "the best must not be the last for this to test anything"
    assert torch.equal(post.model.net[1].running_mean, seen[best])
    assert torch.equal(post.to_module()[1].running_mean, seen[best])


def test_a_guide_can_be_trained_on() -> None:
    model = lifted()
    post = quick(model, epochs=3)
    again = quick(model, epochs=1, guide=post.guide, lr=0.0)
    assert all(torch.equal(a, b) for a, b in zip(post.guide.parameters(), again.guide.parameters(), strict=True))


def test_progress_shows_what_counts(capsys: pytest.CaptureFixture[str]) -> None:
    fit(lifted(), classes(), epochs=1)
    text = capsys.readouterr().err
    assert "fit log_uniform" in text and all(word in text for word in ("ELBO=", "error=", "groups="))
    quick()
    assert capsys.readouterr() == ("", "")


NAN = torch.tensor([[1.0, 2.0, float("nan"), 0.0, 0.0]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(0, 5), torch.zeros(0).long()), "data: got no rows"),
        ([], "got no rows"),
        ((NAN, torch.tensor([0])), "inputs: got NaN or infinite"),
        ((NAN.nan_to_num(torch.inf), torch.tensor([0])), "inputs: got NaN or infinite"),
        ((torch.zeros(4, 5), torch.zeros(3).long()), "got 4 inputs and 3 targets"),
        ([(torch.zeros(4, 5), torch.zeros(3).long())], "got 4 inputs and 3 targets"),
        ((torch.zeros(4, 6), torch.zeros(4).long()), r"got a batch of shape \(4, 6\); allowed: .*\(rows, 5\)"),
        ((torch.zeros(4, 5), torch.tensor([0, 1, 2, 1])), "labels: got values from 0 to 2; allowed: 0 to 1"),
        ((torch.zeros(4, 5), torch.tensor([0, 1, -1, 1])), "labels: got values from -1 to 1"),
        ((torch.zeros(4, 5), torch.tensor([0.0, 1.0, 0.0, 1.0])), "labels: got torch.float32"),
        ((torch.zeros(4, 5), torch.zeros(4, 2).long()), r"labels: got torch.int64 of shape \(4, 2\)"),
        (3, "data: got int; allowed: a loader"),
    ],
)
def test_data_that_cannot_be_used_are_refused(data: Any, message: str) -> None:
    model = lifted()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(DataError, match=message) as caught:
        quick(model, data)
    assert caught.value.fix
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_bad_rows_in_a_later_batch_are_refused_too() -> None:
    x, y = classes()
    x[100] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        quick(data=DataLoader(TensorDataset(x, y), batch_size=10))


def test_data_are_checked_again_after_a_resume(tmp_path: Any) -> None:
    quick(epochs=1, checkpoint=tmp_path / "run.pt")
    x, y = classes()
    with pytest.raises(DataError, match="NaN"):
        quick(data=(x * torch.nan, y), epochs=2, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: got 0; allowed: 1 or more"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"patience": 3}, "patience=3 without validation"),
        ({"seed": -1}, "seed: got -1"),
        ({"path": "fats"}, "did you mean 'fast'"),
        ({"lr": 1e9, "epochs": 5}, "training: got .*epoch.*batch.*fix: lower lr"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        quick(lifted("group_horseshoe"), **options)


def test_parameters_that_are_not_finite_never_reach_a_checkpoint(tmp_path: Any) -> None:
    def explode(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=math.inf)

    with pytest.raises(FitError, match="parameters that are not finite"):
        quick(optimizer=explode, batch_size=120, checkpoint=tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def test_every_refusal_is_one_of_ours() -> None:
    assert issubclass(DataError, PyrobcError) and issubclass(FitError, PyrobcError)


def test_loaders_of_tensors_cover_every_row_once() -> None:
    x = torch.arange(10)
    loader = TensorLoader(x, x, batch_size=4)
    seen = [batch for batch, _ in loader]
    assert len(loader) == 3 and [len(b) for b in seen] == [4, 4, 2]
    assert sorted(torch.cat(seen).tolist()) == list(range(10)) and torch.cat(seen).tolist() != list(range(10))
    assert torch.equal(torch.cat([b for b, _ in TensorLoader(x, x, 4, shuffle=False)]), x)


def test_a_subset_sampler_counts_what_it_draws() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.zeros(64).long())
    sampler = torch.utils.data.SubsetRandomSampler(range(20))
    assert count_rows(torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler)) == 20


@pytest.mark.parametrize("family", ["log_uniform", "group_normal_jeffreys", "group_horseshoe"])
def test_products_in_bfloat16_give_nearly_the_same_fit(family):
    """Parameters, divergences and scores keep their precision; only the network's products lose theirs."""
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    fits, seen = [], []
    for autocast in (False, True):
        with seeded(1):
            net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
        model = lift(net, family, "categorical", x[:1])
        net_of_fit = model.net[2]
        handle = net_of_fit.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        fits.append(fit(model, (x, y), epochs=15, lr=2e-2, batch_size=100, autocast=autocast, progress=False))
        handle.remove()
    assert torch.bfloat16 in seen and torch.float32 in seen
    plain, half = fits
    assert all(p.dtype == torch.float32 for p in half.guide.parameters())
    assert half.history[-1]["elbo"] == pytest.approx(plain.history[-1]["elbo"], rel=0.05)
    assert half.history[-1]["elbo"] != plain.history[-1]["elbo"]
    odds = [torch.as_tensor(score(one).log_odds()["input"]) for one in fits]
    assert ((odds[0] > 0) == (odds[1] > 0)).double().mean() >= 5 / 6


def test_the_divergence_is_not_autocast():
    x, y = torch.randn(20, 6), torch.zeros(20, dtype=torch.long)
    model = lift(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "log_uniform", "categorical", x[:1])
    kls, family_kl = [], model.family.kl

    def record(*arguments):
        assert not torch.is_autocast_enabled("cpu")
        kls.append(family_kl(*arguments))
        return kls[-1]

    model.family.kl = record
    fit(model, (x, y), epochs=1, autocast=True, progress=False)
    assert kls and all(value.dtype == torch.float32 for value in kls[0].values())
    assert not torch.is_autocast_enabled("cpu")


def test_paths_that_cannot_be_autocast_are_refused():
    x = torch.randn(20, 6)
    model = lift(nn.Sequential(nn.Linear(6, 2)), "moment_propagation", "categorical", x[:1])
    with pytest.raises(FitError, match="autocast: got path='moments'"):
        fit(model, (x, torch.zeros(20, dtype=torch.long)), epochs=1, autocast=True, progress=False)
