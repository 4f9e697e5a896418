"""The truncated log-normal against 80-digit arithmetic, quadrature and its own samples."""

import math
from collections.abc import Callable

import mpmath as mp
import pytest
import scipy.stats
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import kl_divergence

from pyrobc.dists import TruncatedLogNormal, TruncatedLogUniform
from pyrobc.dists.truncation import log_mass_between, log_mills, mills_moments, truncated_moments

FALSE_ALARM = 2e-5

# loc, scale, E[theta], SNR, KL to the log-uniform: 50-digit values
GOLDEN = [
    (0.0, 0.1, 0.92495757, 17.078814, 4.5725260),
    (-1.0, 0.5, 0.39806875, 2.1703209, 2.3482017),
    (-5.0, 0.5, 0.0076350942, 1.8763826, 2.2699409),
    (-10.0, 3.0, 0.0025791624, 0.11396405, 0.48418529),
    (-10.0, 5.0, 0.017229051, 0.21098957, 0.12705309),
    (-20.0, 3.0, 3.7053176e-7, 0.018147361, 1.1713286),
    (0.5, 3.0, 0.26376216, 0.97024904, 1.2377386),
]


def _log_mass(low: mp.mpf, high: mp.mpf) -> mp.mpf:
    if low > 0:
        return mp.log((mp.erfc(low / mp.sqrt(2)) - mp.erfc(high / mp.sqrt(2))) / 2)
    if high < 0:
        return _log_mass(-high, -low)
    return mp.log1p(-(mp.erfc(-low / mp.sqrt(2)) + mp.erfc(high / mp.sqrt(2))) / 2)


def _log_phi(x: mp.mpf) -> mp.mpf:
    return -x * x / 2 - mp.log(2 * mp.pi) / 2


def _reference(loc: float, scale: float, a: float = -20.0, b: float = 0.0) -> dict[str, mp.mpf]:
    m, s = mp.mpf(loc), mp.mpf(scale)
    low, high = (a - m) / s, (b - m) / s
    log_z = _log_mass(low, high)

    def log_moment(k: int) -> mp.mpf:
        return k * m + k * k * s * s / 2 + _log_mass(low - k * s, high - k * s) - log_z

    at_low, at_high = mp.exp(_log_phi(low) - log_z), mp.exp(_log_phi(high) - log_z)
    entropy = mp.log(s) + mp.log(2 * mp.pi * mp.e) / 2 + log_z + (low * at_low - high * at_high) / 2
    return {
        "mean": mp.exp(log_moment(1)),
        "snr": 1 / mp.sqrt(mp.expm1(log_moment(2) - 2 * log_moment(1))),
        "kl": mp.log(b - a) - entropy,
        "log_mass": _log_mass((-16 - m) / s, (mp.mpf(-5.5) - m) / s) - log_z,
        "mean_log": m + s * (at_low - at_high),
    }


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _draw_parameters(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Locations in [-30, 10], beyond the support on both sides, and scales from 2e-9 to 148."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((2, count), dtype=dtype, generator=generator)
    return uniform[0] * 40 - 30, (uniform[1] * 25 - 20).exp()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-6)])
def test_golden_moments(dtype, tolerance):
    loc, scale, mean, snr, kl = torch.tensor(GOLDEN, dtype=dtype).unbind(1)
    q = TruncatedLogNormal(loc, scale)
    assert q.mean.dtype == dtype
    torch.testing.assert_close(q.mean, mean, rtol=tolerance, atol=0)
    torch.testing.assert_close(q.snr, snr.double(), rtol=tolerance, atol=0)
    torch.testing.assert_close(kl_divergence(q, TruncatedLogUniform()), kl, rtol=tolerance, atol=0)
    assert torch.equal(q.snr < 1, torch.tensor([row[3] < 1 for row in GOLDEN]))


def test_two_thousand_random_laws_match_80_digits():
    mp.mp.dps = 80
    loc, scale = _draw_parameters(2000, torch.float64)
    q = TruncatedLogNormal(loc, scale)
    p = TruncatedLogUniform(_double(-20.0), _double(0.0))
    moments = q._moments()
    got = {
        "mean": q.mean,
        "snr": q.snr,
        "kl": kl_divergence(q, p),
        "log_mass": q.log_mass(-16.0, -5.5),
        "mean_log": q._peak()[0] + scale * moments.offset,
    }
    worst = dict.fromkeys(got, 0.0)
    for i, (m, s) in enumerate(zip(loc.tolist(), scale.tolist(), strict=True)):
        for name, value in _reference(m, s).items():
            # ln theta crosses zero, and so does the log of a mass near one: both have an absolute scale as well
            floor = {"log_mass": 1e-6, "mean_log": 1.0}.get(name, 0.0)
            error = abs(mp.mpf(float(got[name][i])) - value) / max(abs(value), floor)
            worst[name] = max(worst[name], float(error))
    assert max(worst.values()) <= 1e-8, worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_finite_over_the_whole_range(dtype):
    torch.manual_seed(0)
    loc, scale = (t.requires_grad_() for t in _draw_parameters(100_000, dtype))
    p = TruncatedLogUniform(torch.tensor(-20.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))

    def law() -> TruncatedLogNormal:
        return TruncatedLogNormal(loc, scale)

    outputs: dict[str, Callable[[], Tensor]] = {
        "kl": lambda: kl_divergence(law(), p),
        "log_moment": lambda: law().log_moment(1),
        "variance": lambda: law().variance,
        "snr": lambda: law().snr,
        "entropy": lambda: law().entropy(),
        "log_mass": lambda: law().log_mass(-16.0, -5.5),
        "rsample": lambda: law().rsample(),
        "log_prob": lambda: law().log_prob(law().rsample().detach()),
    }
    for name, compute in outputs.items():
        value = compute()
        grads = torch.autograd.grad(value.sum(), (loc, scale))
        assert torch.isfinite(value).all(), name
        assert all(torch.isfinite(grad).all() for grad in grads), name
        if name == "kl":
            assert (value >= -1e-5).all()
        if name == "log_moment":
            assert ((value >= -20) & (value <= 0)).all()
        if name == "rsample":
            assert law().support.check(value).all()


@pytest.mark.parametrize(("loc", "scale"), [(-3.0, 0.7), (4.0, 0.5), (-25.0, 2.0), (-8.0, 40.0), (2.0, 1e-3)])
def test_density_integrates_to_one_and_agrees_with_cdf(loc, scale):
    q = TruncatedLogNormal(_double(loc), _double(scale))
    median = float(torch.log(q.icdf(_double(0.5))))
    width = float(torch.log(q.icdf(_double(0.99)) / q.icdf(_double(0.01))))

    def density(x: float) -> float:
        return math.exp(float(q.log_prob(_double(math.exp(x)))) + x)

    points = sorted({max(-20.0, median - 3 * width), median, min(0.0, median + 3 * width)})
    edges = [-20.0, *points, 0.0]
    total = sum(quad(density, a, b, limit=200)[0] for a, b in zip(edges, edges[1:], strict=False) if b > a)
    assert total == pytest.approx(1.0, abs=1e-6)
    below = sum(
        quad(density, a, min(b, median), limit=200)[0] for a, b in zip(edges, edges[1:], strict=False) if a < median
    )
    assert below == pytest.approx(0.5, abs=1e-6)
    assert float(q.cdf(q.icdf(_double(0.3)))) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize(("loc", "scale"), [(-3.0, 0.7), (4.0, 0.5), (-25.0, 2.0), (-8.0, 40.0), (-19.9, 3.0)])
def test_samples_follow_the_cdf_within_and_across_calls(loc, scale):
    torch.manual_seed(1)
    q = TruncatedLogNormal(_double(loc), _double(scale))
    one_call = q.sample((20_000,))
    many_calls = torch.stack([q.sample() for _ in range(500)])
    for draws in (one_call, many_calls):
        assert scipy.stats.kstest(q.cdf(draws).numpy(), "uniform").pvalue > FALSE_ALARM
    assert one_call.mean().item() == pytest.approx(q.mean.item(), abs=6 * one_call.std().item() / math.sqrt(20_000))


@pytest.mark.parametrize("loc", [-25.0, -20.0, -7.0, 0.0, 3.0])
@pytest.mark.parametrize("scale", [0.05, 2.0, 30.0])
def test_gradients_match_finite_differences(loc, scale):
    parameters = (_double(loc).requires_grad_(), _double(scale).requires_grad_())
    prob = torch.linspace(0.02, 0.98, 7, dtype=torch.float64)

    def check(function: Callable[[TruncatedLogNormal], Tensor]) -> None:
        assert torch.autograd.gradcheck(
            lambda m, s: function(TruncatedLogNormal(m, s)), parameters, eps=1e-6, atol=1e-5, rtol=1e-4
        )

    check(lambda q: q._quantile_log(prob))
    check(lambda q: q.entropy_log())
    check(lambda q: q.log_moment(2))
    check(lambda q: q.log_mass(-11.0, -4.0))
    check(lambda q: q.log_density_log(_double(-3.0)))


def test_signal_to_noise_of_narrow_laws_is_that_of_the_log():
    # For a tiny scale inside the support theta is normal on the log scale: CV = scale.
    q = TruncatedLogNormal(_double(-3.0), torch.tensor([1e-4, 1e-6, 1e-8], dtype=torch.float64))
    torch.testing.assert_close(q.snr, 1.0 / q.scale, rtol=1e-7, atol=0)


def test_batch_shape_expand_and_support():
    q = TruncatedLogNormal(torch.zeros(3, 1), torch.ones(2))
    assert q.batch_shape == (3, 2) and q.rsample((5,)).shape == (5, 3, 2)
    wide = q.expand((4, 3, 2))
    assert wide.batch_shape == (4, 3, 2) and wide.log_prob(torch.tensor(0.5)).shape == (4, 3, 2)
    assert kl_divergence(wide, TruncatedLogUniform()).shape == (4, 3, 2)
    assert torch.isneginf(TruncatedLogNormal(0.0, 1.0, validate_args=False).log_prob(torch.tensor(1.5)))
    with pytest.raises(ValueError, match="low < high"):
        TruncatedLogNormal(0.0, 1.0, low=0.0, high=-1.0, validate_args=True)
    outside = TruncatedLogUniform(-2.0, 0.0)
    assert torch.isposinf(kl_divergence(q, outside)).all()


def test_log_uniform_density_mass_and_moments():
    p = TruncatedLogUniform(_double(-4.0), _double(-1.0))
    assert quad(lambda t: math.exp(float(p.log_prob(_double(t)))), math.exp(-4), math.exp(-1))[0] == pytest.approx(1.0)
    mean = quad(lambda t: t * math.exp(float(p.log_prob(_double(t)))), math.exp(-4), math.exp(-1))[0]
    square = quad(lambda t: t * t * math.exp(float(p.log_prob(_double(t)))), math.exp(-4), math.exp(-1))[0]
    assert p.mean.item() == pytest.approx(mean)
    assert p.variance.item() == pytest.approx(square - mean**2)
    assert p.log_mass(-3.0, -2.0).item() == pytest.approx(math.log(1 / 3))
    assert p.entropy().item() == pytest.approx(math.log(3.0) - 2.5)
    torch.manual_seed(0)
    assert scipy.stats.kstest(p.cdf(p.sample((20_000,))).numpy(), "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize(
    ("low", "high"),
    [(-math.inf, -40.0), (35.0, math.inf), (-1e-9, 1e-9), (3.0, 3.0 + 1e-9), (8.0, 8.01), (-60.0, -59.0), (-2.0, 9.0)],
)
def test_log_mass_of_a_standard_normal_at_any_place_and_width(low, high):
    mp.mp.dps = 80
    bounds = [
        mp.mpf(low) if math.isfinite(low) else mp.mpf(-(10**9)),
        mp.mpf(high) if math.isfinite(high) else mp.mpf(10**9),
    ]
    got = float(log_mass_between(_double(low), _double(high)))
    assert got == pytest.approx(float(_log_mass(*bounds)), rel=1e-12)


def test_mills_ratio_and_its_moments():
    mp.mp.dps = 60
    x = torch.tensor([0.0, 0.5, 4.999, 5.001, 30.0, 1e3, 1e8], dtype=torch.float64).requires_grad_()
    first, second = mills_moments(x)
    log_ratio = log_mills(x)
    (slope,) = torch.autograd.grad(log_ratio.sum(), x)
    log_ratio, first, second = log_ratio.detach(), first.detach(), second.detach()
    for i, point in enumerate(x.tolist()):
        z = mp.mpf(point)
        mills = mp.sqrt(mp.pi / 2) * mp.exp(z * z / 2) * mp.erfc(z / mp.sqrt(2))
        mean = 1 / mills - z
        assert float(log_ratio[i]) == pytest.approx(float(mp.log(mills)), rel=1e-12)
        assert float(first[i]) == pytest.approx(float(mean), rel=1e-12)
        assert float(second[i]) == pytest.approx(float(1 - z * mean), rel=1e-11)
        assert float(slope[i]) == pytest.approx(float(-mean), rel=1e-12)


def test_truncated_moments_match_scipy():
    for low, high in [(-1.0, 2.0), (0.5, 3.0), (-4.0, -1.5), (2.0, 2.5)]:
        law = scipy.stats.truncnorm(low, high)
        moments = truncated_moments(_double(low), _double(high))
        peak = min(max(0.0, low), high)
        assert float(peak + moments.offset) == pytest.approx(law.mean(), rel=1e-9)
        assert float(moments.variance) == pytest.approx(law.var(), rel=1e-8)
        assert float(moments.energy) == pytest.approx(0.5 * (law.moment(2) - peak**2), rel=1e-8)
