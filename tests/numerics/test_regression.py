"""Regression models: evidence and posterior against densities computed another way."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation

from pyrobc.bmr import score
from pyrobc.errors import DataError
from pyrobc.models.regression import (
    ARDRegression,
    LinearRegression,
    LogisticRegression,
    PoissonRegression,
    fit_linear,
)


def make_data(seed: int, num_rows: int = 20, num_features: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, num_features))
    y = x @ rng.normal(size=num_features) + rng.normal(size=num_rows)
    return torch.tensor(x), torch.tensor(y)


def make_prior(seed: int, num_features: int = 4) -> dist.MultivariateNormal:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(num_features, num_features + 2))
    return dist.MultivariateNormal(torch.tensor(rng.normal(size=num_features)), torch.tensor(root @ root.T))


@given(st.integers(0, 10_000), st.floats(0.05, 20))
@settings(max_examples=25)
def test_known_noise_evidence_is_the_marginal_normal_density(seed: int, noise: float) -> None:
    x, y = make_data(seed)
    prior = make_prior(seed)
    fit = fit_linear(x, y, prior, noise)
    covariance = x @ prior.covariance_matrix @ x.T + noise**2 * torch.eye(len(y), dtype=x.dtype)
    expected = scipy.stats.multivariate_normal((x @ prior.loc).numpy(), covariance.numpy()).logpdf(y.numpy())
    assert fit.log_evidence.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.integers(0, 10_000), st.floats(0.5, 5), st.floats(0.1, 10))
@settings(max_examples=25)
def test_unknown_noise_evidence_is_the_marginal_student_density(seed: int, shape: float, rate: float) -> None:
    x, y = make_data(seed)
    prior = make_prior(seed)
    fit = fit_linear(x, y, prior, dist.Gamma(torch.tensor(shape), torch.tensor(rate)))
    a, b = float(torch.tensor(shape)), float(torch.tensor(rate))
    scale = b / a * (x @ prior.covariance_matrix @ x.T + torch.eye(len(y), dtype=x.dtype))
    expected = scipy.stats.multivariate_t((x @ prior.loc).numpy(), scale.numpy(), df=2 * a).logpdf(y.numpy())
    assert fit.log_evidence.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("noise", [0.7, dist.Gamma(*torch.tensor([2.0, 3.0], dtype=torch.float64))])
def test_posterior_is_joint_density_over_evidence(noise: float | dist.Gamma) -> None:
    """Bayes' rule at arbitrary points: ln p(y|b) + ln p(b) - ln p(y) = ln q(b), for both noise models."""
    x, y = make_data(3)
    model = LinearRegression(weight_scale=1.3, noise=noise)
    fit = model.fit_exactly(x, y)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        point = {"weights": torch.randn(4, generator=generator, dtype=x.dtype)}
        log_q = fit.weights.log_prob(point["weights"])
        if fit.noise is not None:
            precision = torch.rand((), generator=generator, dtype=x.dtype) + 0.1
            point["precision"] = precision
            law = dist.MultivariateNormal(fit.weights.loc, fit.weights.covariance_matrix / precision)
            log_q = law.log_prob(point["weights"]) + fit.noise.log_prob(precision)
        trace = poutine.trace(poutine.condition(model, data=point)).get_trace(x, y)
        assert (trace.log_prob_sum() - fit.log_evidence).item() == pytest.approx(log_q.item(), abs=1e-9)


def test_ill_conditioned_design_agrees_with_extended_precision() -> None:
    """Condition number 1e6 in x, 1e12 in its normal equations: 50-digit arithmetic as judge."""
    import mpmath

    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(12, 3)))
    right, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    x = left @ np.diag([1e3, 1.0, 1e-3]) @ right.T
    y = rng.normal(size=12)
    prior = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    fit = fit_linear(torch.tensor(x), torch.tensor(y), prior, 0.5)
    with mpmath.workdps(50):
        design, target = mpmath.matrix(x.tolist()), mpmath.matrix(y.tolist())
        precision = mpmath.eye(3) + design.T * design / mpmath.mpf("0.25")
        loc = mpmath.lu_solve(precision, design.T * target) / mpmath.mpf("0.25")
        marginal = design * design.T + mpmath.mpf("0.25") * mpmath.eye(12)
        quadratic = (target.T * mpmath.lu_solve(marginal, target))[0]
        evidence = -6 * mpmath.log(2 * mpmath.pi) - mpmath.log(mpmath.det(marginal)) / 2 - quadratic / 2
        errors = [abs(float(loc[i] - mpmath.mpf(fit.weights.loc[i].item()))) for i in range(3)]
        assert max(errors) < 1e-11
        assert abs(float(evidence - mpmath.mpf(fit.log_evidence.item()))) < 1e-10


def test_glm_log_joint_matches_scipy() -> None:
    x, _ = make_data(5)
    rng = np.random.default_rng(5)
    weights, intercept = rng.normal(size=4), 0.3
    point = {"weights": torch.tensor(weights), "intercept": torch.tensor(intercept, dtype=x.dtype)}
    predictor = x.numpy() @ weights + intercept
    log_prior = scipy.stats.norm(0, 1).logpdf(weights).sum() + scipy.stats.norm(0, 5).logpdf(intercept)
    for model, law in [
        (LogisticRegression(), scipy.stats.bernoulli(1 / (1 + np.exp(-predictor)))),
        (PoissonRegression(), scipy.stats.poisson(np.exp(predictor))),
    ]:
        y = law.rvs(random_state=1)
        conditioned = poutine.condition(model, data=point)
        log_joint = poutine.trace(conditioned).get_trace(x, torch.tensor(y, dtype=torch.float64)).log_prob_sum()
        assert log_joint.item() == pytest.approx(law.logpmf(y).sum() + log_prior, abs=1e-9)


def test_ard_marginal_prior_is_student() -> None:
    """Integrating a Gamma(a, b) precision out of N(0, 1/alpha) leaves a Student t with 2a degrees of freedom."""
    model = ARDRegression(shape=3.0, rate=2.0)
    x = torch.zeros(1, 4000, dtype=torch.float64)
    with pyro.poutine.block(), torch.random.fork_rng():
        pyro.set_rng_seed(1)
        weights = poutine.trace(model).get_trace(x).nodes["weights"]["value"]
    law = scipy.stats.t(df=6.0, scale=math.sqrt(2.0 / 3.0))
    assert scipy.stats.kstest(weights.numpy(), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("model", [LinearRegression(), LogisticRegression(), PoissonRegression(), ARDRegression()])
def test_models_predict_in_parallel(model: object) -> None:
    x, _ = make_data(0)
    draws = Predictive(model, num_samples=3, parallel=True)(x)  # type: ignore[arg-type]
    assert draws["y"].shape == (3, 20)


@pytest.mark.parametrize(
    ("x", "y", "noise", "match"),
    [
        (torch.ones(3), torch.ones(3), 1.0, r"regression data: got x of shape \(3,\)"),
        (torch.ones(3, 2), torch.ones(4), 1.0, r"y of shape \(4,\)"),
        (torch.full((3, 2), math.nan), torch.ones(3), 1.0, "NaN or inf"),
        (torch.ones(3, 2), torch.ones(3), 0.0, "noise: got 0.0"),
        (torch.ones(3, 4), torch.ones(3), 1.0, r"allowed: \(4,\)"),
    ],
)
def test_bad_data_is_refused(x: torch.Tensor, y: torch.Tensor, noise: float, match: str) -> None:
    prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    with pytest.raises(DataError, match=match):
        fit_linear(x, y, prior, noise)


@pytest.mark.parametrize("model", [LogisticRegression(), PoissonRegression()])
def test_laplace_price_of_a_glm_is_near_the_quadrature(model: LogisticRegression | PoissonRegression) -> None:
    """Deleting the one slope: ln p(y | slope 0) - ln p(y), integrated on a grid; Laplace is 3 sd out in its tail."""
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.normal(size=(60, 1)))
    rate = np.exp(0.2 + 0.3 * x[:, 0].numpy())
    is_count = isinstance(model, PoissonRegression)
    y = torch.tensor(rng.poisson(rate) if is_count else rng.random(60) < rate / (1 + rate), dtype=x.dtype)
    slope = np.linspace(-3, 3, 401)
    intercept = np.linspace(-4, 4, 401)
    predictor = intercept[:, None, None] + slope[None, :, None] * x[:, 0].numpy()
    log_likelihood = (y.numpy() * predictor - (np.exp(predictor) if is_count else np.logaddexp(0, predictor))).sum(-1)
    log_joint = log_likelihood + scipy.stats.norm(0, 5).logpdf(intercept)[:, None]
    full = scipy.special.logsumexp(log_joint + scipy.stats.norm.logpdf(slope)) + math.log(slope[1] - slope[0])
    truth = scipy.special.logsumexp(log_joint[:, 200]) - full

    guide = AutoLaplaceApproximation(model)
    guide(x, y)
    optimiser = torch.optim.LBFGS(guide.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    elbo = Trace_ELBO()

    def lose() -> torch.Tensor:
        optimiser.zero_grad()
        loss: torch.Tensor = elbo.differentiable_loss(model, guide, x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(lose)
    table = score(model, guide, reduced={"weights": dist.Delta(torch.tensor(0.0, dtype=x.dtype))}, args=(x, y))
    assert table.delta_f.item() == pytest.approx(truth, abs=0.3)
