"""Learned sparsity: inclusion by enumeration, tuned priors by calculus, the horseshoe by quadrature, iteration."""

import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobc.bmr.iterate import reduce_iteratively
from pyrobc.bmr.registry import reduce
from pyrobc.bmr.sparsity import fit_horseshoe, learn_inclusion, optimise_reduced
from pyrobc.errors import ReductionError
from pyrobc.models.regression import LinearFit, fit_linear


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(st.lists(st.floats(-30, 5), min_size=1, max_size=9), st.floats(0.3, 5), st.floats(0.3, 5))
@settings(max_examples=30)
def test_bound_lies_below_the_enumerated_evidence(prices: list[float], a: float, b: float) -> None:
    learned = learn_inclusion(tensor(*prices), (a, b))
    terms = []
    for kept in itertools.product([0, 1], repeat=len(prices)):
        log_prior = scipy.special.betaln(a + sum(kept), b + len(kept) - sum(kept)) - scipy.special.betaln(a, b)
        terms.append(log_prior + sum(price for price, keep in zip(prices, kept, strict=True) if not keep))
    truth = scipy.special.logsumexp(terms)
    assert learned.bound.item() <= truth + 1e-9
    assert learned.bound.item() >= truth - 2.0  # the mean-field gap, at most about half ln(groups) + a constant
    shapes = learned.rate.concentration1.item(), learned.rate.concentration0.item()
    zeta = scipy.special.digamma(shapes[0]) - scipy.special.digamma(shapes[1])
    assert learned.log_odds.item() == pytest.approx(zeta, abs=1e-8)
    assert learned.inclusion.numpy() == pytest.approx(scipy.special.expit(zeta - np.array(prices)), abs=1e-8)


def test_clear_prices_give_the_exact_inclusion() -> None:
    """60 useless groups at +1.5 nats and 3 needed at -40: the enumeration over counts is exact."""
    prices = torch.cat([torch.full((60,), 1.5), torch.full((3,), -40.0)]).double()
    learned = learn_inclusion(prices)
    k = np.arange(61)  # useless groups kept; the needed ones always are
    log_weight = np.log(scipy.special.comb(60, k)) + 1.5 * (60 - k) + scipy.special.betaln(4 + k, 61 - k)
    weight = np.exp(log_weight - scipy.special.logsumexp(log_weight))
    assert learned.inclusion[0].item() == pytest.approx(weight @ k / 60, abs=0.01)
    assert learned.inclusion[-1].item() == pytest.approx(1, abs=1e-12)
    assert learned.kept.sum() == 3 and learned.log_odds < -2


def test_prices_that_are_not_numbers_never_prune() -> None:
    learned = learn_inclusion(tensor(math.nan, math.inf, -math.inf, 3.0, 2.0))
    assert learned.kept.tolist() == [True, True, True, False, False]
    assert learned.inclusion[:3].tolist() == [1.0, 1.0, 1.0] and learned.bound.isfinite()
    for bad in [(tensor(math.nan), (1.0, 1.0)), (tensor(1.0), (0.0, 1.0))]:
        with pytest.raises(ReductionError, match="inclusion rate"):
            learn_inclusion(*bad)


@given(st.floats(-3, 3), st.floats(0.1, 0.9))
@settings(max_examples=15)
def test_tuned_variance_is_the_maximum_of_the_marginal_likelihood(m: float, s: float) -> None:
    """With likelihood N(y; theta, v), evidence is N(y; 0, r^2 + v), largest at r^2 = y^2 - v where that is positive."""
    v = 1 / (1 / s**2 - 1)
    y = m * v / s**2
    q, p = dist.Normal(tensor(m), tensor(s)), dist.Normal(tensor(0.0), tensor(1.0))
    best = y**2 - v
    if best < 1e-3:
        return  # the optimum is at zero, outside the family of proper Normals
    eta, reduction = optimise_reduced(q, p, lambda eta: dist.Normal(torch.zeros_like(eta), eta.exp()), tensor(0.0))
    assert eta.exp().square().item() == pytest.approx(best, rel=1e-5)
    law = scipy.stats.norm
    gain = law(0, math.sqrt(best + v)).logpdf(y) - law(0, math.sqrt(1 + v)).logpdf(y)
    assert reduction.delta_f.item() == pytest.approx(gain, abs=1e-8)


def test_log_prior_pulls_the_tuned_scale() -> None:
    q, p = dist.Normal(tensor(0.9), tensor(0.3)), dist.Normal(tensor(0.0), tensor(1.0))

    def family(eta: torch.Tensor) -> dist.Normal:
        return dist.Normal(torch.zeros_like(eta), eta.exp())

    free, _ = optimise_reduced(q, p, family, tensor(0.0))
    pulled, _ = optimise_reduced(q, p, family, tensor(0.0), log_prior=lambda eta: -50 * (eta + 1).square().sum())
    assert -1 < pulled.item() < free.item()
    with pytest.raises(ReductionError, match="tuned reduced prior"):
        optimise_reduced(dist.Normal(tensor(0.9), tensor(2.0)), p, family, tensor(3.0))  # wider than the prior


def test_horseshoe_bound_lies_just_below_the_quadrature() -> None:
    """One element: ln E[exp dF(gamma)] over local, global and slab scales, by nested quadrature."""
    q, p = dist.Normal(tensor(0.8), tensor(0.3)), dist.Normal(tensor(0.0), tensor(1.0))
    fit = fit_horseshoe(q, p, global_scale=0.5, num_steps=800)
    grid = np.linspace(-9, 9, 91)
    log_local, log_global, log_slab = np.meshgrid(grid, grid + math.log(0.5), np.linspace(-4, 9, 60), indexing="ij")
    log_p = (
        scipy.stats.halfcauchy.logpdf(np.exp(log_local))
        + log_local
        + scipy.stats.halfcauchy.logpdf(np.exp(log_global), scale=0.5)
        + log_global
        + scipy.stats.invgamma.logpdf(np.exp(log_slab), 2.0, scale=6.0)
        + log_slab
    )
    free, slab = np.exp(2 * (log_local + log_global)), np.exp(log_slab)
    gamma = np.sqrt(slab * free / (slab + free)).reshape(-1)
    gained = reduce(q, p, dist.Normal(torch.zeros(gamma.size, dtype=torch.float64), torch.tensor(gamma))).delta_f
    cell = (grid[1] - grid[0]) ** 2 * (13 / 59)
    assert scipy.special.logsumexp(log_p.reshape(-1)) + math.log(cell) == pytest.approx(0, abs=5e-3)
    truth = scipy.special.logsumexp(log_p.reshape(-1) + gained.numpy()) + math.log(cell)
    assert truth - 0.5 < fit.bound.item() < truth + 0.05


def test_horseshoe_shrinks_noise_and_spares_signal() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.2 * torch.randn(40, generator=generator, dtype=torch.float64)
    q = dist.Normal(torch.cat([noise, tensor(1.5, -2.0)]), tensor(0.2))
    fit = fit_horseshoe(q, dist.Normal(tensor(0.0), tensor(1.0)), num_steps=500)
    assert fit.scale[-2:].min() > 5 * fit.scale[:-2].max()
    assert fit.reduction.delta_f[:-2].median() > 0.5 and fit.bound > 20
    reduced_posterior = fit.reduction.posterior
    assert reduced_posterior is not None
    assert (reduced_posterior.mean[-2:] / q.loc[-2:]).min() > 0.9
    again = fit_horseshoe(q, dist.Normal(tensor(0.0), tensor(1.0)), num_steps=500)
    assert torch.equal(again.scale, fit.scale)


def make_refit(x: torch.Tensor, y: torch.Tensor):  # type: ignore[no-untyped-def]
    """Exact fit of the kept columns, and the price of deleting each one of them."""

    def refit(kept: torch.Tensor) -> LinearFit:
        size = int(kept.sum())
        prior = dist.MultivariateNormal(torch.zeros(size, dtype=x.dtype), torch.eye(size, dtype=x.dtype))
        return fit_linear(x[:, kept], y, prior, 0.5)

    def price(fit: LinearFit, kept: torch.Tensor) -> torch.Tensor:
        prices = torch.full((len(kept),), math.nan, dtype=torch.float64)
        zero = torch.zeros(int(kept.sum()), dtype=torch.float64)
        q = dist.Normal(fit.weights.loc, fit.weights.variance.sqrt())
        prices[kept] = q.log_prob(zero) - dist.Normal(zero, 1.0).log_prob(zero)
        return prices

    return refit, price


def test_iteration_needs_refits_where_predictors_share_their_signal() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 6))
    x[:, 1] = x[:, 0] + 0.02 * x[:, 1]
    y = torch.tensor(0.35 * x[:, 0] + x[:, 2] + 0.5 * rng.normal(size=30))
    refit, price = make_refit(torch.tensor(x), y)
    at_once = reduce_iteratively(refit, price, 6)
    one_by_one = reduce_iteratively(refit, price, 6, most=1)
    assert not at_once.kept[:2].any()  # each copy is spare given the other, and both went in one round
    assert one_by_one.kept[:2].sum() == 1 and one_by_one.kept[2]
    assert one_by_one.fit.log_evidence > at_once.fit.log_evidence
    full = refit(torch.ones(6, dtype=torch.bool)).log_evidence
    promised = sum(r.delta_f[r.pruned].sum() for r in one_by_one.rounds)
    assert (one_by_one.fit.log_evidence - full).item() == pytest.approx(float(promised), abs=1e-9)
    assert one_by_one.is_converged and not one_by_one.rounds[-1].pruned.any()
    assert not (one_by_one.rounds[-1].delta_f[one_by_one.kept] > 0).any()
    assert sum(r.pruned.sum() for r in at_once.rounds) == 6 - at_once.kept.sum()
    stopped = reduce_iteratively(refit, price, 6, most=1, max_rounds=1)
    assert not stopped.is_converged and stopped.kept.sum() == 5


def test_iteration_never_prunes_on_undefined_prices() -> None:
    prices = tensor(math.nan, math.inf, -math.inf, 1.0)
    result = reduce_iteratively(lambda kept: kept, lambda fit, kept: prices, 4)
    assert result.kept.tolist() == [True, True, True, False] and len(result.rounds) == 2
    with pytest.raises(ReductionError, match="most=0"):
        reduce_iteratively(lambda kept: kept, lambda fit, kept: prices, 4, most=0)
    with pytest.raises(ReductionError, match=r"prices: got shape \(4,\)"):
        reduce_iteratively(lambda kept: kept, lambda fit, kept: prices, 5)
