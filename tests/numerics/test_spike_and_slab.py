"""Spike-and-slab gates and scales: laws, divergences and gradients against quadrature, then recovery and surgery."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyrobc as bc
from pyrobc.bmr import reduce
from pyrobc.demo import load_digits
from pyrobc.dists import GammaRatioRoot, GatedNormal, SpikeAndSlab, Switch, interval_log_mass
from pyrobc.dists.switch import switch_on
from pyrobc.errors import FamilyError
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.lift import LiftedModel, lift
from pyrobc.models.mlp import build
from pyrobc.objective import fast_loss
from pyrobc.posterior import Posterior
from pyrobc.scores import score

SIGNIFICANCE = 1e-4
FAMILIES = ("spike_and_slab_lasso", "spike_and_slab_horseshoe")

every_slab = pytest.mark.parametrize("name", FAMILIES)
log_odds = st.floats(-12.0, 12.0)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def switch(theta: float, prior: float, temperature: float = 0.5) -> Switch:
    return Switch(double(theta), double(prior), temperature)


def small_model(name: str, **settings: float) -> LiftedModel:
    net = build(4, (5, 4), 3).double()
    return lift(net, make_family(name, **settings), "categorical", torch.randn(1, 4).double(), prune_inputs=False)


@given(log_odds, log_odds)
@settings(max_examples=30)
def test_a_switch_costs_what_its_gate_costs(theta: float, prior: float) -> None:
    q, p = switch(theta, prior), switch(prior, prior)
    gates = [torch.distributions.Bernoulli(logits=double(v)) for v in (theta, prior)]
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(*gates), rtol=1e-7, atol=1e-12)

    def integrand(x: float) -> float:
        value = double(x)
        return math.exp(float(q.log_prob(value))) * float(q.log_prob(value) - p.log_prob(value))

    by_hand = quad(integrand, -60, 0, limit=200)[0] + quad(integrand, 1e-12, 60, limit=200)[0]
    assert float(kl_divergence(q, p)) == pytest.approx(by_hand, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("theta", "prior"), [(0.0, 0.0), (1.5, -4.0), (-2.0, -6.0), (6.0, -6.0), (-3.0, 2.0)])
def test_draws_of_a_switch_follow_its_density(theta: float, prior: float) -> None:
    draws = switch(theta, prior).sample(torch.Size([20_000])).flatten()
    gamma = float(torch.sigmoid(double(theta)))
    count = int((draws > 0).sum())
    assert scipy.stats.binomtest(count, len(draws), gamma).pvalue > SIGNIFICANCE
    law = scipy.stats.logistic(prior)
    for side, low, high in ((draws[draws <= 0], 0.0, law.cdf(0.0)), (draws[draws > 0], law.cdf(0.0), 1.0)):
        if len(side) > 50:
            rank = (law.cdf(side.numpy()) - low) / (high - low)
            assert scipy.stats.kstest(rank, "uniform").pvalue > SIGNIFICANCE


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_gradient_of_a_hard_gate_is_that_of_the_relaxed_one(temperature: float) -> None:
    theta = torch.full((4000,), 0.7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    gate = switch_on(Switch(theta, torch.full_like(theta, -3.0), temperature).rsample())
    (got,) = torch.autograd.grad(gate.sum(), theta)
    torch.manual_seed(5)
    relaxed = torch.sigmoid((theta + torch.logit(torch.rand(4000, dtype=torch.float64))) / temperature)
    (expected,) = torch.autograd.grad(relaxed.sum(), theta)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert set(gate.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(gate.detach(), (relaxed.detach() > 0.5).double())  # hard where the relaxed gate is past a half


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_and_their_gradients_are_numbers_at_extreme_odds(dtype: torch.dtype) -> None:
    theta = torch.tensor([-800.0, -90.0, -15.0, 0.0, 15.0, 90.0, 800.0], dtype=dtype, requires_grad=True)
    for prior in (-15.0, -6.0, 6.0, 15.0):
        q = Switch(theta, torch.full_like(theta, prior))
        x = q.rsample(torch.Size([3000]))
        weight = GatedNormal(torch.ones_like(theta), torch.ones_like(theta), theta, 2.0)
        kl = kl_divergence(q, Switch(q.prior_log_odds, q.prior_log_odds))
        kl = kl + kl_divergence(weight, dist.Normal(torch.zeros_like(theta), 2.0))
        for value in (switch_on(x), q.log_prob(x.detach()), kl):
            (grad,) = torch.autograd.grad(value.sum(), theta, retain_graph=True)
            assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(grad).all())
        assert not bool((x[:, 0] > 0).any()) and bool((x[:, -1] > 0).all())


@given(st.floats(0.02, 50.0), st.sampled_from([1.0, 2.5, 13.0, 393.0]))
@settings(max_examples=40)
def test_group_lasso_scales_have_a_beta_prime_square(value: float, concentration: float) -> None:
    law = GammaRatioRoot(double(concentration), 4, 2.0)
    truth = scipy.stats.betaprime(concentration, 4, scale=4.0)
    t = double(value)
    expected = truth.logpdf(value**2) + math.log(2 * value)
    assert float(law.log_prob(t)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    if truth.cdf(value**2) > 1e-280:
        assert float(law.log_cdf(t)) == pytest.approx(truth.logcdf(value**2), rel=1e-8, abs=1e-10)
    upper = float(interval_log_mass(law, t, double(math.inf)).exp())
    assert upper == pytest.approx(truth.sf(value**2), rel=1e-6, abs=1e-12)


def test_group_lasso_scales_are_drawn_from_their_law_and_far_tails_are_numbers() -> None:
    law = GammaRatioRoot(double(6.0), 4, 2.0).expand([1])
    assert scipy.stats.kstest(law.cdf(law.sample(torch.Size([4000]))).flatten(), "uniform").pvalue > SIGNIFICANCE
    far = float(GammaRatioRoot(double(393.0), 4, 2.0).log_cdf(double(1e-3)))
    assert far == pytest.approx(
        393 * math.log(1e-6 / 4) + math.log(393 * 394 * 395 / 6 + 393 * 394 / 2 + 394), rel=1e-6
    )


@pytest.mark.parametrize(("m", "expected"), [(1, 0.363303), (3, 0.0835520), (10, 9.3112e-6)])
def test_a_weight_with_a_lasso_scale_has_the_group_lasso_density(m: int, expected: float) -> None:
    """Published: s^m exp(-s |w|) / (2^m pi^((m-1)/2) Gamma((m+1)/2)) for a scale squared ~ Gamma((m+1)/2, s^2/2)."""
    penalty, size = 1.7, 0.5
    model = lift(build(m, (2,), 2), make_family(FAMILIES[0]), "categorical", torch.zeros(1, m), prune_inputs=False)
    prior = model.priors()["1.scale"].base_dist  # of the squared scale times the squared penalty
    concentration = float(prior.concentration.flatten()[0]) - 0.5  # the network's groups have a bias besides m weights
    assert float(torch.as_tensor(prior.rate).flatten()[0]) == 0.5

    def integrand(u: float) -> float:  # over u = ln of the squared scale
        square = math.exp(u)
        scale = scipy.stats.gamma.logpdf(square, concentration, scale=2 / penalty**2) + u
        return math.exp(scale - 0.5 * m * math.log(2 * math.pi * square) - size**2 / (2 * square))

    got = quad(integrand, -12, 8, epsabs=0, limit=400)[0]
    closed = penalty**m * math.exp(-penalty * size) / (2**m * math.pi ** ((m - 1) / 2) * math.gamma((m + 1) / 2))
    assert got == pytest.approx(expected, rel=2e-5) and got == pytest.approx(closed, rel=1e-8)


def test_the_published_divergence_of_lasso_scales() -> None:
    """Written for the squared scale given the penalty; here both are independent and their ratio is the scale."""
    m_scale, s_scale, m_rate, s_rate, a = -0.2, 0.3, 0.5, 0.25, 6.0
    q = dist.LogNormal(double(m_scale), double(s_scale))
    rate, log_rate = math.exp(m_rate + s_rate**2 / 2), m_rate
    given_mean = float(kl_divergence(q, dist.Gamma(double(a), double(0.5 * rate))))
    assert given_mean + a * (math.log(rate) - log_rate) == pytest.approx(7.659815, abs=1e-6)
    loc, log_scale = double(0.0).requires_grad_(), double(0.0).requires_grad_()
    optimizer = torch.optim.LBFGS([loc, log_scale], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = kl_divergence(dist.LogNormal(loc, log_scale.exp()), dist.Gamma(double(a), double(1.5))).sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert float(loc.detach()) == pytest.approx(math.log(2 * a / 3) - 1 / (2 * a), abs=1e-6)
    assert float(log_scale.detach().exp()) == pytest.approx(a**-0.5, abs=1e-6)


def test_the_published_divergences_of_the_remaining_scales() -> None:
    q = dist.LogNormal(double(0.3), double(0.4))
    model = small_model(FAMILIES[0])
    assert float(kl_divergence(q, model.priors()["rate"])) == pytest.approx(0.241092, abs=1e-6)
    priors = small_model(FAMILIES[1]).priors()
    for site, expected in (("global_a", 1.382002), ("global_b", 1.022236)):
        assert float(kl_divergence(q, priors[site])) == pytest.approx(expected, abs=1e-6)
    best = dist.LogNormal(double(-1 - math.log(2)), double(math.sqrt(2)))
    assert float(kl_divergence(best, priors["1.local_a"].base_dist)[0]) == pytest.approx(0.153426, abs=1e-6)


def test_gate_optimum_with_all_else_fixed() -> None:
    """gamma = sigmoid(logit lambda + ELL1 - ELL0 - KL of the group's weights), from the family's own divergences."""
    family = make_family(FAMILIES[0], inclusion=0.002)
    model = lift(build(2, (1,), 2).double(), family, "categorical", torch.zeros(1, 2).double(), prune_inputs=False)
    guide = model.new_guide()
    with torch.no_grad():
        for name in ("1.weight", "1.bias"):  # three numbers with 1.5 nats each
            factor = guide.by_site()[name]
            factor.log_scale.fill_(0.0)
            factor.loc.fill_(math.sqrt(3.0))
    gate = guide.by_site()["1.gate"].log_odds
    priors = model.priors()

    def loss(theta: float) -> float:
        with torch.no_grad():
            gate.fill_(theta)
            kl = sum(family.kl(guide.distributions(), priors).values())
            gamma = torch.sigmoid(double(theta))
            return float(kl - gamma * -3.0 - (1 - gamma) * -9.0)

    found = scipy.optimize.minimize_scalar(loss, bounds=(-14, 5), method="bounded", options={"xatol": 1e-9}).x
    assert 1 / (1 + math.exp(-found)) == pytest.approx(0.00890139, rel=1e-4)


def test_weights_behind_a_gate_cost_its_share() -> None:
    q = GatedNormal(double(0.3, -1.0), double(0.2, 0.5), double(0.4), 2.0)
    prior = dist.Normal(double(0.0, 0.0), double(2.0, 2.0))
    open_, closed = (kl_divergence(q.given(double(gate)), prior) for gate in (1.0, 0.0))
    assert closed.tolist() == [0.0, 0.0]
    torch.testing.assert_close(kl_divergence(q, prior), torch.sigmoid(double(0.4)) * open_, rtol=1e-12, atol=0)


@pytest.mark.parametrize("theta", [-5.0, -0.5, 0.3, 4.0])
def test_masses_and_moments_of_a_multiplier_with_an_atom(theta: float) -> None:
    slab = dist.LogNormal(double(-0.3), double(0.8))
    law, gamma = SpikeAndSlab(double(theta), slab), 1 / (1 + math.exp(-theta))
    truth = scipy.stats.lognorm(0.8, scale=math.exp(-0.3))
    for low, up in ((-1.0, 0.0), (0.0, 0.5), (-0.5, 0.5), (0.2, 3.0), (-2.0, -1.0), (0.0, 0.0), (-math.inf, math.inf)):
        mass = gamma * (truth.cdf(max(up, 0)) - truth.cdf(max(low, 0))) + (1 - gamma) * (low < 0 <= up)
        assert float(interval_log_mass(law, double(low), double(up)).exp()) == pytest.approx(mass, rel=1e-9, abs=1e-12)
    assert law.cdf(double(-1e-9, 0.0, 1e9)).tolist() == pytest.approx([0.0, 1 - gamma, 1.0])
    assert float(law.mean) == pytest.approx(gamma * truth.mean())
    assert float(law.variance) == pytest.approx(gamma * truth.moment(2) - (gamma * truth.mean()) ** 2)
    assert float(law.log_prob(double(0.0))) == pytest.approx(math.log(1 - gamma))
    draws = law.sample(torch.Size([5000]))
    assert scipy.stats.binomtest(int((draws == 0).sum()), 5000, 1 - gamma).pvalue > SIGNIFICANCE


@given(log_odds, log_odds)
@settings(max_examples=25)
def test_removing_a_group_is_the_bayes_factor_of_its_gate(theta: float, prior: float) -> None:
    """A point at a closed gate, by enumeration of the two states of the gate."""
    slabs = dist.LogNormal(double(0.0), double(0.5)), dist.HalfNormal(double(1.0))
    q, p = SpikeAndSlab(double(theta), slabs[0]), SpikeAndSlab(double(prior), slabs[1])
    by_hand = math.log1p(math.exp(prior)) - math.log1p(math.exp(theta))  # ln (1 - gamma) / (1 - lambda)
    reduction = make_family(FAMILIES[0]).reduced()["spike"]
    closed = reduction.of(p, double(0.0))
    assert float(reduce(q, p, closed).delta_f) == pytest.approx(by_hand, rel=1e-9, abs=1e-9)
    assert float(reduce(q, p, dist.Delta(double(0.0))).delta_f) == pytest.approx(by_hand, rel=1e-9, abs=1e-9)


@every_slab
def test_decisions_are_the_median_probability_rule(name: str) -> None:
    model = small_model(name)
    guide = model.new_guide()
    odds = double(-12.0, -1.0, -1e-6, 0.4, 9.0)
    with torch.no_grad():
        guide.by_site()["1.gate"].log_odds.copy_(odds)
    scored = score(Posterior(model, guide, 10))
    np.testing.assert_allclose(scored.log_odds()["1"], -odds.numpy(), rtol=1e-6, atol=1e-9)
    plan = bc.decide(scored)
    assert plan.kept() == {"1": [3, 4], "3": [0, 1, 2, 3]}
    flat = scored.log_odds(0.5)["1"]  # even prior odds: the Bayes factor alone
    assert np.allclose(flat, -odds.numpy() + math.log(0.002 / 0.998))


@every_slab
@pytest.mark.parametrize("odds", [-15.0, 15.0])
def test_training_gradients_are_finite_when_every_gate_is_shut_or_open(name: str, odds: float) -> None:
    net, x = build(4, (5, 4), 3), torch.randn(6, 4)
    model = lift(net, make_family(name), "categorical", x[:1])
    guide = model.new_guide()
    with torch.no_grad():
        for block in model.spec.blocks:
            guide.by_site()[f"{block.name}.gate"].log_odds.fill_(odds)
    value = fast_loss(model, guide, 60)(x, torch.tensor([0, 1, 2, 0, 1, 2]), 1.0)
    value.backward()
    assert bool(torch.isfinite(value)) and all(bool(torch.isfinite(p.grad).all()) for p in guide.parameters())


@every_slab
def test_a_gate_carries_the_divergence_of_the_weights_that_produce_its_unit(name: str) -> None:
    """On a convolution with a flatten: closing a gate saves its own kernel and bias, and no other weight."""
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    model = lift(net, make_family(name), "normal", torch.randn(1, 1, 3, 3).double())
    guide, priors = model.new_guide(), model.priors()

    def costs() -> dict[str, Tensor]:
        laws = {n: law for n, law in guide.distributions().items() if n in model.spec.parameters}
        return {n: kl_divergence(law.base_dist, priors[n].base_dist).detach() for n, law in laws.items()}

    before = costs()
    with torch.no_grad():
        guide.by_site()["0.gate"].log_odds[1] = -15.0
    ratio = {
        n: (after / before[n]).flatten(1) if n.endswith("weight") else after / before[n] for n, after in costs().items()
    }
    shut = math.exp(-15) / 0.99
    assert torch.allclose(ratio["0.weight"], double(1.0, shut, 1.0)[:, None].expand(3, 4), rtol=1e-4)
    assert torch.allclose(ratio["0.bias"], double(1.0, shut, 1.0), rtol=1e-4)
    assert bool((ratio["3.weight"] == 1).all()) and bool((ratio["3.bias"] == 1).all())


@every_slab
def test_recovery_of_a_small_teacher(name: str) -> None:
    """Three tanh units among sixteen: three to five are kept, and gates are decided."""
    generator = torch.Generator().manual_seed(0)
    w = double(1.5, -1.0, 0.0, 0.5, 0.0, 1.2, 1.0, -0.8, -1.0, 0.0, 1.4, 0.3).reshape(3, 4).float()
    b, out = torch.tensor([0.2, -0.3, 0.1]), torch.tensor([1.0, -1.2, 0.8])
    x, fresh = (torch.randn(n, 4, generator=generator) for n in (200, 1000))
    y = torch.tanh(x @ w.T + b) @ out + 0.5 * torch.randn(200, generator=generator)
    family = make_family(name, inclusion=0.05)
    model = lift(build(4, (16,), 1, nn.Tanh), family, "normal", x[:1], prune_inputs=False)
    guide = model.new_guide()
    loss, optimizer = fast_loss(model, guide, 200), torch.optim.Adam(guide.parameter_groups(), lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        loss(x, y[:, None], 1.0).backward()
        optimizer.step()
        guide.project_()
    posterior = Posterior(model, guide, 200)
    gates = posterior.guide.by_site()["1.gate"].log_odds.detach().sigmoid()
    kept = int((gates > 0.5).sum())
    truth = torch.tanh(fresh @ w.T + b) @ out
    with torch.no_grad():
        rmse = float((posterior.to_module()(fresh).flatten() - truth).square().mean().sqrt())
    assert 3 <= kept <= 5, gates
    assert bool(((gates < 0.05) | (gates > 0.95)).all()), gates
    assert rmse < 0.3


@every_slab
def test_digits_from_fit_to_surgery(name: str) -> None:
    data = load_digits()
    family = make_family(name, num_draws=8, gate_lr=3.0, initial_log_scale=-4.0)
    model = lift(build(64, (20,), 10), family, "categorical", data.train[0][:1], prune_inputs=False)
    posterior = fit(
        model, data.train, epochs=24, lr=2e-2, batch_size=128, warmup_epochs=8, progress=False, schedule=anneal(24)
    )
    plan = bc.decide(score(posterior))
    small = bc.apply(plan, posterior)
    kept = len(plan.kept()["1"])
    assert 5 <= kept < 20
    assert small[1].weight.shape == (kept, 64)
    x, y = data.validation
    full = posterior.to_module()(x)
    assert float((small(x).argmax(1) != y).double().mean()) < 0.09
    assert (small(x) - full).abs().max().item() < 0.1 * full.abs().max().item()


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"inclusion": 0.0}, {"weight_scale": -1.0}, {"temperature": 0.0}):
        with pytest.raises(FamilyError, match="a probability, and positive numbers"):
            make_family(FAMILIES[0], **wrong)
