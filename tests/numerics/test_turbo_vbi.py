"""Turbo-VBI: evidence of one weight, the KL of all layers, monotone bounds, recovery of a known support."""

import math
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import t as student_t
from torch import Tensor
from torch.distributions import kl_divergence

from pyrobc.dists import BinaryChain, ChainedStudentT, FactorisedPair, GammaPair, Rates, SupportedNormal
from pyrobc.dists.scan import from_chains

STANDARD_ERRORS = 4.0


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# One weight


def test_evidence_of_one_weight_golden_and_by_scipy():
    w = double(0.0, 0.3, 2.0)
    pair = GammaPair(1.0, 0.01, 2.5, 0.3)
    on, off = (part - 0.5 * math.log(2 * math.pi) for part in pair.log_evidence(w.square() / 2))
    torch.testing.assert_close(on, double(1.262864, -1.294258, -6.692093), rtol=0, atol=6e-7)
    for found, a, b in ((on, 1.0, 0.01), (off, 2.5, 0.3)):
        expected = student_t(df=2 * a, scale=math.sqrt(b / a)).logpdf(w.numpy())
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("rate", "at_zero", "switch"), [(1e-2, 0.1, 0.27636), (1e-3, 0.03162, 0.13484), (1e-4, 0.01, 0.06417)]
)
def test_bayes_factor_at_zero_and_where_it_changes_sides(rate, at_zero, switch):
    pair, nothing = GammaPair(idle_rate=rate), torch.zeros(1).double()
    assert float(pair.log_odds(nothing, nothing).exp()) == pytest.approx(at_zero, abs=6e-6)
    assert abs(float(pair.log_odds(nothing, double(switch).square() / 2))) < 2e-3 / switch
    if rate == 1e-2:
        found = pair.log_odds(nothing, double(0.1, 0.5, 1.0).square() / 2).sigmoid()
        torch.testing.assert_close(found, double(0.1542, 0.8061, 0.9520), rtol=0, atol=6e-5)


@pytest.mark.parametrize("pair", [GammaPair(1.2, 0.8, 1.5, 0.02), FactorisedPair(1.2, 0.8, 1.5, 0.02)])
@pytest.mark.parametrize("h", [1e-4, 0.03, 2.0])
def test_bound_and_its_derivatives_by_quadrature(pair, h):
    gamma = 0.3
    laws = ((1.2, 0.8, gamma), (1.5, 0.02, 1 - gamma))

    def log_gamma_law(rho: float, a: float, b: float) -> float:
        return a * math.log(b) - math.lgamma(a) + (a - 1) * math.log(rho) - b * rho

    def integrate(log_density) -> float:  # over the logarithm of the precision
        return math.log(quad(lambda x: math.exp(log_density(math.exp(x)) + x), -12, 14, limit=500)[0])

    def likelihood(rho: float) -> float:
        return 0.5 * math.log(rho) - rho * h

    if isinstance(pair, FactorisedPair):  # the best q(rho) is the geometric mean, its value a log integral
        expected = integrate(lambda rho: likelihood(rho) + sum(p * log_gamma_law(rho, a, b) for a, b, p in laws))
    else:
        expected = sum(
            p * integrate(lambda rho, a=a, b=b: likelihood(rho) + log_gamma_law(rho, a, b)) for a, b, p in laws
        )
    active, at = double(gamma).requires_grad_(), double(h).requires_grad_()
    bound = pair.bound(active, at)
    assert float(bound.detach()) == pytest.approx(expected, abs=1e-8)
    by_active, by_h = torch.autograd.grad(bound.sum(), (active, at))
    torch.testing.assert_close(pair.log_odds(active, at).detach(), by_active)
    torch.testing.assert_close(pair.mean_precision(active, at).detach(), -by_h)


def test_factorised_block_is_bistable_and_the_joint_is_not():
    h = double(0.0)
    for pair, start, expected in (
        (FactorisedPair(idle_rate=1e-2), 0.5, 0.955),
        (FactorisedPair(idle_rate=1e-2), 1e-3, None),
        (GammaPair(idle_rate=1e-2), 0.5, 0.0909),
    ):
        active = double(start)
        for _ in range(200):
            active = pair.log_odds(active, h).sigmoid()
        if expected is None:
            assert float(active) < 0.05
        else:
            assert float(active) == pytest.approx(expected, abs=6e-4)


# The prior and the KL of a tensor


def make_prior(shape: tuple[int, ...], pair: GammaPair | None = None, walk: str = "kernel") -> ChainedStudentT:
    return ChainedStudentT(torch.Size(shape), pair or GammaPair(idle_rate=1e-2), Rates(*double(0.3, 0.1, 0.25)), walk)


def make_posterior(prior: ChainedStudentT, pair: GammaPair, widen: float = 1.0) -> SupportedNormal:
    torch.manual_seed(3)
    loc = 0.4 * torch.randn(prior.event_shape).double()
    scale = widen * (0.05 + 0.1 * torch.rand(prior.event_shape).double())
    law = SupportedNormal(dist.Normal(loc, scale), pair, prior.chains(torch.zeros_like(loc)), prior.walk)
    for _ in range(30):
        law = SupportedNormal(law.base_dist, pair, law.refreshed(), prior.walk)
    return law


def test_prior_density_is_the_sum_over_supports_and_its_draws_have_it():
    prior = make_prior((2, 3))
    value = 0.5 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    chain = prior.chains(torch.zeros(2, 3).double())
    states = torch.cartesian_prod(*[torch.arange(2.0).double()] * 3)
    on, off = (part - 0.5 * math.log(2 * math.pi) for part in prior.pair.log_evidence(value.square() / 2))
    log_prior = BinaryChain(prior.rates, torch.zeros(3).double()).log_prob(states)
    rows = [torch.logsumexp(log_prior + torch.where(states == 1, on[i], off[i]).sum(-1), 0) for i in range(2)]
    torch.testing.assert_close(prior.log_prob(value), torch.stack(rows).sum())
    torch.manual_seed(1)
    drawn = prior.sample((20_000,))
    assert drawn.shape == (20_000, 2, 3)
    t_on, t_off = student_t(2, scale=1.0), student_t(2, scale=0.1)
    for column, share in enumerate(chain.mean[0].tolist()):
        below = share * t_on.cdf(0.2) + (1 - share) * t_off.cdf(0.2)
        found = float((drawn[:, 0, column] < 0.2).double().mean())
        assert abs(found - below) < STANDARD_ERRORS * math.sqrt(below * (1 - below) / 20_000)


@pytest.mark.parametrize("walk", ["kernel", "channel"])
def test_prior_of_a_convolution_is_that_of_its_chains_and_takes_batches(walk):
    prior = make_prior((2, 3, 2, 2), walk=walk)
    value = torch.randn(5, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    if walk == "kernel":
        laid = value[..., [0, 0, 1, 1], [0, 1, 1, 0]].reshape(5, 6, 4)
    else:
        laid = value.movedim(2, -1).reshape(5, 8, 3)
    flat = make_prior(tuple(laid.shape[1:]))
    torch.testing.assert_close(prior.log_prob(value), torch.stack([flat.log_prob(row) for row in laid]))
    wide = prior.expand([5])
    assert wide.sample((3,)).shape == (3, 5, 2, 3, 2, 2) and wide.batch_shape == (5,)
    torch.testing.assert_close(wide.log_prob(value), prior.log_prob(value))
    law = make_posterior(prior, prior.pair)
    assert law.expand([5]).rsample().shape == (5, 2, 3, 2, 2)


@pytest.mark.parametrize("is_factorised", [False, True])
@pytest.mark.parametrize(("shape", "walk"), [((3, 4), "kernel"), ((2, 3, 2, 2), "kernel"), ((2, 3, 2, 2), "channel")])
def test_kl_is_that_of_the_laws_of_all_three_layers(is_factorised, shape, walk):
    """By draws of weights, supports and precisions from the posterior, each with its own density."""
    plain = GammaPair(1.3, 0.9, 1.6, 0.05)
    prior = make_prior(shape, plain, walk)
    pair = FactorisedPair(*vars(plain).values()) if is_factorised else plain
    law = make_posterior(prior, pair)
    torch.manual_seed(2)
    draws, h = torch.Size([6000]), 0.5 * (law.base_dist.loc.square() + law.base_dist.scale.square())
    chain, nothing = law.supports, prior.chains(torch.zeros_like(h))
    w, s = law.sample(draws), chain.sample(draws)
    active = from_chains(s, torch.Size(shape), walk)
    if is_factorised:
        a, b = (law.active * (x - y) + y for x, y in ((1.3, 1.6), (0.9, 0.05)))
        q_rho = dist.Gamma(a + 0.5, b + h).expand(active.shape)
    else:
        q_rho = dist.Gamma(0.5 + 1.6 - 0.3 * active, h + 0.05 + 0.85 * active)
    rho = q_rho.sample()
    p_rho = dist.Gamma(1.6 - 0.3 * active, 0.05 + 0.85 * active)
    dims = tuple(range(1, 1 + len(shape)))
    log_q = law.log_prob(w) + q_rho.log_prob(rho).sum(dims) + chain.log_prob(s).sum(dims[:-1][: s.dim() - 2])
    log_p = dist.Normal(0.0, rho.rsqrt()).log_prob(w).sum(dims) + p_rho.log_prob(rho).sum(dims)
    log_p = log_p + nothing.log_prob(s).sum(dims[:-1][: s.dim() - 2])
    ratios = log_q - log_p
    error = abs(float(ratios.mean() - kl_divergence(law, prior))) / (float(ratios.std()) / 6000**0.5)
    assert error < STANDARD_ERRORS


def test_tangent_lies_above_the_closed_form_and_touches_it_where_messages_passed():
    prior = make_prior((3, 5))
    law = make_posterior(prior, prior.pair)
    loc, scale = law.base_dist.loc.requires_grad_(), law.base_dist.scale.requires_grad_()

    def whole() -> Tensor:  # minus half a log term, the evidence of inactive weights, ln Z
        on, off = prior.pair.log_evidence(0.5 * (loc.square() + scale.square()))
        return -0.5 * (1 + 2 * scale.log()).sum() - off.sum() - prior.chains(on - off).log_partition.sum()

    held = SupportedNormal(dist.Normal(loc, scale), prior.pair, law.supports, prior.walk)
    torch.testing.assert_close(kl_divergence(held, prior), whole())
    slopes = (torch.autograd.grad(value, (loc, scale)) for value in (kl_divergence(held, prior), whole()))
    torch.testing.assert_close(*slopes)
    precision = prior.pair.mean_precision(law.active, 0.5 * (loc.square() + scale.square()).detach())
    (slope,) = torch.autograd.grad(kl_divergence(held, prior), loc)
    torch.testing.assert_close(slope, precision * loc.detach())
    for move in (0.7, 1.4):
        with torch.no_grad():
            moved = SupportedNormal(dist.Normal(move * loc, scale), prior.pair, law.supports, prior.walk)
            fresh = SupportedNormal(moved.base_dist, prior.pair, moved.refreshed(), prior.walk)
            assert float(kl_divergence(moved, prior)) > float(kl_divergence(fresh, prior))


# A linear model, where the weights' step is exact


class Trace(NamedTuple):
    active: Tensor
    bounds: Tensor


def run_linear(x: Tensor, y: Tensor, pair: GammaPair, rates: Rates, steps: int, start: float = 0.5) -> Trace:
    """Coordinate ascent for y = x w + noise of standard deviation one half; ``[problems, rows, weights]``."""
    n, d = x.shape[-2:]
    variance = 0.25
    gram, moment = x.mT @ x / variance, (x.mT @ y[..., None])[..., 0] / variance
    precision, bounds = x.new_ones(len(x), d), []
    active = x.new_full((len(x), d), start)
    for _ in range(steps):
        covariance = torch.linalg.inv(gram + torch.diag_embed(precision))
        mean = (covariance @ moment[..., None])[..., 0]
        h = 0.5 * (mean.square() + covariance.diagonal(dim1=-2, dim2=-1))
        chain = BinaryChain(rates, pair.log_odds(active, h))
        active = chain.mean
        precision = pair.mean_precision(active, h)
        misfit = (y - (x @ mean[..., None])[..., 0]).square().sum(-1) / variance + (covariance * gram).sum((-2, -1))
        likelihood = -0.5 * misfit - 0.5 * n * math.log(2 * math.pi * variance)
        entropy = 0.5 * torch.linalg.slogdet(covariance)[1] + 0.5 * d
        bounds.append(likelihood + entropy + pair.bound(active, h).sum(-1) - chain.kl_from_prior)
    return Trace(active, torch.stack(bounds))


CHAIN, INDEPENDENT = Rates(*double(0.3, 0.06, 0.15)), Rates(*double(0.3, 0.3, 0.7))
TRUE = torch.zeros(40, dtype=torch.bool)
TRUE[8:15] = TRUE[27:32] = True


def make_problems(seeds: int, rows: int = 60) -> tuple[Tensor, Tensor]:
    """A support of two runs, 12 of 40, one problem for each seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    x = torch.stack([torch.randn(rows, 40, generator=g, dtype=torch.float64) for g in generators])
    size = torch.stack([0.3 + 0.9 * torch.rand(40, generator=g, dtype=torch.float64) for g in generators])
    sign = torch.stack([torch.randint(0, 2, (40,), generator=g) for g in generators]) * 2.0 - 1.0
    noise = torch.stack([torch.randn(rows, generator=g, dtype=torch.float64) for g in generators])
    w = torch.where(TRUE, size * sign, 0.0)
    return x, (x @ w[..., None])[..., 0] + 0.5 * noise


@pytest.mark.parametrize("rates", [CHAIN, INDEPENDENT], ids=["chain", "independent"])
@pytest.mark.parametrize("pair", [GammaPair(idle_rate=1e-2), FactorisedPair(idle_rate=1e-2)])
def test_bound_never_falls(pair, rates):
    bounds = run_linear(*make_problems(6), pair, rates, 60, start=0.05).bounds
    assert float((bounds[1:] - bounds[:-1]).min()) > -1e-8
    assert float((bounds[-1] - bounds[0]).min()) > 1.0


def share_exact(trace: Trace) -> float:
    return float(((trace.active > 0.5) == TRUE).all(-1).double().mean())


def test_chain_recovers_a_support_of_runs_where_independent_supports_do_not():
    x, y = make_problems(30)
    pair = GammaPair(idle_rate=1e-2)
    assert share_exact(run_linear(x, y, pair, CHAIN, 150)) >= 0.65
    assert share_exact(run_linear(x, y, pair, INDEPENDENT, 150)) <= 0.30


def test_recovery_at_a_smaller_rate_and_with_more_rows():
    pair = GammaPair(idle_rate=1e-3)
    assert share_exact(run_linear(*make_problems(30), pair, CHAIN, 150)) >= 0.80
    more = make_problems(30, rows=100)
    assert all(share_exact(run_linear(*more, pair, rates, 150)) == 1 for rates in (CHAIN, INDEPENDENT))


def test_factorised_block_depends_on_its_start():
    x, y = make_problems(30)
    pair = FactorisedPair(idle_rate=1e-2)
    stuck = run_linear(x, y, pair, CHAIN, 150).active > 0.5
    assert bool(stuck.all()), "from one half nothing is pruned"
    found = run_linear(x, y, pair, CHAIN, 150, start=0.05).active > 0.5
    assert not bool((found & ~TRUE).any())
    assert 2 < float((TRUE & ~found).double().sum(-1).mean()) < 7
