"""Divergences, the half-Cauchy product, restricted and matrix-normal laws, and masses of intervals."""

import math

import mpmath as mp
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import kl_divergence

from pyrobc.dists import HalfCauchyProduct, MatrixNormal, Restricted, in_double, interval_log_mass
from pyrobc.errors import ReductionError

FALSE_ALARM = 2e-5


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _doubled(law):
    return in_double(law)


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (dist.Gamma(4.0, 2.0), 0.241092),
        (dist.Gamma(0.5, 1.0), 1.382002),
        (dist.Gamma(_double(0.5), _double(1 / 0.09)), 14.963351),
        (dist.Gamma(0.5, 0.5), 0.99743303),
        (dist.InverseGamma(0.5, 1.0), 1.02223594),
        (dist.InverseGamma(2.0, 6.0), 1.328946),
    ],
)
def test_log_normal_divergences_golden_and_by_quadrature(prior, expected):
    q, prior = _doubled(dist.LogNormal(0.3, 0.4)), _doubled(prior)
    kl = float(kl_divergence(q, prior))
    assert kl == pytest.approx(expected, abs=2e-6)

    def integrand(x: float) -> float:
        theta = _double(math.exp(x))
        return math.exp(float(q.log_prob(theta)) + x) * float(q.log_prob(theta) - prior.log_prob(theta))

    assert kl == pytest.approx(quad(integrand, -4, 5, limit=200)[0], abs=1e-7)


def test_log_normal_gamma_minimum():
    # The best log-normal for Gamma(1/2, 1): m = -1 - ln 2, s = sqrt 2, KL = (1 - ln 2) / 2.
    prior = dist.Gamma(_double(0.5), _double(1.0))
    loc, scale = _double(-1 - math.log(2)).requires_grad_(), _double(math.sqrt(2)).requires_grad_()
    kl = kl_divergence(dist.LogNormal(loc, scale), prior)
    assert kl.item() == pytest.approx(0.5 * (1 - math.log(2)))
    assert all(abs(g.item()) < 1e-12 for g in torch.autograd.grad(kl, (loc, scale)))


def _product_cdf(y: float) -> float:
    # P(w <= y) = E[(2/pi) atan(y / s)], s half-Cauchy: one integral, over the angle of s
    return quad(lambda u: 2 / math.pi * math.atan(y / math.tan(math.pi / 2 * u)), 0, 1, limit=400)[0]


@pytest.mark.parametrize(
    "y", [1e-8, 1e-3, 0.3, math.sqrt(2) - 1, 0.41422, 0.9999, 1.0, 1.5, 2.41421, 2.4143, 80.0, 1e6]
)
def test_half_cauchy_product_cdf(y):
    law = HalfCauchyProduct(_double(2.0))
    got = float(law.cdf(_double(2.0 * y)))
    assert got == pytest.approx(_product_cdf(y), rel=1e-6, abs=1e-12)
    # Legendre's chi by polylogarithms, 30 digits
    mp.mp.dps = 30
    z = mp.mpf(y) if y < 1 else 1 / mp.mpf(y)
    if y == 1:
        return
    chi = (mp.polylog(2, z) - mp.polylog(2, -z)) / 2
    tail = 4 / mp.pi**2 * (chi - mp.log(z) * mp.atanh(z))
    assert got == pytest.approx(float(mp.re(tail) if y < 1 else 1 - mp.re(tail)), rel=1e-12)


def test_half_cauchy_product_density_samples_and_far_masses():
    law = HalfCauchyProduct(_double(0.3))
    total = quad(lambda v: math.exp(float(law.log_prob(_double(math.exp(v)))) + v), -80, 80, limit=400, points=[-1.2])[
        0
    ]
    assert total == pytest.approx(1.0, abs=1e-8)
    near_median = torch.tensor([0.3 * (1 - 1e-9), 0.3, 0.3 * (1 + 1e-9), 0.3 * math.exp(0.02)], dtype=torch.float64)
    assert torch.isfinite(law.log_prob(near_median)).all()
    assert torch.isposinf(law.log_prob(_double(0.0)))
    step = 1e-5
    slope = (law.cdf(_double(0.7 + step)) - law.cdf(_double(0.7 - step))) / (2 * step)
    assert float(slope.log()) == pytest.approx(float(law.log_prob(_double(0.7))), rel=1e-7)
    # an upper tail of 1e-14 keeps its digits, because the interval is mirrored
    far = float(law.log_mass(1e16, math.inf))
    assert far == pytest.approx(math.log(4 / math.pi**2 * 3e-17 * (1 - math.log(3e-17))), rel=1e-9)

    torch.manual_seed(0)
    alpha, beta = (d.sample((20_000,)) for d in (dist.Gamma(0.5, 1 / 0.09), dist.InverseGamma(0.5, 1.0)))
    local = dist.HalfCauchy(1.0).sample((20_000,))
    for draws in (law.sample((20_000,)), (torch.sqrt(alpha * beta) * local).double()):
        assert scipy.stats.kstest(law.cdf(draws).numpy(), "uniform").pvalue > FALSE_ALARM
    assert law.expand((3, 2)).sample((5,)).shape == (5, 3, 2)


def test_half_cauchy_from_two_gammas_has_its_quartiles():
    torch.manual_seed(3)
    alpha, beta = (d.sample((200_000,)) for d in (dist.Gamma(0.5, 1 / 0.25), dist.InverseGamma(0.5, 1.0)))
    quartiles = torch.quantile(torch.sqrt(alpha * beta), torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(
        quartiles, 0.5 * torch.tan(torch.pi / 2 * torch.tensor([0.25, 0.5, 0.75])), rtol=0.02, atol=0
    )


def test_half_cauchy_product_gradients():
    scale, upper = _double(0.7).requires_grad_(), torch.tensor([0.01, 0.69, 0.7, 5.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: HalfCauchyProduct(s).log_mass(0.0, upper), scale)
    assert torch.autograd.gradcheck(lambda s: HalfCauchyProduct(s).log_prob(upper), scale)


SCIPY_TWINS = [
    (dist.Normal(0.5, 2.0), scipy.stats.norm(0.5, 2.0)),
    (dist.LogNormal(0.2, 0.7), scipy.stats.lognorm(0.7, scale=math.exp(0.2))),
    (dist.HalfNormal(1.5), scipy.stats.halfnorm(scale=1.5)),
    (dist.Cauchy(0.3, 0.8), scipy.stats.cauchy(0.3, 0.8)),
    (dist.HalfCauchy(0.4), scipy.stats.halfcauchy(scale=0.4)),
    (dist.Laplace(0.1, 0.6), scipy.stats.laplace(0.1, 0.6)),
    (dist.Exponential(1.7), scipy.stats.expon(scale=1 / 1.7)),
    (dist.Gamma(2.5, 1.3), scipy.stats.gamma(2.5, scale=1 / 1.3)),
    (dist.InverseGamma(2.5, 1.3), scipy.stats.invgamma(2.5, scale=1.3)),
    (dist.Uniform(-1.0, 3.0), scipy.stats.uniform(-1.0, 4.0)),
    (dist.Weibull(2.0, 1.5), scipy.stats.weibull_min(1.5, scale=2.0)),
]


@pytest.mark.parametrize(("law", "twin"), SCIPY_TWINS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.4), (0.2, 5.0), (2.0, 2.5)])
def test_interval_masses_match_scipy(law, twin, low, high):
    got = interval_log_mass(_doubled(law), _double(low), _double(high))
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(math.log(twin.cdf(high) - twin.cdf(low)), rel=1e-6)


def test_interval_masses_in_far_tails_and_of_products():
    far = interval_log_mass(dist.Normal(_double(0.0), _double(1e-3)), _double(1.0), _double(2.0))
    assert float(far) == pytest.approx(scipy.stats.norm.logsf(1000.0), rel=1e-10)
    assert float(interval_log_mass(_doubled(dist.Laplace(0.0, 1e-3)), _double(1.0), _double(2.0))) == pytest.approx(
        -1000 - math.log(2)
    )
    wide = interval_log_mass(_doubled(dist.Cauchy(0.0, 1.0)), _double(1e12), _double(2e12))
    assert float(wide) == pytest.approx(math.log(0.5e-12 / math.pi), rel=1e-9)
    three = dist.Normal(torch.zeros(2, 3, dtype=torch.float64), 1.0).to_event(1)
    one = interval_log_mass(dist.Normal(_double(0.0), _double(1.0)), _double(-1.0), _double(1.0))
    torch.testing.assert_close(interval_log_mass(three, _double(-1.0), _double(1.0)), (3 * one).expand(2))
    assert torch.isneginf(interval_log_mass(_doubled(dist.LogNormal(0.0, 1.0)), _double(-2.0), _double(0.0)))
    with pytest.raises(ReductionError, match="without cdf.*interval_log_mass.register"):
        interval_log_mass(dist.StudentT(3.0), _double(0.0), _double(1.0))


def test_restricted_density_samples_and_shapes():
    law = Restricted(dist.Gamma(_double(2.0), _double(1.0)), 0.5, 3.0)
    assert quad(lambda t: math.exp(float(law.log_prob(_double(t)))), 0.5, 3.0)[0] == pytest.approx(1.0, abs=1e-7)
    assert torch.isneginf(law.log_prob(_double(3.5)))
    assert float(law.cdf(_double(3.0))) == pytest.approx(1.0)
    torch.manual_seed(0)
    rope = Restricted(dist.Normal(torch.zeros(3), 2.0), torch.tensor(-0.5), torch.tensor(1.0))
    draws = rope.sample((5000,))
    assert draws.shape == (5000, 3)
    assert scipy.stats.kstest(rope.cdf(draws).flatten().numpy(), "uniform").pvalue > FALSE_ALARM
    assert rope.expand((4, 3)).log_prob(torch.zeros(4, 3)).shape == (4, 3)
    vector = Restricted(dist.Normal(torch.zeros(3), 2.0).to_event(1), -0.5, 1.0)
    assert vector.batch_shape == () and vector.event_shape == (3,)
    torch.testing.assert_close(vector.log_prob(torch.zeros(3)), rope.log_prob(torch.zeros(3)).sum())
    assert torch.isneginf(vector.log_prob(torch.tensor([0.0, 2.0, 0.0])))
    with pytest.raises(ValueError, match="lower < upper"):
        Restricted(dist.Normal(0.0, 1.0), 1.0, -1.0, validate_args=True)


def test_matrix_normal_is_a_kronecker_normal():
    torch.manual_seed(0)
    rows, columns = (torch.linalg.cholesky(torch.eye(n, dtype=torch.float64) + 0.3) for n in (2, 3))
    loc = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    law = MatrixNormal(loc, rows, columns)
    covariance = np.kron((rows @ rows.T).numpy(), (columns @ columns.T).numpy())
    twin = scipy.stats.multivariate_normal(loc.flatten().numpy(), covariance)
    value = law.sample()
    assert float(law.log_prob(value)) == pytest.approx(twin.logpdf(value.flatten().numpy()))
    draws = law.sample((50_000,)).flatten(1)
    torch.testing.assert_close(torch.cov(draws.T), torch.tensor(covariance), atol=0.06, rtol=0)
    torch.testing.assert_close(law.variance.flatten(), torch.tensor(covariance).diagonal())
    assert law.expand((4,)).rsample((2,)).shape == (2, 4, 2, 3)


def test_double_copies_share_parts_and_carry_gradients():
    loc = torch.tensor([0.1, 0.2], requires_grad=True)
    law = dist.Normal(loc, 1.0).to_event(1)
    memo: dict[int, object] = {}
    twin = in_double(law, memo)
    assert twin.base_dist.loc.dtype == torch.float64 and law.base_dist.loc.dtype == torch.float32
    assert in_double(Restricted(law, -1.0, 1.0), memo).base is twin
    twin.log_prob(torch.zeros(2, dtype=torch.float64)).backward()
    assert loc.grad is not None
    assert law.base_dist.loc.dtype == torch.float32 and not twin._validate_args
    # one number expanded to many is not written out
    wide = in_double(dist.Normal(torch.zeros(4, 1), torch.tensor(2.0)).expand((4, 1000)))
    assert wide.loc.dtype == torch.float64 and wide.loc.stride() == (1, 0) and wide.scale.stride() == (0, 0)


def test_laws_serve_as_pyro_sites():
    def model():
        with pyro.plate("groups", 4):
            local = pyro.sample("scale", HalfCauchyProduct(torch.tensor(1.0)))
            pyro.sample("rope", Restricted(dist.Normal(0.0, 1.0), -0.1, 0.1))
        return local

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["scale"]["value"].shape == (4,) and torch.isfinite(trace.nodes["rope"]["log_prob_sum"])
