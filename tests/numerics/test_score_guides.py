"""bmr.score on Pyro's guides, set to the exact posterior, against exact evidences."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn.module import PyroParam
from torch import Tensor

from pyrobc.bmr.deletions import Deletions
from pyrobc.bmr.score import score
from pyrobc.dists import Restricted
from pyrobc.models.regression import ARDRegression, LinearRegression, fit_linear

NOISE = 0.4
PRIOR_SCALES = torch.tensor([1.0, 1.0, 1.5, 1.5, 0.7, 2.0], dtype=torch.float64)  # of sites_model
ZERO = dist.Delta(torch.tensor(0.0, dtype=torch.float64))


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(8)
    x = rng.normal(size=(25, 6))
    x[:, 5] = x[:, 4] + 0.2 * x[:, 5]
    y = x @ np.array([1.0, 0.0, -0.7, 0.1, 0.5, 0.0]) + NOISE * rng.normal(size=25)
    return torch.tensor(x), torch.tensor(y)


def sites_model(x: Tensor, y: Tensor) -> None:
    """Six weights spread over a plate, a vector site, a matrix site and a scalar site."""
    with pyro.plate("units", 2):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
    b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.5).to_event(1))
    c = pyro.sample("c", dist.Normal(x.new_zeros(1, 1), 0.7).to_event(2))
    d = pyro.sample("d", dist.Normal(x.new_zeros(()), 2.0))
    weights = torch.cat([a, b, c.reshape(1), d.reshape(1)])
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ weights, NOISE), obs=y)


def set_gaussian(guide: AutoContinuous, args: tuple[Any, ...], law: dist.MultivariateNormal) -> None:
    """Give a full-rank automatic guide the mean and covariance of ``law``."""
    guide(*args)
    guide.loc = torch.nn.Parameter(law.loc.clone())
    if isinstance(guide, AutoMultivariateNormal):
        scale = law.scale_tril.diagonal()
        guide.scale = PyroParam(scale.clone(), constraints.positive)
        guide.scale_tril = PyroParam(law.scale_tril / scale[:, None], constraints.unit_lower_cholesky)


def evidence_under(x: Tensor, y: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log evidence with weights N(loc, scale^2); a scale of zero fixes the weight at loc, exactly."""
    kept = scale > 0
    shifted = y - x[:, ~kept] @ loc[~kept]
    return fit_linear(
        x[:, kept], shifted, dist.MultivariateNormal(loc[kept], torch.diag(scale[kept] ** 2)), NOISE
    ).log_evidence


def test_full_covariance_guide_prices_exactly(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    zeros = torch.zeros(6, dtype=x.dtype)
    full = evidence_under(x, y, zeros, PRIOR_SCALES)
    fit = fit_linear(x, y, dist.MultivariateNormal(zeros, torch.diag(PRIOR_SCALES**2)), NOISE)
    guide = AutoMultivariateNormal(sites_model)
    set_gaussian(guide, (x, y), fit.weights)

    table = score(sites_model, guide, reduced={n: ZERO for n in "abcd"}, args=(x, y))
    assert table.site == ["a", "a", "b", "c", "d"]
    assert table.index == [(0,), (1,), (), (), ()]
    groups = [[0], [1], [2, 3], [4], [5]]
    for group, delta_f in zip(groups, table.delta_f, strict=True):
        scale = PRIOR_SCALES.clone()
        scale[group] = 0
        assert delta_f.item() == pytest.approx((evidence_under(x, y, zeros, scale) - full).item(), abs=1e-9)

    narrow = dist.Normal(torch.tensor(0.2, dtype=x.dtype), 0.5)
    table = score(sites_model, guide, reduced={n: narrow for n in "abcd"}, args=(x, y))
    for group, delta_f in zip(groups, table.delta_f, strict=True):
        loc, scale = zeros.clone(), PRIOR_SCALES.clone()
        loc[group], scale[group] = 0.2, 0.5
        assert delta_f.item() == pytest.approx((evidence_under(x, y, loc, scale) - full).item(), abs=1e-9)

    point = dist.Delta(torch.tensor([0.1, -0.3], dtype=x.dtype))
    mixed = {"d": narrow, "a": point, "c": ZERO, "b": lambda prior: dist.Normal(prior.mean, 2.0).to_event(1)}
    table = score(sites_model, guide, reduced=mixed, args=(x, y), joint=True)
    loc = torch.tensor([0.1, -0.3, 0.0, 0.0, 0.0, 0.2], dtype=x.dtype)
    scale = torch.tensor([0.0, 0.0, 2.0, 2.0, 0.0, 0.5], dtype=x.dtype)
    assert len(table) == 1 and table.site == ["d + a + c + b"]
    assert table.delta_f.item() == pytest.approx((evidence_under(x, y, loc, scale) - full).item(), abs=1e-9)
    only = score(sites_model, guide, reduced={"a": point, "c": ZERO}, args=(x, y), joint=True)
    scale = PRIOR_SCALES.clone()
    scale[[0, 1, 4]] = 0
    loc[5] = 0
    assert only.delta_f.item() == pytest.approx((evidence_under(x, y, loc, scale) - full).item(), abs=1e-9)
    wide = score(sites_model, guide, reduced={"b": narrow, "d": narrow}, args=(x, y), joint=True)
    loc, scale = zeros.clone(), PRIOR_SCALES.clone()
    loc[[2, 3, 5]], scale[[2, 3, 5]] = 0.2, 0.5
    assert wide.delta_f.item() == pytest.approx((evidence_under(x, y, loc, scale) - full).item(), abs=1e-9)


def test_laplace_is_exact_for_a_linear_model(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    model = LinearRegression(noise=NOISE)
    fit = model.fit_exactly(x, y)
    guide = AutoLaplaceApproximation(model)
    set_gaussian(guide, (x, y), fit.weights)
    table = score(model, guide, reduced={"weights": ZERO}, args=(x, y))
    expected = Deletions(fit.weights, model.prior(6)).score(torch.eye(6, dtype=torch.bool))
    assert torch.allclose(table.delta_f, expected, atol=1e-6)


@pytest.mark.parametrize(
    "make", [AutoNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal]
)
def test_guides_are_read_with_their_own_covariance(
    make: Callable[..., AutoContinuous], data: tuple[Tensor, Tensor]
) -> None:
    """Elementwise deletion is the density ratio of the marginals; joint deletion that of the joint law."""
    x, y = data
    guide = make(sites_model, init_scale=0.3)
    guide(x, y)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in guide.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    if isinstance(guide, AutoNormal):
        quantiles = guide.quantiles([0.5, scipy.stats.norm.cdf(1)])
        flat = [torch.cat([quantiles[n][i].reshape(-1) for n in "abcd"]).double() for i in (0, 1)]
        q = dist.MultivariateNormal(flat[0], torch.diag((flat[1] - flat[0]) ** 2))
    else:
        law = guide.get_posterior(x, y)
        mean, covariance = law.mean.detach().double(), torch.diag(law.variance.detach().double())
        if not isinstance(guide, AutoDiagonalNormal):
            covariance = law.covariance_matrix.detach().double()
        q = dist.MultivariateNormal(mean, covariance)
    deletions = Deletions(q, dist.Normal(torch.zeros(6), PRIOR_SCALES), groups=[[0], [1], [2, 3], [4], [5]])
    singles = score(sites_model, guide, reduced={n: ZERO for n in "abcd"}, args=(x, y))
    assert torch.allclose(singles.delta_f, deletions.score(torch.eye(5, dtype=torch.bool)), rtol=1e-4)
    everything = score(sites_model, guide, reduced={n: ZERO for n in "abcd"}, args=(x, y), joint=True)
    expected = deletions.score(torch.ones(1, 5, dtype=torch.bool))
    assert torch.allclose(everything.delta_f, expected, rtol=1e-4)


def test_guide_list_scores_each_part(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    guide = AutoGuideList(sites_model)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(sites_model, expose=["a", "b"]), init_scale=0.3))
    guide.append(AutoNormal(pyro.poutine.block(sites_model, expose=["c", "d"]), init_scale=0.2))
    guide(x, y)
    table = score(sites_model, guide, reduced={n: ZERO for n in "abcd"}, args=(x, y))
    medians = guide.median(x, y)
    for name, scale, prior_scale in [("a", 0.3, 1.0), ("d", 0.2, 2.0)]:
        rows = [i for i, site in enumerate(table.site) if site == name]
        loc = medians[name].detach().double()
        expected = dist.Normal(loc, scale).log_prob(0 * loc) - dist.Normal(0 * loc, prior_scale).log_prob(0 * loc)
        assert torch.allclose(table.delta_f[rows], expected.reshape(-1), rtol=1e-4)
    joint = score(sites_model, guide, reduced={n: ZERO for n in "abcd"}, args=(x, y), joint=True)
    assert joint.delta_f.item() == pytest.approx(table.delta_f.sum().item(), rel=1e-6)  # diagonal at the start


def test_positive_site_is_scored_in_its_own_space() -> None:
    """AutoNormal on a positive site is a log-normal: closed form against a log-normal, quadrature otherwise."""

    def model(prior: dist.Distribution) -> None:
        pyro.sample("s", prior)

    guide = AutoNormal(model, init_scale=0.5)
    prior = dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    guide(prior)
    guide.locs.s = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    narrow = score(model, guide, reduced={"s": dist.LogNormal(0.5, 0.8)}, args=(prior,))
    assert narrow.khat.isnan().all()
    law = scipy.stats.lognorm(0.5, scale=math.exp(0.7))
    for table, before, after in [
        (narrow, scipy.stats.lognorm(1.0), scipy.stats.lognorm(0.8, scale=math.exp(0.5))),
        (
            score(model, guide, reduced={"s": dist.HalfNormal(1.5)}, args=(dist.HalfCauchy(1.0),), num_draws=4000),
            scipy.stats.halfcauchy(),
            scipy.stats.halfnorm(scale=1.5),
        ),
    ]:
        ratio, _ = scipy.integrate.quad(
            lambda s, before=before, after=after: law.pdf(s) * after.pdf(s) / before.pdf(s), 0, 60, limit=200
        )
        tolerance = 1e-7 if table is narrow else 4 * table.mcse.item()
        assert table.delta_f.item() == pytest.approx(math.log(ratio), abs=tolerance)
    assert 0 < table.mcse.item() < 0.1 and table.khat.isfinite().all()


def hierarchical_model() -> None:
    precision = pyro.sample("precision", dist.Gamma(3.0, 2.0))
    with pyro.plate("units", 2):
        pyro.sample("w", dist.Normal(0.0, precision.rsqrt()))


def mean_field_guide() -> None:
    pyro.sample("precision", dist.Gamma(5.0, 4.0))
    with pyro.plate("units", 2):
        pyro.sample("w", dist.Normal(torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.3])))


def dependent_guide() -> None:
    precision = pyro.sample("precision", dist.Gamma(5.0, 4.0))
    with pyro.plate("units", 2):
        pyro.sample("w", dist.Normal(torch.tensor([0.1, 0.5]), 0.3 * precision.rsqrt()))


@pytest.mark.parametrize(
    ("guide", "scale"),
    [(mean_field_guide, lambda t: np.array([0.2, 0.3])), (dependent_guide, lambda t: 0.3 / np.sqrt([t, t]))],
)
def test_conditional_prior_is_averaged_over_its_parents(guide: Callable[[], None], scale: Any) -> None:
    """E_q[N(w; 0, h/tau) / N(w; 0, 1/tau)] by nested quadrature, halving the prior variance given its precision."""
    table = score(
        hierarchical_model, guide, reduced={"w": lambda prior: dist.Normal(0.0, prior.scale * 0.5**0.5)}, num_draws=3000
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for i, loc in enumerate([0.1, 0.5]):

        def inner(t: float, i: int = i, loc: float = loc) -> float:
            w = loc + scale(t)[i] * nodes
            ratio = scipy.stats.norm(0, math.sqrt(0.5 / t)).pdf(w) / scipy.stats.norm(0, math.sqrt(1 / t)).pdf(w)
            return float(weights @ ratio / weights.sum()) * scipy.stats.gamma(5.0, scale=0.25).pdf(t)

        truth = math.log(scipy.integrate.quad(inner, 0, 12)[0])
        assert table.delta_f[i].item() == pytest.approx(truth, abs=4 * table.mcse[i].item())
        assert table.mcse[i] < 0.02
    deletion = score(hierarchical_model, guide, reduced={"w": dist.Delta(torch.tensor(0.0))}, num_draws=10)
    assert deletion.delta_f.isnan().all() and "Restricted" in deletion.reason[0]


def test_rope_of_a_conditional_prior(data: tuple[Tensor, Tensor]) -> None:
    """The interval rule sees the prior of every draw, on a model whose prior is a scale mixture."""
    x, y = data
    model = ARDRegression(noise=NOISE)
    guide = AutoNormal(model, init_scale=0.1)
    guide(x, y)
    table = score(
        model, guide, reduced={"weights": lambda prior: Restricted(prior, -0.2, 0.2)}, args=(x, y), num_draws=400
    )
    scale = guide.scales.weights.detach().double()
    loc = guide.locs.weights.detach().double()
    mass = dist.Normal(loc, scale).cdf(torch.tensor(0.2)) - dist.Normal(loc, scale).cdf(torch.tensor(-0.2))
    relevance = dist.LogNormal(guide.locs.relevance.detach().double(), guide.scales.relevance.detach().double())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = dist.Normal(torch.zeros(6, dtype=torch.float64), relevance.sample((20_000,)).rsqrt())
    inverse = (1 / (prior.cdf(torch.tensor(0.2)) - prior.cdf(torch.tensor(-0.2)))).mean(0)
    is_defined = table.delta_f.isfinite()
    assert is_defined.sum() >= 4
    error = (table.delta_f - (mass * inverse).log()).abs()
    assert (error[is_defined] < 4 * table.mcse[is_defined] + 0.01).all()


def test_exact_guides_of_conjugate_models() -> None:
    counts = torch.tensor([3.0, 1.0, 4.0, 2.0])

    def poisson_model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Poisson(rate), obs=counts)

    def poisson_guide() -> None:
        pyro.sample("rate", dist.Gamma(12.0, 5.0))

    table = score(poisson_model, poisson_guide, reduced={"rate": dist.Gamma(4.0, 3.0)})
    assert table.delta_f.item() == pytest.approx(-0.27694144, abs=1e-8)

    def coin_model() -> None:
        with pyro.plate("coins", 3):
            pyro.sample("z", dist.Bernoulli(0.3))

    def coin_guide() -> None:
        with pyro.plate("coins", 3):
            pyro.sample("z", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.9])))

    table = score(coin_model, coin_guide, reduced={"z": dist.Bernoulli(0.6)})
    q = np.array([0.1, 0.5, 0.9])
    assert table.delta_f.numpy() == pytest.approx(np.log(q * 0.6 / 0.3 + (1 - q) * 0.4 / 0.7), abs=1e-6)
