"""Truncated log-normal reductions, intervals and points, and the known errors of other codes."""

import math

import mpmath as mp
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from pyrobc.bmr import reduce
from pyrobc.dists import HalfCauchyProduct, Restricted, TruncatedLogNormal, TruncatedLogUniform
from pyrobc.errors import ReductionError

# loc, scale, Delta F of the spike, of the log-uniform on 2^-23..2^-8 and on 2^-23..2^-4: 50-digit values
GOLDEN = [
    (0.0, 0.1, -19994.927, -1541.0371, -387.49406),
    (-1.0, 0.5, -719.20705, -43.777976, -8.0956872),
    (-5.0, 0.5, -447.23006, -1.3279135, 0.41780202),
    (-10.0, 3.0, -4.5765156, 0.55789603, 0.38634575),
    (-10.0, 5.0, -1.4860763, 0.33864910, 0.25181932),
    (-20.0, 3.0, 1.6713286, -1.0819307, -1.3183114),
    (0.5, 3.0, -21.533906, -2.3296950, -0.72997995),
]
LOW = -23 * math.log(2)
SPIKE = math.exp(-20.0)


def _double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _uniform(low: float, high: float) -> TruncatedLogUniform:
    return TruncatedLogUniform(_double(low), _double(high))


def _log_mass(low: mp.mpf, high: mp.mpf) -> mp.mpf:
    if low > 0:
        return mp.log((mp.erfc(low / mp.sqrt(2)) - mp.erfc(high / mp.sqrt(2))) / 2)
    if high < 0:
        return _log_mass(-high, -low)
    return mp.log1p(-(mp.erfc(-low / mp.sqrt(2)) + mp.erfc(high / mp.sqrt(2))) / 2)


def _reference(m: float, s: float, m_r: float, s_r: float) -> dict[str, mp.mpf]:
    """The three reductions in 90 digits, in the published form with its 2 pi."""
    mp.mp.dps = 90
    a, b = mp.mpf(-20), mp.mpf(0)
    m, s, m_r, s_r = (mp.mpf(v) for v in (m, s, m_r, s_r))
    log_z = _log_mass((a - m) / s, (b - m) / s)
    v = s * s + s_r * s_r
    scale, loc = s * s_r / mp.sqrt(v), (m * s_r * s_r + m_r * s * s) / v
    low, high = mp.mpf(LOW), mp.mpf(-8 * math.log(2))
    return {
        "normal": mp.log(b - a)
        + _log_mass((a - loc) / scale, (b - loc) / scale)
        - log_z
        - _log_mass((a - m_r) / s_r, (b - m_r) / s_r)
        - mp.log(2 * mp.pi * v) / 2
        - (m - m_r) ** 2 / (2 * v),
        "uniform": mp.log((b - a) / (high - low)) + _log_mass((low - m) / s, (high - m) / s) - log_z,
        "spike": mp.log(b - a) - mp.log(s) - mp.log(2 * mp.pi) / 2 - ((a - m) / s) ** 2 / 2 - log_z,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_table(dtype):
    loc, scale, spike, narrow, wide = torch.tensor(GOLDEN, dtype=torch.float64).unbind(1)
    q, p = TruncatedLogNormal(loc.to(dtype), scale.to(dtype)), TruncatedLogUniform()
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    for reduced, expected in (
        (dist.Delta(torch.tensor(-20.0, dtype=dtype).exp()), spike),
        (_uniform(LOW, -8 * math.log(2)), narrow),
        (_uniform(LOW, -4 * math.log(2)), wide),
    ):
        result = reduce(q, p, reduced)
        assert result.delta_f.dtype == torch.float64
        torch.testing.assert_close(result.delta_f, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(result.delta_f >= 0, expected >= 0)


def test_general_normal_reduction_golden_and_limit():
    q = TruncatedLogNormal(_double([-5.0, -10.0]), _double([2.0, 5.0]))
    reduced = TruncatedLogNormal(_double([-18.0, -20.0]), _double([0.5, 1.0]))
    result = reduce(q, TruncatedLogUniform(), reduced)
    torch.testing.assert_close(result.delta_f, _double([-18.522758001, -1.16247361]), rtol=1e-8, atol=0)
    limit = reduce(q, TruncatedLogUniform(), TruncatedLogNormal(_double(-20.0), _double(1e-6)))
    spike = reduce(q, TruncatedLogUniform(), dist.Delta(_double(SPIKE)))
    torch.testing.assert_close(limit.delta_f, spike.delta_f, rtol=0, atol=1e-5)
    vague = TruncatedLogNormal(_double(-10.0), _double(1e9))
    for reduced_prior in (_uniform(LOW, -4.0), TruncatedLogNormal(-20.0, 1.0), dist.Delta(_double(SPIKE))):
        assert float(reduce(vague, TruncatedLogUniform(), reduced_prior).delta_f) == pytest.approx(0.0, abs=1e-12)
    assert float(reduce(q, TruncatedLogUniform(), TruncatedLogUniform()).delta_f.abs().max()) == 0.0


@pytest.mark.parametrize("narrow", [1e-6, 0.5, 40.0])
def test_two_thousand_random_laws_match_90_digits(narrow):
    generator = torch.Generator().manual_seed(7)
    uniform = torch.rand((3, 700), generator=generator, dtype=torch.float64)
    loc, scale = uniform[0] * 25 - 20, (uniform[1] * 25 - 20).exp()
    loc_r = torch.full_like(loc, -20.0) if narrow == 1e-6 else uniform[2] * 25 - 20
    q, p = TruncatedLogNormal(loc, scale), _uniform(-20.0, 0.0)
    got = {
        "normal": reduce(q, p, TruncatedLogNormal(loc_r, _double(narrow))).delta_f,
        "uniform": reduce(q, p, _uniform(LOW, -8 * math.log(2))).delta_f,
        "spike": reduce(q, p, dist.Delta(_double(SPIKE))).delta_f,
    }
    worst = dict.fromkeys(got, 0.0)
    for i in range(len(loc)):
        reference = _reference(float(loc[i]), float(scale[i]), float(loc_r[i]), narrow)
        for name, value in reference.items():
            worst[name] = max(worst[name], float(abs((mp.mpf(float(got[name][i])) - value) / value)))
    assert max(worst.values()) <= 1e-8, worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_million_random_laws_are_finite(dtype):
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand((2, 1_000_000), generator=generator, dtype=dtype)
    q = TruncatedLogNormal(uniform[0] * 25 - 20, (uniform[1] * 25 - 20).exp())
    p = TruncatedLogUniform()
    for reduced in (
        dist.Delta(torch.tensor(SPIKE, dtype=dtype)),
        TruncatedLogUniform(LOW, -4 * math.log(2)),
        TruncatedLogNormal(-20.0, 1e-6),
    ):
        delta_f = reduce(q, p, reduced).delta_f
        assert torch.isfinite(delta_f).all()
        # a density ratio of this prior is at most 20 / (narrowest scale); nothing overflows towards pruning
        assert float(delta_f.max()) < 50.0


def test_gradients_are_finite_and_right_at_the_ends_of_the_support():
    p = TruncatedLogUniform()
    for reduced in (dist.Delta(_double(SPIKE)), _uniform(LOW, -4.0), TruncatedLogNormal(_double(-20.0), _double(0.5))):

        def delta_f(loc: Tensor, scale: Tensor, reduced: dist.Distribution = reduced) -> Tensor:
            return reduce(TruncatedLogNormal(loc, scale), p, reduced).delta_f

        for start in (0.0, -20.0, -7.0, 3.0, -26.0):
            inputs = (_double(start).requires_grad_(), _double(1.5).requires_grad_())
            assert torch.autograd.gradcheck(delta_f, inputs, atol=1e-5, rtol=1e-4)


def _quadrature(
    q: TruncatedLogNormal, p: dist.Distribution, reduced: dist.Distribution, low: float, high: float
) -> float:
    def integrand(x: float) -> float:
        theta = _double(math.exp(x))
        return math.exp(float(q.log_prob(theta) + reduced.log_prob(theta) - p.log_prob(theta)) + x)

    middle = float(torch.log(q.mean))
    points = [v for v in (middle - 2, middle, middle + 2) if low < v < high]
    return math.log(quad(integrand, low, high, limit=400, points=points or None, epsabs=0, epsrel=1e-10)[0])


def test_truncated_log_normal_prior_by_quadrature():
    p = TruncatedLogNormal(_double(-6.0), _double(6.0))
    for loc, scale in ((-4.0, 1.0), (-11.0, 2.5), (1.5, 1.0)):
        q = TruncatedLogNormal(_double(loc), _double(scale))
        for reduced, low, high in (
            (TruncatedLogNormal(_double(-12.0), _double(3.0)), -20.0, 0.0),
            (_uniform(-15.0, -5.0), -15.0, -5.0),
            (TruncatedLogNormal(_double(-3.0), _double(2.0), _double(-15.0), _double(-5.0)), -15.0, -5.0),
        ):
            result = reduce(q, p, reduced)
            assert float(result.delta_f) == pytest.approx(_quadrature(q, p, reduced, low, high), abs=1e-6)
            at = _double(math.exp(-8.0))
            posterior = q.log_prob(at) + reduced.log_prob(at) - p.log_prob(at) - result.delta_f
            assert float(result.posterior.log_prob(at)) == pytest.approx(float(posterior), abs=1e-7)
    vague = reduce(TruncatedLogNormal(_double(-6.0), _double(20.0)), p, TruncatedLogUniform())
    assert torch.isnan(vague.delta_f) and "precision" in vague.reason


def test_reduced_posteriors_of_a_log_uniform_prior():
    q, p = TruncatedLogNormal(_double(-4.0), _double(1.0)), TruncatedLogUniform()
    at = _double(math.exp(-8.0))
    for reduced in (_uniform(-15.0, -5.0), TruncatedLogNormal(_double(-12.0), _double(3.0))):
        result = reduce(q, p, reduced)
        posterior = q.log_prob(at) + reduced.log_prob(at) - p.log_prob(at) - result.delta_f
        assert float(result.posterior.log_prob(at)) == pytest.approx(float(posterior), abs=1e-6)


def test_supports_that_do_not_nest_are_undefined():
    q, p = TruncatedLogNormal(_double([-4.0, -5.0]), _double(1.0)), TruncatedLogUniform()
    result = reduce(q, p, TruncatedLogUniform(_double([-30.0, -10.0]), _double(-1.0)))
    assert result.is_defined.tolist() == [False, True] and "beyond the support" in result.reason
    shifted = TruncatedLogNormal(_double(-4.0), _double(1.0), -30.0, 0.0)
    assert torch.isnan(reduce(shifted, p, _uniform(-10.0, -1.0)).delta_f)


def test_rope_is_the_log_ratio_of_masses_and_contains_the_log_uniform_reduction():
    q, p = TruncatedLogNormal(_double([-5.0, -1.0]), _double(0.5)), _uniform(-20.0, 0.0)
    result = reduce(q, p, Restricted(p, math.exp(LOW), 2**-4.0))
    torch.testing.assert_close(
        result.delta_f, reduce(q, p, _uniform(LOW, -4 * math.log(2))).delta_f, rtol=1e-6, atol=1e-6
    )
    # far from the interval: a number where the difference of two distribution functions is zero
    far = reduce(dist.Normal(_double(50.0), _double(0.1)), dist.Normal(_double(0.0), _double(1.0)), _rope(0.1))
    assert float(far.delta_f) == pytest.approx(-0.5 * 499.0**2 - math.log(499.0) - 0.918939 + 2.530, abs=0.01)


def _rope(half_width: float, scale: float = 1.0) -> Restricted:
    return Restricted(dist.Normal(_double(0.0), _double(scale)), -half_width, half_width)


def test_rope_with_another_base_is_two_reductions_in_a_row():
    q, p = dist.Normal(_double(0.4), _double(0.2)), dist.Normal(_double(0.0), _double(1.0))
    base = dist.Normal(_double(0.0), _double(0.5))
    first = reduce(q, p, base)
    second = reduce(first.posterior, base, _rope(0.3, 0.5))
    whole = reduce(q, p, _rope(0.3, 0.5))
    torch.testing.assert_close(whole.delta_f, first.delta_f + second.delta_f)
    density = whole.posterior.log_prob(_double(0.1))
    expected = (
        q.log_prob(_double(0.1)) + _rope(0.3, 0.5).log_prob(_double(0.1)) - p.log_prob(_double(0.1)) - whole.delta_f
    )
    torch.testing.assert_close(density, expected)
    with pytest.raises(ReductionError, match="Laplace.*no closed form"):
        reduce(q, p, Restricted(dist.Laplace(_double(0.0), _double(1.0)), -0.3, 0.3))


def test_horseshoe_scale_has_a_rope_but_no_deletion():
    q, p = dist.LogNormal(_double(-6.0), _double(1.0)), HalfCauchyProduct(_double(0.1))
    rope = reduce(q, p, Restricted(p, 0.0, 0.01))
    expected = float(q.cdf(_double(0.01)).log() - p.cdf(_double(0.01)).log())
    assert float(rope.delta_f) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ReductionError, match="HalfCauchyProduct.*ROPE"):
        reduce(q, p, dist.Delta(_double(0.0)))
    with pytest.raises(ReductionError, match="zero has no density.*spike.*ROPE"):
        reduce(TruncatedLogNormal(-3.0, 1.0), TruncatedLogUniform(), dist.Delta(torch.tensor(0.0)))


def test_interval_without_prior_mass_is_undefined_and_without_posterior_mass_minus_infinity():
    p = dist.Uniform(_double(0.0), _double(1.0))
    empty = reduce(dist.Uniform(_double(0.2), _double(0.5)), p, Restricted(p, 0.7, 0.9))
    assert torch.isneginf(empty.delta_f)
    nowhere = reduce(dist.Uniform(_double(0.2), _double(0.5)), p, Restricted(p, 2.0, 3.0))
    assert torch.isnan(nowhere.delta_f) and "no mass" in nowhere.reason


class TestKnownErrors:
    """Slips found in released codes, each of which would change what is pruned."""

    def test_missing_two_pi_in_the_normal_reduction(self):
        # Without the 2 pi every value is larger by 0.9189 nats, and this unit would be pruned.
        result = reduce(
            TruncatedLogNormal(_double(-10.0), _double(6.5)), TruncatedLogUniform(), dist.Delta(_double(SPIKE))
        )
        assert -0.9189 < float(result.delta_f) < 0.0
        q = TruncatedLogNormal(_double(-20.0), _double(3.0))
        assert float(reduce(q, TruncatedLogUniform(), dist.Delta(_double(SPIKE))).delta_f) == pytest.approx(
            1.6713286, abs=1e-6
        )

    def test_missing_half_on_the_log_variance_of_the_full_covariance_form(self):
        # Right only for prior variance one: the diagonal form at variance four tells.
        variance = 4.0
        q = dist.MultivariateNormal(_double([0.3, -0.2]), torch.diag(_double([0.04, 0.09])))
        p = dist.MultivariateNormal(torch.zeros(2), variance * torch.eye(2))
        reduced = dist.MultivariateNormal(torch.zeros(2), torch.diag(torch.tensor([1e-12, 1e-12])))
        parts = [0.5 * math.log(variance / s2) - 0.5 * m * m / s2 for m, s2 in ((0.3, 0.04), (-0.2, 0.09))]
        assert float(reduce(q, p, reduced).delta_f) == pytest.approx(sum(parts), abs=1e-8)

    def test_sign_of_the_dirichlet_form(self):
        # Counts that agree with the reduced prior: positive evidence for it.
        counts = _double([7.0, 2.0, 0.0])
        p, r = torch.ones(3, dtype=torch.float64), _double([5.0, 1.0, 0.1])
        assert float(reduce(dist.Dirichlet(p + counts), dist.Dirichlet(p), dist.Dirichlet(r)).delta_f) > 2.0

    def test_overflow_to_plus_infinity_prunes_the_best_unit(self):
        # loc beyond the support and a small scale: the most useful gate, Delta F = -87991
        q = TruncatedLogNormal(torch.tensor(1.0), torch.tensor(0.05))
        for reduced in (TruncatedLogNormal(-20.0, 1e-6), dist.Delta(torch.tensor(SPIKE))):
            assert float(reduce(q, TruncatedLogUniform(), reduced).delta_f) == pytest.approx(-87991.0, abs=1.0)

    def test_signal_to_noise_overflow_prunes_the_best_unit(self):
        # exp(-0.2) with hardly any noise: E = 0.8187, SNR = 149; an overflowing erfcx makes it 0 / 0
        q = TruncatedLogNormal(torch.tensor(-0.2), torch.tensor(0.0067))
        assert float(q.mean) == pytest.approx(0.8187, abs=1e-4)
        assert float(q.snr) == pytest.approx(149.2, abs=0.1)
