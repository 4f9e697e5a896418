"""Normals of which some are points at zero, and the sum of their divergence in one pass."""

import math

import pytest
import torch
from pyro import distributions as dist
from scipy import integrate
from torch import Tensor
from torch.distributions import Laplace, Normal, kl_divergence

from pyrobc.dists import PrunedNormal
from pyrobc.dists.normal_kl import sum_kl
from pyrobc.family import normal_prior


def laplace_prior(like: Tensor, loc: float, scale: float) -> dist.Laplace:
    return dist.Laplace(like.new_tensor(loc), like.new_tensor(scale)).expand(like.shape).to_event(like.dim())


LOC = torch.tensor([[0.3, -1.2, 0.7], [2.0, 0.0, -0.4]], dtype=torch.float64)
SCALE = torch.tensor([[0.2, 0.5, 1.5], [0.1, 2.0, 0.3]], dtype=torch.float64)
KEPT = torch.tensor([[True, False, True], [False, True, True]])


PRIORS = {"normal": normal_prior((2, 3), 0.8, LOC, loc=0.25), "laplace": laplace_prior(LOC, 0.25, 0.8)}


def law(dtype: torch.dtype = torch.float64) -> PrunedNormal:
    return PrunedNormal(LOC.to(dtype), SCALE.to(dtype), KEPT)


def test_moments_and_draws_are_those_of_what_is_kept() -> None:
    q = law()
    zero = torch.zeros_like(LOC)
    assert torch.equal(q.mean, torch.where(KEPT, LOC, zero)) and torch.equal(q.loc, q.mean)
    assert torch.equal(q.variance, torch.where(KEPT, SCALE.square(), zero))
    draws = q.rsample((40_000,))
    assert draws.shape == (40_000, 2, 3) and not bool(draws[:, ~KEPT].any())
    error = (draws.mean(0) - q.mean)[KEPT] / (SCALE[KEPT] / 200)
    assert float(error.abs().max()) < 4
    torch.testing.assert_close(draws.std(0)[KEPT], SCALE[KEPT], rtol=0.02, atol=0)
    assert q.rsample().shape == q.sample().shape == (2, 3)


def test_density_is_normal_where_kept_and_a_point_elsewhere() -> None:
    q, value = law(), torch.full_like(LOC, 0.25)
    expected = Normal(LOC, SCALE).log_prob(value)
    assert torch.equal(q.log_prob(value)[KEPT], expected[KEPT])
    assert bool(q.log_prob(value)[~KEPT].isneginf().all())
    assert not bool(q.log_prob(torch.zeros_like(LOC))[~KEPT].any())
    assert bool(q.log_prob(q.sample()).isfinite().all())


def test_expanding_repeats_the_law() -> None:
    wide = law().expand([4, 2, 3])
    assert wide.batch_shape == (4, 2, 3) and wide.kept.shape == (4, 2, 3)
    assert torch.equal(wide.mean[2], law().mean) and not bool(wide.sample()[:, ~KEPT].any())


@pytest.mark.parametrize("kind", [Normal, Laplace])
def test_divergence_is_the_integral_where_kept_and_zero_elsewhere(kind: type[Normal] | type[Laplace]) -> None:
    p = kind(torch.full_like(LOC, 0.5), torch.full_like(SCALE, 1.3))
    got = kl_divergence(law(), p)
    for i in range(2):
        for j in range(3):
            if not KEPT[i, j]:
                assert float(got[i, j]) == 0.0
                continue
            q = Normal(LOC[i, j], SCALE[i, j])
            middle, width = float(LOC[i, j]), 12 * float(SCALE[i, j])

            def gap(x: float, q: Normal = q, i: int = i, j: int = j) -> float:
                at = torch.tensor(x, dtype=torch.float64)
                log_q, log_p = float(q.log_prob(at)), float(p.log_prob(at)[i, j])
                return math.exp(log_q) * (log_q - log_p)

            exact, _ = integrate.quad(gap, middle - width, middle + width, points=[middle, 0.5], epsabs=1e-11)
            assert float(got[i, j]) == pytest.approx(exact, abs=1e-8)


def test_gradients_are_finite_and_stop_at_what_is_pruned() -> None:
    loc, log_scale = LOC.clone().requires_grad_(), SCALE.log().requires_grad_()
    scale = log_scale.exp()
    q = PrunedNormal(loc, scale, KEPT)
    prior = normal_prior((2, 3), 1.0, LOC)
    at = torch.zeros_like(LOC)
    for value in (
        q.rsample().square().sum(),
        q.log_prob(at).sum(),
        kl_divergence(q.to_event(2), prior),
        sum_kl(q, prior),
    ):
        loc.grad = log_scale.grad = None
        value.backward(retain_graph=True)
        for gradient in (loc.grad, log_scale.grad):
            assert gradient is not None and bool(gradient.isfinite().all())
            assert not bool(gradient[~KEPT].any())
        assert bool(loc.grad[KEPT].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", PRIORS)
def test_the_sum_in_one_pass_is_that_of_the_registered_divergence(kind: str, pruned: bool, dtype: torch.dtype) -> None:
    values, gradients = [], []
    for is_fast in (True, False):
        loc, log_scale = (part.to(dtype).clone().requires_grad_() for part in (LOC, SCALE.log()))
        scale = log_scale.exp()
        q = PrunedNormal(loc, scale, KEPT) if pruned else dist.Normal(loc, scale)
        like = LOC.to(dtype)
        prior = normal_prior((2, 3), 0.8, like, loc=0.25) if kind == "normal" else laplace_prior(like, 0.25, 0.8)
        value = sum_kl(q.to_event(2), prior) if is_fast else kl_divergence(q.to_event(2), prior)
        (3.0 * value).backward()
        assert value.dtype == dtype and value.shape == ()
        values.append(value.detach())
        gradients.append((loc.grad, log_scale.grad))
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(*values, rtol=tight, atol=tight)
    torch.testing.assert_close(*gradients, rtol=tight, atol=tight)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", PRIORS)
def test_its_gradient_is_that_of_finite_differences(kind: str, pruned: bool) -> None:
    prior = PRIORS[kind]

    def divergence(loc: Tensor, scale: Tensor) -> Tensor:
        return sum_kl(PrunedNormal(loc, scale, KEPT) if pruned else Normal(loc, scale), prior)

    assert torch.autograd.gradcheck(divergence, (LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()))


def test_a_point_costs_minus_its_log_density() -> None:
    prior = normal_prior((2, 3), 0.8, LOC, loc=0.25)

    def cost(value: Tensor) -> Tensor:
        return sum_kl(dist.Delta(value, event_dim=2), prior)

    point = LOC.clone().requires_grad_()
    torch.testing.assert_close(cost(point), -prior.log_prob(LOC), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(cost, (point,))
    uneven = dist.Normal(LOC, SCALE).to_event(2)
    torch.testing.assert_close(sum_kl(dist.Delta(LOC, event_dim=2), uneven), -uneven.log_prob(LOC))


def test_other_priors_fall_back_to_the_registered_divergence() -> None:
    q = Normal(LOC, SCALE)
    trained = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    uneven = Normal(torch.zeros_like(LOC), SCALE + 1)
    learned = Normal(torch.zeros_like(LOC), trained.expand(2, 3))
    for prior in (uneven, learned, Normal(0.0, 1.0), normal_prior((4, 2, 3), 1.0, LOC).base_dist):
        torch.testing.assert_close(sum_kl(q, prior), kl_divergence(q, prior).sum(), rtol=1e-12, atol=0)
    sum_kl(q, learned).backward()
    assert trained.grad is not None and float(trained.grad) != 0.0
    counts, rate = dist.Gamma(LOC.abs() + 1, SCALE), dist.Gamma(torch.ones_like(LOC), torch.ones_like(LOC))
    assert torch.equal(sum_kl(counts, rate), kl_divergence(counts, rate).sum())
    empty = Normal(LOC[:0], SCALE[:0])
    assert float(sum_kl(empty, Normal(LOC[:0], SCALE[:0]))) == 0.0
