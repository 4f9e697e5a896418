"""The training kernels of truncated log-normal gates against the distribution, quadrature and finite differences."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyrobc.dists import TruncatedLogNormal, TruncatedLogUniform
from pyrobc.dists.gate_noise import _DrawGates, draw_gates, gate_kl

LOW, HIGH = -20.0, 0.0
LOCS = [-20.0, -19.5, -12.0, -5.0, -1.0, -1e-3, 0.0]
LOG_SCALES = [-20.0, -10.0, -5.0, -2.0, 0.0, 1.0, 3.0, 5.0]


def grid(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    loc, log_scale = torch.meshgrid(torch.tensor(LOCS), torch.tensor(LOG_SCALES), indexing="ij")
    return loc.flatten().to(dtype), log_scale.flatten().to(dtype)


def law(loc: Tensor, log_scale: Tensor) -> TruncatedLogNormal:
    return TruncatedLogNormal(loc.double(), log_scale.double().exp(), LOW, HIGH)


def quantile(loc: Tensor, log_scale: Tensor, u: Tensor) -> Tensor:
    gate: Tensor = _DrawGates.apply(loc, log_scale, LOW, HIGH, u)
    return gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_the_quantiles_of_the_distribution(dtype: torch.dtype) -> None:
    loc, log_scale = grid(dtype)
    u = torch.linspace(0.001, 0.999, 41, dtype=dtype)[:, None].expand(-1, len(loc))
    exact = law(loc, log_scale).icdf(u.double())
    found = quantile(loc, log_scale, u).double()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(found.log(), exact.log(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_equals_that_of_the_distribution(dtype: torch.dtype) -> None:
    loc, log_scale = grid(dtype)
    exact = torch.distributions.kl_divergence(
        law(loc, log_scale), TruncatedLogUniform(torch.tensor(LOW).double(), torch.tensor(HIGH).double())
    )
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(gate_kl(loc, log_scale, LOW, HIGH).double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("loc", "log_scale"), [(-3.0, 0.0), (-19.0, 1.0), (0.0, -1.0), (-10.0, 3.0)])
def test_kl_equals_quadrature(loc: float, log_scale: float) -> None:
    scale = math.exp(log_scale)
    q = scipy.stats.truncnorm((LOW - loc) / scale, (HIGH - loc) / scale, loc, scale)
    x = np.linspace(LOW, HIGH, 400_001)
    density = q.pdf(x)
    integrand = np.where(density > 0, density * (q.logpdf(x) + math.log(HIGH - LOW)), 0.0)
    found = gate_kl(torch.tensor([loc]).double(), torch.tensor([log_scale]).double(), LOW, HIGH)
    assert float(found) == pytest.approx(np.trapezoid(integrand, x), abs=1e-6)


def test_gradients_of_draws_equal_finite_differences() -> None:
    """At fixed uniforms the draw is a smooth function of its parameters."""
    loc, log_scale = (t.clone().requires_grad_() for t in grid())
    step = 1e-6
    for u in (0.01, 0.3, 0.5, 0.9, 0.999):
        uniform = torch.full((1, len(loc)), u).double()
        by_loc, by_log_scale = torch.autograd.grad(quantile(loc, log_scale, uniform).log().sum(), (loc, log_scale))
        with torch.no_grad():
            # the distribution's own quantile function, stable outside the support too, is the judge
            def x(shift: float, grow: float, uniform: Tensor = uniform) -> Tensor:
                return law(loc + shift, log_scale + grow).icdf(uniform[0]).log()

            inside = (x(0, 0) > LOW + 1e-4) & (x(0, 0) < HIGH - 1e-4) & (log_scale > -8)
            want_loc = (x(step, 0) - x(-step, 0)) / (2 * step)
            want_scale = (x(0, step) - x(0, -step)) / (2 * step)
        assert int(inside.sum()) > 20
        torch.testing.assert_close(by_loc[inside], want_loc[inside], rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(by_log_scale[inside], want_scale[inside], rtol=2e-4, atol=2e-5)


def test_gradients_of_the_kl_are_those_of_automatic_differentiation() -> None:
    loc, log_scale = torch.tensor([-3.0, -19.0, -0.1]).double(), torch.tensor([0.0, 1.0, -1.0]).double()
    assert torch.autograd.gradcheck(
        lambda m, s: gate_kl(m, s, LOW, HIGH), (loc.requires_grad_(), log_scale.requires_grad_())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_finite_over_the_whole_domain(dtype: torch.dtype) -> None:
    loc, log_scale = (t.clone().requires_grad_() for t in grid(dtype))
    gates = draw_gates(loc, log_scale, LOW, HIGH, 2000)
    assert gates.shape == (2000, len(loc)) and gates.dtype == dtype
    assert bool(((gates >= math.exp(LOW) * (1 - 1e-6)) & (gates <= 1)).all())
    value = gates.sum() + gate_kl(loc, log_scale, LOW, HIGH).sum()
    grads = torch.autograd.grad(value, (loc, log_scale))
    assert bool(torch.isfinite(value)) and all(bool(torch.isfinite(g).all()) for g in grads)
    for end in (torch.zeros(1, len(loc), dtype=dtype) + 2.0**-25, torch.ones(1, len(loc), dtype=dtype) - 2.0**-24):
        gate = quantile(loc, log_scale, end)
        grads = torch.autograd.grad(gate.sum(), (loc, log_scale))
        assert bool(torch.isfinite(gate).all()) and all(bool(torch.isfinite(g).all()) for g in grads)


def test_draws_follow_the_distribution_across_and_within_calls() -> None:
    loc, log_scale = torch.tensor([-3.0, -19.0, 0.0]), torch.tensor([0.0, 1.0, -1.0])
    for draws in (
        draw_gates(loc, log_scale, LOW, HIGH, 4000),
        torch.cat([draw_gates(loc, log_scale, LOW, HIGH, 1) for _ in range(2000)]),
    ):
        for g in range(3):
            cdf = law(loc[g], log_scale[g]).cdf
            assert (
                scipy.stats.kstest(draws[:, g].double(), lambda v, f=cdf: f(torch.as_tensor(v)).numpy()).pvalue > 1e-4
            )


def test_other_supports_are_served() -> None:
    loc, log_scale = torch.tensor([-1.0, 0.5]).double(), torch.tensor([0.3, -0.7]).double()
    q = TruncatedLogNormal(loc, log_scale.exp(), -4.0, 1.0)
    exact = torch.distributions.kl_divergence(
        q, TruncatedLogUniform(torch.tensor(-4.0).double(), torch.tensor(1.0).double())
    )
    torch.testing.assert_close(gate_kl(loc, log_scale, -4.0, 1.0), exact)
    assert float(draw_gates(loc, log_scale, -4.0, 1.0, 500).max()) > 1.0


def test_the_largest_uniform_has_a_finite_gradient(monkeypatch):
    """Half a step more than the largest float32 below one would round to one, whose quantile is infinite."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, device: torch.full(shape, 1 - 2.0**-24, dtype=dtype))
    loc = torch.full((3,), -1.0, requires_grad=True)
    log_scale = torch.full((3,), -4.0, requires_grad=True)
    draw_gates(loc, log_scale, -20.0, 0.0, 5).sum().backward()
    assert torch.isfinite(loc.grad).all() and torch.isfinite(log_scale.grad).all()
    assert float(loc.grad.abs().max()) < 100
