"""The group horseshoe: its multipliers by quadrature, its slab, its limits, on linear and convolution layers."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from pyrobc.bmr import reduce
from pyrobc.dists import HalfCauchyProduct, Restricted, SoftCapped, interval_log_mass
from pyrobc.dists.soft_capped import soft_cap
from pyrobc.errors import FamilyError
from pyrobc.family import make_family
from pyrobc.lift import LiftedModel, lift
from pyrobc.models.mlp import build
from pyrobc.objective import fast_loss
from pyrobc.posterior import Posterior
from pyrobc.scores import score

SIGNIFICANCE = 1e-4


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_normal(loc: float, scale: float) -> dist.LogNormal:
    return dist.LogNormal(*double(loc, scale))


def hidden_network(kind: str) -> tuple[nn.Module, Tensor]:
    """One hidden block of four groups, called ``0``."""
    if kind == "linear":
        return build(4, (4,), 3).double(), torch.randn(6, 4).double()
    layers = [nn.Conv2d(1, 4, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.Flatten()]
    return nn.Sequential(*layers).double(), torch.randn(6, 1, 5, 5).double()


def widened(model: LiftedModel, by: float = 3.0) -> Posterior:
    guide = model.new_guide()
    with torch.no_grad():
        for key, parameter in guide.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) + (by if key.endswith("log_scale") else 0.0))
    return Posterior(model, guide, 10)


def test_soft_cap_is_the_harmonic_sum_of_squares() -> None:
    z = torch.logspace(-150, 150, 61, dtype=torch.float64)
    t = soft_cap(z, 2.0)
    middle = (z > 1e-3) & (z < 1e3)
    torch.testing.assert_close(t[middle] ** -2, z[middle] ** -2 + 0.25, rtol=1e-12, atol=0)
    torch.testing.assert_close(t[z < 1e-9], z[z < 1e-9], rtol=1e-14, atol=0)
    assert float(t.max()) == 2.0 and bool((t.diff() >= 0).all())
    assert float(soft_cap(double(0.0), 2.0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_cap_has_finite_gradients_for_every_scale_that_training_meets(dtype: torch.dtype) -> None:
    log_z = torch.linspace(-18.0, 18.0, 37, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(soft_cap(log_z.exp(), 0.5).sum(), log_z)
    assert bool(torch.isfinite(grad).all()) and bool((grad >= 0).all())
    torch.testing.assert_close(grad[0], log_z.detach()[0].exp(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("cap", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("base", [log_normal(-0.5, 0.7), log_normal(-4.0, 2.0), HalfCauchyProduct(double(0.4))])
def test_capped_law_agrees_with_itself_by_quadrature(base: torch.distributions.Distribution, cap: float) -> None:
    law = SoftCapped(base, cap)

    def density_of_log(x: float) -> float:
        return math.exp(float(law.log_prob(double(math.exp(x)))) + x)

    for low, up in ((0.1 * cap, 0.5 * cap), (1e-4 * cap, 0.1 * cap), (0.5 * cap, 0.99 * cap)):
        mass = quad(density_of_log, math.log(low), math.log(up), epsabs=1e-12, limit=200)[0]
        assert float(interval_log_mass(law, double(low), double(up)).exp()) == pytest.approx(mass, rel=1e-7, abs=1e-10)
    draws = law.sample(torch.Size([3000]))
    assert scipy.stats.kstest(law.cdf(draws).numpy().ravel(), "uniform").pvalue > SIGNIFICANCE
    assert law.cdf(double(0.0, cap, 2 * cap)).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("cap", [0.3, 1.0, 50.0])
@pytest.mark.parametrize(("loc", "scale"), [(0.0, 0.01), (-0.5, 0.7), (1.0, 2.0), (-6.0, 3.0), (9.0, 1.0)])
def test_mean_of_a_capped_log_normal(loc: float, scale: float, cap: float) -> None:
    def integrand(e: float) -> float:
        z = math.exp(loc + scale * e)
        return scipy.stats.norm.pdf(e) * cap * z / math.hypot(cap, z)

    expected = quad(integrand, -12, 12, epsabs=1e-14, epsrel=1e-12, limit=400, points=[0.0])[0]
    assert float(SoftCapped(log_normal(loc, scale), cap).mean) == pytest.approx(expected, rel=1e-8)


def test_only_a_log_normal_has_a_capped_mean() -> None:
    with pytest.raises(NotImplementedError, match="HalfCauchyProduct"):
        _ = SoftCapped(HalfCauchyProduct(double(1.0)), 1.0).mean


def test_tail_masses_of_the_capped_law_keep_their_digits() -> None:
    law = SoftCapped(log_normal(2.0, 0.01), 3.0)  # 270 standard deviations above the threshold
    threshold = 0.5
    z = threshold / math.sqrt(1 - (threshold / 3.0) ** 2)
    expected = scipy.stats.norm.logcdf((math.log(z) - 2.0) / 0.01)
    assert expected < -30_000
    assert float(interval_log_mass(law, double(0.0), double(threshold))) == pytest.approx(expected, rel=1e-12)


def test_a_slab_moves_the_threshold_and_nothing_else() -> None:
    q, p, cap = log_normal(-1.0, 0.8), HalfCauchyProduct(double(0.5)), 0.7
    capped_q, capped_p = SoftCapped(q, cap), SoftCapped(p, cap)
    for t in (0.05, 0.4, 0.69):
        z = t / math.sqrt(1 - (t / cap) ** 2)
        plain = reduce(q, p, Restricted(p, double(0.0), double(z))).delta_f
        capped = reduce(capped_q, capped_p, Restricted(capped_p, double(0.0), double(t))).delta_f
        torch.testing.assert_close(capped, plain, rtol=1e-10, atol=1e-12)
    beyond = reduce(capped_q, capped_p, Restricted(capped_p, double(0.0), double(0.9))).delta_f
    assert float(beyond) == pytest.approx(0.0, abs=1e-9)  # no multiplier lies there


@pytest.mark.parametrize("slab", [None, 0.6])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_drawn_weights_have_the_published_moments(kind: str, slab: float | None) -> None:
    net, x = hidden_network(kind)
    model = lift(net, make_family("group_horseshoe", slab=slab), "categorical", x[:1], prune_inputs=False)
    posterior = widened(model)
    last = model.spec.layers[-1].weight
    with torch.no_grad():
        laws = posterior.laws()
        block = model.spec.blocks[0].name
        sites = [laws[f"{block}.{s}"] for s in ("global_a", "global_b", "local_a", "local_b")]
        sites[2:] = [s.base_dist for s in sites[2:]]
        m = sum(0.5 * s.loc for s in sites)
        v = sum(0.25 * s.scale**2 for s in sites)
        weight = laws[last].base_dist
        shape = (1, -1, *(1,) * (weight.loc.dim() - 2))
        if slab is None:  # mean and variance of a log-normal multiplier times a Normal weight, in closed form
            first, second = torch.exp(m + v / 2), torch.exp(2 * m + 2 * v)
        else:
            z = soft_cap(
                torch.exp(
                    m + v.sqrt() * torch.tensor(scipy.stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000))[:, None]
                ),
                slab,
            )
            first, second = z.mean(0), z.square().mean(0)
        mean = first.reshape(shape) * weight.loc
        variance = second.reshape(shape) * (weight.loc**2 + weight.scale**2) - mean**2
        deployed = dict(posterior.to_module().named_parameters())[last]
        torch.testing.assert_close(deployed.data, mean, rtol=1e-4, atol=1e-7)
        draws = []
        for _ in range(3000):
            drawn = model.family.combine({n: q.sample() for n, q in laws.items()}, model.spec)
            draws.append(drawn.gates[block].reshape(shape) * drawn.parameters[last])
        z_score = (torch.stack(draws).mean(0) - mean) / (variance / len(draws)).sqrt()
    assert float(z_score.abs().max()) < 4.5
    assert float((torch.stack(draws).var(0) / variance).mean()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("slab", [None, 0.6])
def test_local_draws_of_multipliers_follow_the_declared_law(slab: float | None) -> None:
    net, x = hidden_network("linear")
    model = lift(net, make_family("group_horseshoe", slab=slab), "categorical", x[:1])
    posterior = widened(model)
    laws = {n: q for n, q in posterior.laws().items()}
    with torch.no_grad():
        local = [model.family.draw_local(laws, model.spec, 2).gates for _ in range(1000)]
        prior = [model.family.combine(model.family.sample_prior(model.priors()), model.spec).gates for _ in range(1000)]
    for block, scale in posterior.scales().items():
        for gates, law in ((local, scale.posterior), (prior, scale.prior)):
            stacked = torch.stack([g[block][0] if g[block].dim() == 2 else g[block] for g in gates])
            uniform = law.cdf(stacked).numpy()[:, 1]
            assert scipy.stats.kstest(uniform, "uniform").pvalue > SIGNIFICANCE
            assert slab is None or float(stacked.max()) <= slab


def test_scores_with_a_slab_are_finite_and_ordered() -> None:
    net, x = hidden_network("linear")
    model = lift(net, make_family("group_horseshoe", slab=2.0), "categorical", x[:1])
    guide = model.new_guide()
    block = model.spec.blocks[1].name
    with torch.no_grad():
        guide.by_site()[f"{block}.local_a"].loc.copy_(double(-16.0, -6.0, 0.0, 6.0))
    odds = score(Posterior(model, guide, 10), epsilon=0.1).log_odds()[block]
    assert np.isfinite(odds).all() and (np.diff(odds) < 0).all()
    assert odds[0] > 0 > odds[3]


@pytest.mark.parametrize("slab", [None, 0.8])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_it_trains_from_the_networks_weights_within_its_limits(kind: str, slab: float | None) -> None:
    net, x = hidden_network(kind)
    family = make_family("group_horseshoe", max_scale=0.05, slab=slab, global_scale=0.1)
    model = lift(net, family, "categorical", x[:1])
    guide = model.new_guide()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = fast_loss(model, guide, 6)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(x, y, 1.0)
        value.backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in guide.parameters() if p.grad is not None)
        optimizer.step()
        guide.project_()
        values.append(float(value.detach()))
    assert np.mean(values[-5:]) < values[0] - 5
    first = model.spec.layers[0].weight
    scales = {n: f.log_scale.exp() for n, f in guide.by_site().items() if n in model.spec.parameters}
    assert float(scales[first].detach().max()) <= 0.05 + 1e-12
    assert max(float(s.detach().max()) for n, s in scales.items() if n != first) > 0.1


@pytest.mark.parametrize("settings", [{"slab": 0.0}, {"max_scale": -1.0}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FamilyError, match="positive numbers, or None"):
        make_family("group_horseshoe", **settings)
