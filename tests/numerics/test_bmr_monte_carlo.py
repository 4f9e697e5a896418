"""The importance-sampling fallback against closed forms, and its tail fit against ArviZ."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from arviz_stats.base import array_stats
from torch import Tensor

from pyrobc.bmr import reduce
from pyrobc.bmr.monte_carlo import average_log_ratios, estimate_reduction
from pyrobc.bmr.pareto import fit_pareto_tail, khat_limit, smooth_log_weights
from pyrobc.dists import in_double


def _double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tail", [0.1, 0.5, 1.5])
def test_smoothing_agrees_with_arviz(seed, tail):
    rng = np.random.default_rng(seed)
    log_weights = tail * rng.standard_exponential(1000) + 0.1 * rng.standard_normal(1000)
    expected, khat = array_stats.psislw(-log_weights)  # takes the log likelihood that is to be left out
    smooth, got = smooth_log_weights(torch.tensor(log_weights)[:, None])
    assert float(got) == pytest.approx(float(khat), abs=1e-6)
    smooth = smooth[:, 0] - torch.logsumexp(smooth[:, 0], 0)
    np.testing.assert_allclose(smooth.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.3, 0.9])
def test_tail_fit_recovers_a_pareto_law(shape):
    draws = scipy.stats.genpareto(shape, scale=2.0).rvs(4000, random_state=np.random.default_rng(1))
    got, scale = fit_pareto_tail(torch.tensor(np.sort(draws))[:, None])
    assert float(got) == pytest.approx(shape, abs=0.06)
    assert float(scale) == pytest.approx(2.0, abs=0.15)


def test_flat_and_empty_tails():
    _, khat = smooth_log_weights(torch.zeros(500, 1, dtype=torch.float64))
    assert float(khat) == -1.0
    nearly_empty = torch.full((500, 1), -math.inf, dtype=torch.float64)
    nearly_empty[:3] = torch.tensor([[0.0], [-1.0], [-2.0]])
    _, khat = smooth_log_weights(nearly_empty)
    assert math.isinf(khat)
    result = average_log_ratios(torch.full((500, 2), -math.inf, dtype=torch.float64))
    assert torch.isneginf(result.delta_f).all() or torch.isnan(result.delta_f).all()
    assert khat_limit(1000) == pytest.approx(1 - 1 / 3) and khat_limit(10**6) == 0.7 and khat_limit(5) == 0.0


def test_a_thousand_normal_and_gamma_cases_lie_within_four_errors():
    generator = torch.Generator().manual_seed(0)
    u = torch.rand((4, 500), generator=generator, dtype=torch.float64)
    normals = (
        dist.Normal(u[0] - 0.5, 0.1 + 0.4 * u[1]),
        dist.Normal(_double(0.0), _double(1.0)),
        dist.Normal(u[2] - 0.5, 0.2 + u[3]),
    )
    gammas = (
        dist.Gamma(6 + 10 * u[0], 4 + 4 * u[1]),
        dist.Gamma(_double(2.0), _double(1.0)),
        dist.Gamma(1 + 3 * u[2], 0.5 + 2 * u[3]),
    )
    passed = inside = 0
    for trio in (normals, gammas):
        exact = reduce(*trio).delta_f
        estimate = estimate_reduction(*trio, num_draws=1000, generator=generator)
        is_defined = estimate.is_defined
        assert torch.equal(is_defined, estimate.khat <= khat_limit(1000))
        error = (estimate.delta_f - exact).abs()[is_defined]
        passed += int(is_defined.sum())
        inside += int((error <= 4 * estimate.mcse[is_defined]).sum())
    assert passed >= 600
    assert inside >= 0.99 * passed, (inside, passed)


def test_reduced_prior_far_from_the_posterior_is_undefined_with_the_reason():
    q, p = dist.Normal(_double([0.0, 3.0]), _double(0.3)), dist.Normal(_double(0.0), _double(1.0))
    result = reduce(q, p, dist.Laplace(_double(0.0), _double(0.1)), generator=torch.Generator().manual_seed(0))
    assert result.is_defined.tolist() == [True, False]
    assert "k-hat" in result.reason and torch.isnan(result.mcse[1])


def test_events_are_summed_element_by_element():
    generator = torch.Generator().manual_seed(0)
    q, p = dist.Normal(torch.zeros(2, 30), 0.3).to_event(1), dist.Normal(torch.zeros(2, 30), 1.0).to_event(1)
    result = reduce(q, p, dist.Laplace(torch.zeros(2, 30), 0.3).to_event(1), generator=generator)
    one = reduce(dist.Normal(_double(0.0), _double(0.3)), dist.Normal(_double(0.0), _double(1.0)),
                 dist.Laplace(_double(0.0), _double(0.3)), num_draws=400_000, generator=generator)  # fmt: skip
    assert result.delta_f.shape == (2,) and result.mcse.shape == (2,)
    assert float((result.delta_f - 30 * one.delta_f).abs().max()) < 4 * float(result.mcse.max() + 30 * one.mcse)


def test_reduced_prior_on_part_of_the_support():
    q, p = dist.Normal(_double(0.5), _double(0.5)), dist.Normal(_double(0.0), _double(1.0))
    result = reduce(q, p, dist.HalfNormal(_double(1.0)), num_draws=20_000, generator=torch.Generator().manual_seed(0))
    exact = math.log(2 * scipy.stats.norm.cdf(1.0))  # half-normal / normal = 2 on the positive half
    assert abs(float(result.delta_f) - exact) < 4 * float(result.mcse)


def test_gradient_is_that_of_the_log_mean_weight():
    scale = _double(0.6).requires_grad_()
    q, p = dist.Normal(_double(0.2), _double(0.3)), dist.Normal(_double(0.0), _double(1.0))
    result = estimate_reduction(
        q, p, dist.Normal(_double(0.0), scale), num_draws=50_000, generator=torch.Generator().manual_seed(0)
    )
    (got,) = torch.autograd.grad(result.delta_f, scale)
    (expected,) = torch.autograd.grad(reduce(q, p, dist.Normal(_double(0.0), scale)).delta_f, scale)
    assert float(got) == pytest.approx(float(expected), rel=0.02)


def test_a_generator_repeats_the_estimate_and_leaves_the_global_stream_alone():
    trio = tuple(in_double(law) for law in (dist.Normal(0.0, 0.5), dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0)))
    before = torch.random.get_rng_state()
    first, second = (reduce(*trio, generator=torch.Generator().manual_seed(5)).delta_f for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, reduce(*trio, generator=torch.Generator().manual_seed(6)).delta_f)


def test_draws_where_the_prior_has_no_density_are_undefined():
    q = dist.Uniform(_double([0.0, 0.0]), _double([1.0, 3.0]))
    p = dist.Uniform(_double(0.0), _double(2.0))
    reduced = dist.Uniform(_double(0.0), _double(1.5))
    result = reduce(q, p, reduced, generator=torch.Generator().manual_seed(0))
    assert result.is_defined.tolist() == [True, False] and "no density" in result.reason
    assert float(result.delta_f[0]) == pytest.approx(math.log(2 / 1.5))
