"""What is read and drawn from a fitted network."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrobc.calling import evaluating
from pyrobc.family import Effective
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.posterior import Posterior, measure_input_rms
from pyrobc.slicing import slice_groups

FAMILIES = ["log_uniform", "group_horseshoe"]
X = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
                         nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))  # fmt: skip


def fitted(family: str) -> Posterior:
    return fit(lift(network(), family, "categorical", X[:1]), (X, Y), epochs=2, batch_size=10, progress=False)


KEPT = {"0": np.array([0, 2]), "5": np.array([1, 2, 3])}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihood_of_a_cut_is_that_of_the_cut_network(family: str) -> None:
    post = fitted(family)
    for seed in (1, 2):
        values = post.draw(seed)
        found = post.log_likelihood(X, Y, values, KEPT)
        effective = post.model.family.combine(values, post.model.spec)
        small = slice_groups(post.model.to_module(effective), post.model.spec, KEPT)
        expected = torch.log_softmax(small(X), 1)[torch.arange(20), Y]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    whole = post.log_likelihood(X, Y, values, post.model.spec.everything())
    assert whole.shape == (20,) and not torch.allclose(whole, found)
    assert not whole.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihood_takes_any_real_dtype(family: str) -> None:
    post = fitted(family)
    values, everything = post.draw(1), post.model.spec.everything()
    assert torch.equal(
        post.log_likelihood(X.double(), Y, values, everything), post.log_likelihood(X, Y, values, everything)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_network_is_the_lifted_one_at_its_mean(family: str) -> None:
    post = fitted(family)
    with torch.no_grad(), evaluating(post.model):
        torch.testing.assert_close(post.to_module()(X), post.model.run(post.mean(), X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_are_float64_without_gradients_and_leave_the_guide_alone(family: str) -> None:
    post = fitted(family)
    for scale in post.scales().values():
        assert scale.posterior.mean.dtype == torch.float64 and not scale.posterior.mean.requires_grad
        assert scale.prior.cdf(torch.tensor(0.5).double()).dtype == torch.float64
    assert {p.dtype for p in post.guide.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in post.guide.parameters())


def test_input_rms_equals_a_loop_over_rows() -> None:
    post = fitted("log_uniform")
    mean = post.mean()
    plain = post.model.to_module(
        Effective({b.name: torch.ones(b.size) for b in post.model.spec.blocks}, mean.parameters)
    )
    gates = mean.gates
    with torch.no_grad():
        after_conv = torch.relu(plain[1](plain[0](X))).flatten(1)
        hidden = torch.relu(plain[5](after_conv * gates["0"].repeat_interleave(4)))
    found = measure_input_rms(post.model, mean, [(X[:7], Y[:7]), (X[7:], Y[7:])])
    expected: dict[str, Tensor] = {"0.weight": X.square().mean((0, 2, 3)), "5.weight": after_conv.square().mean(0),
                                   "7.weight": hidden.square().mean(0)}  # fmt: skip
    assert found.keys() == expected.keys()
    for name, power in expected.items():
        torch.testing.assert_close(found[name].float(), power.sqrt(), rtol=1e-4, atol=1e-6)


def test_input_rms_stops_after_enough_rows() -> None:
    post = fitted("log_uniform")
    part = measure_input_rms(post.model, post.mean(), [(X[:7], Y[:7]), (X[7:], Y[7:])], max_rows=5)
    first = measure_input_rms(post.model, post.mean(), [(X[:7], Y[:7])])
    assert all(torch.equal(part[n], first[n]) for n in first)
    assert not any(layer._forward_pre_hooks for layer in post.model.net.modules()), "hooks were left behind"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restricted_posterior_is_the_cut_mean_network_and_can_be_trained_on(family: str) -> None:
    post = fitted(family)
    small = post.restricted(KEPT)
    expected = slice_groups(post.to_module(), post.model.spec, KEPT)
    with torch.no_grad():
        torch.testing.assert_close(small.to_module()(X), expected(X), rtol=1e-4, atol=1e-5)
    assert small.num_data == post.num_data and small.history == post.history
    assert {n: len(t) for n, t in small.input_rms.items()} == {"0.weight": 1, "5.weight": 8, "7.weight": 3}
    again = fit(small.model, (X, Y), epochs=1, guide=small.guide, batch_size=10, progress=False)
    assert again.thresholds(1e-2)["0"].shape == (2,)
    rms = again.input_rms["5.weight"]
    assert rms.shape == (8,)
    before = {n: t.clone() for n, t in post.guide.state_dict().items()}
    assert all(torch.equal(before[n], t) for n, t in post.guide.state_dict().items())


def test_evaluating_puts_the_mode_back_after_an_error() -> None:
    model = lift(network(), "log_uniform", "categorical", X[:1]).train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.net.training and not model.net[3].training
        raise ZeroDivisionError
    assert model.net.training and model.net[3].training
