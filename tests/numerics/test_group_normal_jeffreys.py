"""Normal-Jeffreys scales: their divergence, their proper prior, odds of a region, and the family around them."""

import math

import mpmath as mp
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from scipy.integrate import quad
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrobc.bmr import reduce
from pyrobc.dists import Restricted, ScaleFree, interval_log_mass
from pyrobc.dists.scale_free import (
    constant_divergence,
    jeffreys_divergence,
    log_alpha,
    sigmoid_divergence,
)
from pyrobc.errors import FamilyError
from pyrobc.family import make_family
from pyrobc.lift import LiftedModel, lift
from pyrobc.models.mlp import build
from pyrobc.objective import fast_loss
from pyrobc.posterior import Posterior
from pyrobc.scores import score

GRID = [x / 4 for x in range(-80, 81)]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def poisson_mean_of_digamma(value: float) -> mp.mpf:
    """(sum_j Pois(j; u) psi(j + 1/2) - psi(1/2)) / 2 at u = exp(-value) / 2, summed around its mode."""
    with mp.workdps(30):
        u = mp.exp(-mp.mpf(value)) / 2
        width = 14 * mp.sqrt(u) + 60
        first, last = max(0, int(u - width)), int(u + width)
        total, weight = mp.mpf(0), mp.exp(first * mp.log(u) - u - mp.loggamma(first + 1))
        digamma = mp.digamma(first + mp.mpf(1) / 2)
        for j in range(first, last + 1):
            total += weight * digamma
            digamma += 1 / (j + mp.mpf(1) / 2)
            weight *= u / (j + 1)
        return (total - mp.digamma(mp.mpf(1) / 2)) / 2


def by_hypergeometric(value: float) -> mp.mpf:
    """Twice the integral of Dawson's function to sqrt(u): u 2F2(1, 1; 3/2, 2; -u)."""
    with mp.workdps(40):
        u = mp.exp(-mp.mpf(value)) / 2
        return u * mp.hyp2f2(1, 1, mp.mpf(3) / 2, 2, -u)


@pytest.mark.parametrize(
    ("value", "exact", "published"),
    [(-3.0, 2.10797831, 2.11559), (0.0, 0.42668560, 0.43124), (3.0, 0.02468834, 0.02542)],
)
def test_golden_divergences(value: float, exact: float, published: float) -> None:
    assert float(jeffreys_divergence(double(value))) == pytest.approx(exact, abs=5e-9)
    assert float(sigmoid_divergence(double(value))) == pytest.approx(published, abs=5e-6)


def test_divergence_against_two_forms_in_thirty_digits() -> None:
    grid = [-12.0, -9.0, -6.0, -4.2, -4.15, -3.0, -1.0, 0.0, 2.0, 7.0, 20.0]  # the series change at -ln 64 = -4.159
    found = jeffreys_divergence(double(*grid))
    for value, g in zip(grid, found.tolist(), strict=True):
        assert g == pytest.approx(float(poisson_mean_of_digamma(value)), rel=2e-14)
    for value in (-20.0, -14.0, -5.0, 1.0, 12.0):
        assert float(jeffreys_divergence(double(value))) == pytest.approx(float(by_hypergeometric(value)), rel=2e-14)


def test_slope_is_that_of_dawsons_function_everywhere() -> None:
    x = double(*GRID).requires_grad_()
    jeffreys_divergence(x).sum().backward()
    root = (0.5 * torch.exp(-x.detach())).sqrt()
    dawson = torch.from_numpy(scipy.special.dawsn(root.numpy()))
    torch.testing.assert_close(x.grad, -root * dawson, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_is_finite_positive_and_falling_beyond_every_alpha(dtype: torch.dtype) -> None:
    x = torch.linspace(-100.0, 85.0, 741, dtype=dtype, requires_grad=True)
    for divergence in (jeffreys_divergence, sigmoid_divergence):
        value = divergence(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert value.dtype == slope.dtype == dtype
        assert bool(torch.isfinite(value).all() & torch.isfinite(slope).all())
        assert bool((value > 0).all() & (slope <= 0).all() & (slope >= -0.7).all())
        assert bool((value.diff() < 0).all())


def test_published_approximation_is_as_close_as_stated() -> None:
    x = torch.linspace(-20.0, 20.0, 8001, dtype=torch.float64)
    gap = (sigmoid_divergence(x) - jeffreys_divergence(x)).abs()
    assert float(gap.max()) == pytest.approx(0.0094, abs=1e-4)
    assert float(x[gap.argmax()]) == pytest.approx(-3.5, abs=0.1)


def test_a_scale_without_signal_has_a_number_and_a_gradient() -> None:
    loc, scale = double(0.0, 1e-300, 1.0).requires_grad_(), double(1.0, 1.0, 1e-9).requires_grad_()
    kl = kl_divergence(dist.Normal(loc, scale), ScaleFree(double(-20.0), double(20.0)))
    grads = torch.autograd.grad(kl.sum(), (loc, scale))
    assert bool(torch.isfinite(kl).all()) and all(bool(torch.isfinite(g).all()) for g in grads)
    constant = constant_divergence(ScaleFree(double(-20.0), double(20.0)))
    assert float(kl.detach()[0]) == pytest.approx(float(constant), abs=1e-12)


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 0.1), (0.5, 0.5), (0.003, 0.4), (2.0, 5.0), (0.0, 1e-3)])
def test_kl_to_the_proper_prior_is_the_integral(loc: float, scale: float) -> None:
    q, p = dist.Normal(*double(loc, scale)), ScaleFree(*double(-20.0, 20.0))

    def integrand(z: float) -> float:
        ratio = q.log_prob(double(z)) - p.log_prob(double(z))
        return float(q.log_prob(double(z)).exp() * ratio)

    reach, near = 12 * scale, min(1e-4, scale / 10)
    ends = [loc - reach, loc + reach]
    cuts = sorted({*ends, *(c for c in (-near, 0.0, near, loc) if ends[0] < c < ends[1])})
    total = sum(quad(integrand, a, b, epsabs=1e-10, limit=200)[0] for a, b in zip(cuts, cuts[1:], strict=False))
    assert float(kl_divergence(q, p)) == pytest.approx(total, abs=5e-6)  # 2 exp(-20) q(0) is 1.6e-6 in the last case


def test_what_the_flat_centre_adds_is_what_the_docstring_says() -> None:
    scale = math.exp(-14.0)  # the narrowest that the guide allows
    delta = math.exp(-20.0)
    density = scipy.stats.norm(0.0, scale).pdf
    omitted = 2 * quad(lambda z: density(z) * math.log(delta / z), 0, delta)[0]
    assert omitted == pytest.approx(2 * delta * density(0.0), rel=1e-4)
    assert omitted < 0.002


def test_the_prior_is_proper_and_its_functions_agree() -> None:
    p = ScaleFree(*double(-3.0, 2.0))
    ends = [0.0, math.exp(-3.0), math.exp(2.0), math.inf]
    masses = [quad(lambda z: float(p.log_prob(double(z)).exp()), a, b)[0] for a, b in zip(ends, ends[1:], strict=False)]
    assert masses == pytest.approx([1 / 14, 5 / 14, 1 / 14], rel=1e-8)
    for low, up in ((-0.01, 0.02), (0.03, 0.5), (-9.0, -0.2), (8.0, 50.0), (-60.0, -8.0), (-1.0, 30.0)):
        pieces = sorted({low, up, *(s * e for s in (-1, 1) for e in ends[:3] if low < s * e < up)})
        expected = sum(
            quad(lambda z: float(p.log_prob(double(z)).exp()), a, b)[0]
            for a, b in zip(pieces, pieces[1:], strict=False)
        )
        found = interval_log_mass(p, double(low), double(up))
        assert float(found.exp()) == pytest.approx(expected, rel=1e-7), (low, up)
    prob = double(1e-3, 0.05, 0.2, 0.49, 0.5, 0.51, 0.7, 0.95, 0.999)
    torch.testing.assert_close(p.cdf(p.icdf(prob)), prob, rtol=1e-12, atol=1e-12)
    assert (
        scipy.stats.kstest(p.sample(torch.Size([4000])).numpy(), lambda z: p.cdf(torch.from_numpy(z)).numpy()).pvalue
        > 1e-4
    )
    assert bool(torch.isnan(p.mean)) and bool(torch.isinf(p.variance))


def test_prior_draws_stay_finite_in_single_precision() -> None:
    p = ScaleFree(-20.0, 20.0)
    prob = torch.tensor([0.0, 2.0**-24, 1.0 - 2.0**-24, 1.0])
    assert bool(torch.isfinite(p.icdf(prob)).all())
    assert bool(torch.isfinite(p.log_prob(torch.tensor([0.0, 1e-38, 3e38, -3e38]))).all())
    with pytest.raises(ValueError, match="swap"):
        ScaleFree(1.0, 0.0, validate_args=True)


def test_tail_masses_keep_their_digits() -> None:
    p = ScaleFree(*double(-20.0, 2.0))
    for low in (1e6, 1e12):  # B / z of one part, on each side
        expected = math.log(math.exp(2.0) / low / 48.0)
        assert float(interval_log_mass(p, double(low), double(math.inf))) == pytest.approx(expected, rel=1e-12)
        assert float(interval_log_mass(p, double(-math.inf), double(-low))) == pytest.approx(expected, rel=1e-12)


def test_odds_of_the_region_do_not_depend_on_the_ends_of_the_prior_but_evidence_does() -> None:
    q, t = dist.Normal(*double(0.02, 0.03)), double(0.05)
    inside = scipy.stats.norm(0.02, 0.03)
    log_q = math.log(inside.cdf(0.05) - inside.cdf(-0.05))
    for half in (10.0, 20.0, 40.0):
        p = ScaleFree(*double(-half, half))
        found = float(reduce(q, p, Restricted(p, -t, t)).delta_f)
        log_p = math.log((math.log(0.05) + half + 1) / (2 * half + 2))
        assert found == pytest.approx(log_q - log_p, rel=1e-12)


def fitted_scales(model: LiftedModel, log_loc: list[float], log_scale: list[float]) -> Posterior:
    guide = model.new_guide()
    factor = guide.by_site()[f"{model.spec.blocks[1].name}.scale"]
    with torch.no_grad():
        factor.log_loc.copy_(double(*log_loc))
        factor.log_scale.copy_(double(*log_scale))
    return Posterior(model, guide, 10)


def test_log_odds_count_both_sides_of_zero() -> None:
    model = lift(build(3, (4,), 2).double(), "group_normal_jeffreys", "categorical", torch.zeros(1, 3).double())
    posterior = fitted_scales(model, [0.0, -9.0, -1.0, 0.5], [-3.0, -2.0, 1.0, 2.0])
    block = model.spec.blocks[1].name
    found = score(posterior, epsilon=0.3)
    for i, (log_loc, log_scale) in enumerate([(0.0, -3.0), (-9.0, -2.0), (-1.0, 1.0), (0.5, 2.0)]):
        q, t = scipy.stats.norm(math.exp(log_loc), math.exp(log_scale)), float(found.threshold[block][i])
        outside = q.sf(t) + q.cdf(-t)
        log_inside = float(mp.log(mp.ncdf((t - q.mean()) / q.std()) - mp.ncdf((-t - q.mean()) / q.std())))
        expected = log_inside - math.log(outside)
        assert float(found.log_odds()[block][i]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_log_alpha_is_the_published_score() -> None:
    model = lift(build(3, (4,), 2).double(), "group_normal_jeffreys", "categorical", torch.zeros(1, 3).double())
    posterior = fitted_scales(model, [0.0, -9.0, -1.0, 0.5], [-3.0, -2.0, 1.0, 2.0])
    found = model.family.log_alpha(posterior.laws(), model.spec)[model.spec.blocks[1].name]
    torch.testing.assert_close(found, double(-6.0, 14.0, 4.0, 3.0))
    assert float(log_alpha(dist.Normal(*double(-2.0, 0.5)))) == pytest.approx(math.log(0.0625))


def network(kind: str) -> tuple[nn.Module, Tensor]:
    if kind == "linear":
        return build(4, (6,), 3).double(), torch.randn(5, 4).double()
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double(), torch.randn(5, 2, 6, 6).double()


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_local_draws_have_the_moments_of_outputs_of_drawn_weights(kind: str) -> None:
    """A layer that reads each weight once, behind one that has no noise: output j is a sum of z_g s_jg and a bias."""
    if kind == "linear":
        net, x = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)).double(), torch.randn(1, 3).double()
    else:
        layers = [nn.Conv2d(1, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 3, 3), nn.Flatten()]
        net, x = nn.Sequential(*layers).double(), torch.randn(1, 1, 3, 3).double()
    model = lift(net, "group_normal_jeffreys", "normal", x, prune_inputs=False)
    guide, rows = model.new_guide(), 40_000
    with torch.no_grad():
        for key, parameter in guide.named_parameters():
            if not key.startswith(("factors.0/weight", "factors.0/bias")):
                parameter.add_(3.5 if key.endswith("log_scale") else 0.2)
            elif key.endswith("log_scale"):
                parameter.fill_(-14.0)
        h = net[1](net[0](x)).flatten(2).unsqueeze(1) if kind == "convolution" else net[1](net[0](x))[:, None, :, None]
        scale, weight, bias = (guide.distributions()[n].base_dist for n in ("0.scale", "2.weight", "2.bias"))
        columns = weight.loc.reshape(3, 4, -1), weight.scale.square().reshape(3, 4, -1)
        s_mean, s_variance = (columns[0] * h[0]).sum(-1), (columns[1] * h[0].square()).sum(-1)
        expected = (scale.loc * s_mean).sum(1) + bias.loc
        second = (scale.loc**2 + scale.scale**2) * (s_mean**2 + s_variance)
        variance = (second - (scale.loc * s_mean) ** 2).sum(1) + bias.scale**2
        laws = {n: law for n, law in guide.distributions().items() if n in model.family.prior(model.spec, x)}
        outputs = model.run(model.family.draw_local(laws, model.spec, rows), x.expand(rows, *x.shape[1:]))
    z = (outputs.mean(0) - expected) / (variance / rows).sqrt()
    assert bool((z.abs() < 4.5).all())
    torch.testing.assert_close(outputs.var(0), variance, rtol=0.06, atol=0)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("divergence", ["exact", "sigmoid"])
def test_it_trains_from_the_networks_weights_within_its_limits(kind: str, divergence: str) -> None:
    net, x = network(kind)
    family = make_family("group_normal_jeffreys", divergence=divergence, max_scale=0.05, scale_lr=3.0)
    model = lift(net, family, "categorical", x[:1])
    guide = model.new_guide()
    torch.testing.assert_close(Posterior(model, guide, 5).to_module()(x), net(x))
    y = torch.tensor([0, 1, 2, 0, 1])
    loss = fast_loss(model, guide, 5)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    start = float(loss(x, y, 1.0).detach())
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(x, y, 1.0)
        value.backward()
        optimizer.step()
        guide.project_()
    assert float(value.detach()) < start - 5
    first = model.spec.layers[0].weight
    scales = {n: f.log_scale.exp() for n, f in guide.by_site().items() if n in model.spec.parameters}
    assert float(scales[first].detach().max()) <= 0.05 + 1e-12
    assert max(float(s.detach().max()) for n, s in scales.items() if n != first) > 0.1


def test_chosen_divergence_is_the_one_in_the_loss() -> None:
    kls = {}
    for divergence in ("exact", "sigmoid"):
        family = make_family("group_normal_jeffreys", divergence=divergence)
        model = lift(build(3, (4,), 2).double(), family, "categorical", torch.zeros(1, 3).double())
        posterior = fitted_scales(model, [-0.5] * 4, [-2.25] * 4)
        kls[divergence] = model.family.kl(posterior.laws(), model.priors())[f"{model.spec.blocks[1].name}.scale"]
    gap = sigmoid_divergence(double(-3.5)) - jeffreys_divergence(double(-3.5))
    assert float((kls["sigmoid"] - kls["exact"]).detach()) == pytest.approx(4 * float(gap), abs=1e-12)


def test_locations_are_kept_between_the_ends() -> None:
    model = lift(build(3, (4,), 2).double(), "group_normal_jeffreys", "categorical", torch.zeros(1, 3).double())
    posterior = fitted_scales(model, [-90.0, 90.0, 0.0, 0.0], [0.0, 0.0, -90.0, 90.0])
    posterior.guide.project_()
    factor = posterior.guide.by_site()[f"{model.spec.blocks[1].name}.scale"]
    torch.testing.assert_close(factor.log_loc.detach(), double(-20.0, 19.0, 0.0, 0.0))
    torch.testing.assert_close(factor.log_scale.detach(), double(0.0, 0.0, -14.0, 17.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "sigmoud"}, "did you mean 'sigmoid'"),
        ({"low": -5.0}, r"low <= -10\.5"),
        ({"high": 0.0}, "high >= 3"),
        ({"max_scale": 0.0}, "positive number, or None"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        make_family("group_normal_jeffreys", **settings)
