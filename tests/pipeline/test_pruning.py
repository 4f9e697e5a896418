"""Groups that leave while a network is fitted, or step by step afterwards; published rules beside posterior odds."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrobc.baselines import list_baselines
from pyrobc.batches import seeded
from pyrobc.compress import compress
from pyrobc.errors import ReductionError
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.groups import Kept
from pyrobc.guides.log_uniform import RELEASED_PROBABILITY
from pyrobc.lift import LiftedModel, lift
from pyrobc.objective import fast_loss, traced_loss
from pyrobc.posterior import Posterior
from pyrobc.pruning import PruneEachEpoch, prune_in_steps
from pyrobc.scores import score
from pyrobc.surgery import apply
from pyrobc.training import Training


def make_data() -> tuple[Tensor, Tensor]:
    with seeded(7):
        x = torch.randn(300, 6)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def make_model(**settings: Any) -> LiftedModel:
    with seeded(0):
        net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 2))
    return lift(net, make_family("log_uniform", **{"gate_lr": 3.0} | settings), "categorical", torch.zeros(1, 6))


def run(prune: Any, epochs: int = 30, **settings: Any) -> Posterior:
    shared = {"lr": 5e-2, "batch_size": 100, "progress": False} | settings
    return fit(make_model(), make_data(), epochs=epochs, prune=prune, **shared)


def drop_hidden(posterior: Posterior) -> Kept | None:
    """One hidden unit of the first layer after every epoch, down to three."""
    kept = posterior.model.spec.everything()
    kept["0"] = kept["0"][: max(3, len(kept["0"]) - 1)]
    return kept


def test_a_cut_slices_every_moment_and_keeps_the_rest() -> None:
    x, y = make_data()
    model = make_model()
    guide = model.new_guide()
    optimizer = torch.optim.Adam(guide.parameter_groups(), lr=1e-2)
    training = Training(model, guide, optimizer, anneal(9)(optimizer))
    loss = fast_loss(model, guide, 300)
    for _ in range(3):
        optimizer.zero_grad()
        loss(x, y, 1.0).backward()
        optimizer.step()
    before = {site: copy.deepcopy(factor) for site, factor in guide.by_site().items()}
    moments = {
        (site, name): optimizer.state[p]["exp_avg"].clone()
        for site, factor in guide.by_site().items()
        for name, p in factor.named_parameters()
    }
    kept = {"input": np.array([0, 1, 5]), "0": np.array([2, 7]), "2": np.arange(5)}
    training.cut_(kept)
    rows, columns = torch.tensor([2, 7]), torch.tensor([0, 1, 5])
    small = training.guide.by_site()
    weight = optimizer.state[small["0.weight"].value]
    assert torch.equal(small["0.weight"].value, before["0.weight"].value[rows][:, columns])
    assert torch.equal(weight["exp_avg"], moments["0.weight", "value"][rows][:, columns]) and weight["step"] == 3
    assert torch.equal(optimizer.state[small["0.gate"].loc]["exp_avg"], moments["0.gate", "loc"][rows])
    assert torch.equal(optimizer.state[small["4.bias"].value]["exp_avg"], moments["4.bias", "value"])
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in training.guide.parameters()} == {id(p) for p in optimizer.state}
    assert [len(optimizer.param_groups[i]["params"]) for i in (0, 1)] == [6, 6]
    bias = small["4.bias"].value.detach().clone()
    loss = fast_loss(training.model, training.guide, 300)
    optimizer.zero_grad()
    loss(x, y, 1.0).backward()
    optimizer.step()
    assert not torch.equal(bias, small["4.bias"].value)
    assert training.kept["0"].tolist() == [2, 7]


def test_a_rule_that_keeps_everything_changes_nothing() -> None:
    plain, ruled = run(None, 4), run(lambda posterior: None, 4)
    for a, b in zip(plain.guide.parameters(), ruled.guide.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ruled.history[-1]["parameters"] == 6 * 10 + 10 + 55 + 12


def test_groups_leave_the_network_the_kl_and_the_cost() -> None:
    posterior = run(drop_hidden, 9)
    widths = (9, 8, 7, 6, 5, 4, 3, 3, 3)
    assert [h["parameters"] for h in posterior.history] == [7 * w + 5 * w + 5 + 12 for w in widths]
    assert posterior.history[-1]["macs"] == 6 * 3 + 15 + 10
    assert posterior.model.priors()["0.gate"].event_shape == (3,)
    assert posterior.to_module()[0].weight.shape == (3, 6)


def test_continuous_pruning_finds_the_inputs_that_matter_and_records_why() -> None:
    rule = PruneEachEpoch(stop_after=50)
    posterior = run(rule, 60)
    plan = rule.plan
    assert plan is not None and plan.kept()["input"] == [0, 1]
    assert plan.explain("input[4]").startswith("input[4]: prune: log odds of being negligible")
    assert plan.widths["0"][1] == posterior.model.spec.block("0").size < 10
    shapes = {name: tuple(t.shape) for name, t in apply(plan, make_model().template).state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in posterior.to_module().state_dict().items()}
    assert plan.parameters[1] == posterior.history[-1]["parameters"] < posterior.history[0]["parameters"]
    assert len(set(plan.notes)) == len(plan.notes)
    x, y = make_data()
    assert float((posterior.to_module()(x).argmax(1) != y).float().mean()) < 0.05


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_that_is_killed_resumes_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    class Kill(Exception):
        pass

    def die(numbers: dict[str, float]) -> None:
        if numbers["epoch"] == stop:
            raise Kill

    settings = {"checkpoint": tmp_path / "fit.pt", "schedule": anneal(8)}
    rule = PruneEachEpoch("below4", "none")
    straight = run(rule, 8, schedule=anneal(8))
    with pytest.raises(Kill):
        run(PruneEachEpoch("below4", "none"), 8, on_epoch=die, **settings)
    again = PruneEachEpoch("below4", "none")
    resumed = run(again, 8, **settings)
    assert resumed.history == straight.history and again.plan == rule.plan
    for a, b in zip(straight.guide.parameters(), resumed.guide.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_are_nested_stop_where_the_score_does_and_leave_the_start_alone(compressed: Any) -> None:
    start = {k: v.clone() for k, v in compressed.posterior.guide.state_dict().items()}
    steps = list(prune_in_steps(compressed.posterior, compressed.data, steps=3, epochs=1, lr=1e-2, progress=False))
    assert all(torch.equal(v, start[k]) for k, v in compressed.posterior.guide.state_dict().items())
    odds = np.concatenate(list(compressed.score.log_odds().values()))
    removed = [sum(a - b for a, b in step.plan.widths.values()) for step in steps]
    assert removed[-1] <= (odds > 0).sum() and removed == sorted(removed) and all(step.is_wanted for step in steps)
    for before, after in zip(steps[:-1], steps[1:], strict=True):
        assert all(set(after.plan.kept()[n]) <= set(groups) for n, groups in before.plan.kept().items())
    for step in steps:
        sizes = {b.name: b.size for b in step.posterior.model.spec.blocks}
        assert sizes == {name: after for name, (_, after) in step.plan.widths.items()}
    beyond = list(prune_in_steps(compressed.posterior, compressed.data, counts=[4, 20], epochs=0))
    assert [step.is_wanted for step in beyond] == [True, False]
    assert all(after >= 1 for _, after in beyond[-1].plan.widths.values())  # a layer keeps its best group


def test_published_rules_are_posterior_odds_of_a_kind(compressed: Any) -> None:
    spike = score(compressed.posterior, "spike")
    released, bare = spike.log_odds(RELEASED_PROBABILITY), spike.log_odds("none")
    for name, delta_f in spike.delta_f.items():
        np.testing.assert_allclose(released[name], delta_f + 0.5 * math.log(2 * math.pi), rtol=1e-12)
        np.testing.assert_array_equal(bare[name], delta_f)
    uniform = score(compressed.posterior, "uniform8")
    for name, scale in compressed.posterior.scales().items():
        q = scale.posterior.log_mass(-23 * math.log(2), -8 * math.log(2)).exp()
        p = 15 * math.log(2) / 20
        np.testing.assert_array_equal(uniform.log_odds("none")[name] > 0, (q > p).numpy())
    with pytest.raises(ReductionError, match="'learned' or a probability"):
        spike.log_odds("implied")


def test_mass_below_the_smallest_float_counts_when_asked_for() -> None:
    posterior = run(None, 1)
    for factor in posterior.guide.by_site().values():
        if hasattr(factor, "log_scale"):
            factor.loc.data.fill_(-20.0)
            factor.log_scale.data.fill_(math.log(0.5))
    published, counted = (score(posterior, label).delta_f["0"] for label in ("uniform8", "below8"))
    np.testing.assert_allclose(published, -34.6, atol=0.1)
    np.testing.assert_allclose(counted, 0.325, atol=1e-3)


@pytest.mark.parametrize("label", ["l2", "magnitude"])
def test_norms_are_those_of_the_weights_that_make_a_group(compressed: Any, label: str) -> None:
    found = score(compressed.posterior, label)
    mean = compressed.posterior.mean()
    weight = mean.parameters["0.weight"].detach().double()
    rows = weight * mean.gates["0"].double()[:, None]
    expected = rows.norm(dim=1) if label == "l2" else rows.abs().mean(1)
    np.testing.assert_allclose(found.delta_f["0"], -np.log(expected.numpy()), rtol=1e-6)
    columns = weight.T * mean.gates["input"].double()[:, None]
    expected = columns.norm(dim=1) if label == "l2" else columns.abs().mean(1)
    np.testing.assert_allclose(found.delta_f["input"], -np.log(expected.numpy()), rtol=1e-6)
    assert label in list_baselines(compressed.posterior.model.family)


def test_a_published_cut_is_that_of_the_publication(compressed: Any) -> None:
    noise = score(compressed.posterior, "log_noise", cut="published")
    closure = score(compressed.posterior, "log_closure", cut="published")
    own = score(compressed.posterior, "l2", cut={"input": 1.0, "0": -1.0, "2": 0.0})
    for name, scale in compressed.posterior.scales().items():
        law = scale.posterior
        snr = (law.mean / law.variance.sqrt()).numpy()
        clear = np.abs(snr - 1) > 1e-6
        np.testing.assert_array_equal((noise.log_odds()[name] > 0)[clear], (snr < 1)[clear])
        np.testing.assert_array_equal(closure.log_odds()[name] > 0, (law.mean < 0.1).numpy())
    np.testing.assert_allclose(own.log_odds()["0"], own.delta_f["0"] + 1.0)
    with pytest.raises(ReductionError, match="cut of the baseline 'l2': got 'published'"):
        score(compressed.posterior, "l2", cut="published")


def test_the_released_weights_of_the_kl_are_means_over_groups_and_blocks() -> None:
    x, y = make_data()
    plain, mean = make_model(), make_model(kl_scale="mean")
    guide = plain.new_guide()
    kls = plain.family.kl(guide.distributions(), plain.priors())
    gates = [value / plain.spec.block(site.removesuffix(".gate")).size for site, value in kls.items() if "gate" in site]
    others = sum(value for site, value in kls.items() if "gate" not in site)
    for road in (fast_loss, traced_loss):
        with seeded(1):
            elbo = road(plain, guide, 300)(x, y, 1.0)
        with seeded(1):
            released = road(mean, guide, 300)(x, y, 1.0)
        expected = elbo - sum(kls.values()) + others + 300 * sum(gates) / len(gates)
        torch.testing.assert_close(released, expected, rtol=1e-5, atol=1e-2)
    assert score(Posterior(mean, guide, 300)).provenance["kl_weights"] == {
        "input.gate": 300 / 18,
        "0.gate": 10.0,
        "2.gate": 20.0,
    }


def test_scoring_and_counting_change_nothing(compressed: Any) -> None:
    posterior = compressed.posterior
    before = copy.deepcopy((posterior.guide.state_dict(), posterior.model.state_dict(), posterior.model.training))
    for label in (*posterior.model.family.reduced(), *list_baselines(posterior.model.family)):
        score(posterior, label)
    posterior.model.spec.forecast(compressed.plan.kept())
    for a, b in zip(before[:2], (posterior.guide.state_dict(), posterior.model.state_dict()), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    assert posterior.model.training == before[2]


def test_compress_decides_by_the_bare_bayes_factor_when_asked() -> None:
    model = make_model()
    result = compress(
        model.template, make_data(), family=model.family, reduction="below4", prior_odds="none", epochs=2, lr=5e-2,
        batch_size=100, readapt_epochs=0, num_draws=30, progress=False,
    )  # fmt: skip
    assert result.plan.rule["prior_odds"] == "none"
    assert all(block.log_odds == block.delta_f for block in result.plan.blocks)


def test_compress_prunes_along_the_way_and_resumes(tmp_path: Path) -> None:
    model = make_model()
    settings: dict[str, Any] = {
        "family": model.family, "epochs": 60, "lr": 5e-2, "batch_size": 100, "readapt_epochs": 2, "num_draws": 30,
        "progress": False, "prune_each_epoch": True, "output": tmp_path,
    }  # fmt: skip
    result = compress(model.template, make_data(), **settings)
    assert result.history[59]["parameters"] < result.history[0]["parameters"] == result.plan.parameters[0]
    assert result.plan.kept()["input"] == [0, 1]
    assert result.plan.explain("input[3]").startswith("input[3]: prune")
    shapes = {name: tuple(tensor.shape) for name, tensor in result.net.state_dict().items()}
    cut = apply(result.plan, model.template).state_dict()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in cut.items()}
    again = compress(model.template, make_data(), **settings)
    assert again.plan == result.plan and again.history == result.history
