"""Closed forms against exact evidences: whatever the data add to the prior, the change of prior is known to 1e-10."""

import math

import mpmath as mp
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Wishart

from pyrobc.bmr import delete, reduce
from pyrobc.bmr.matrix_normal import _as_vector
from pyrobc.dists import MatrixNormal
from pyrobc.errors import ReductionError

# absolute, in nats, up to the size of the evidence difference
TOLERANCE = 1e-10
cases = settings(max_examples=25, derandomize=True)
seeds = st.integers(0, 10_000)


def _double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _assert_close(got: Tensor, expected: object, scale: float = 1.0) -> None:
    torch.testing.assert_close(
        got.detach(), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=TOLERANCE * scale
    )


class Regression:
    """y = X b + N(0, 1) with b ~ N(mean, L L^T), in 60-digit arithmetic; ``condition`` is that of X^T X."""

    def __init__(self, seed: int, size: int, condition: float) -> None:
        mp.mp.dps = 60
        self.generator = torch.Generator().manual_seed(seed)
        self.size = size
        basis = torch.linalg.qr(self._randn(20, size))[0]
        turn = torch.linalg.qr(self._randn(size, size))[0]
        self.design = basis @ torch.diag(4.0 * condition ** torch.linspace(0, -0.5, size, dtype=torch.float64)) @ turn
        self.response = self.design @ self._randn(size) + self._randn(20)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def draw_prior(self) -> tuple[Tensor, Tensor]:
        factor = self._randn(self.size, self.size).tril(-1) * 0.3
        return 0.5 * self._randn(self.size), factor + torch.diag(torch.exp(0.5 * self._randn(self.size)))

    def fit(self, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, mp.mpf]:
        """Posterior mean, Cholesky factor of its covariance, and log evidence without the terms in y alone."""
        root = mp.matrix(factor.tolist())
        prior = (root * root.T) ** -1
        m0, x, y = (mp.matrix(t.tolist()) for t in (mean, self.design, self.response))
        precision = x.T * x + prior
        covariance = precision**-1
        m = covariance * (x.T * y + prior * m0)
        evidence = (
            mp.log(mp.det(prior)) - mp.log(mp.det(precision)) - (m0.T * prior * m0)[0] + (m.T * precision * m)[0]
        ) / 2
        chol = mp.cholesky(covariance)
        rows = [[float(chol[i, j]) for j in range(self.size)] for i in range(self.size)]
        return _double([float(v) for v in m]), _double(rows), evidence


def _normal(mean: Tensor, factor: Tensor) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(mean, scale_tril=factor)


@cases
@given(seed=seeds, size=st.integers(1, 5), exponent=st.floats(0, 6))
def test_linear_regression_any_reduced_prior(seed, size, exponent):
    problem = Regression(seed, size, 10.0**exponent)
    prior, reduced = problem.draw_prior(), problem.draw_prior()
    mean, factor, evidence = problem.fit(*prior)
    refit_mean, refit_factor, reduced_evidence = problem.fit(*reduced)
    result = reduce(_normal(mean, factor), _normal(*prior), _normal(*reduced))
    _assert_close(result.delta_f, float(reduced_evidence - evidence))
    torch.testing.assert_close(result.posterior.mean, refit_mean, rtol=1e-9, atol=1e-10)
    refit = refit_factor @ refit_factor.T
    torch.testing.assert_close(
        result.posterior.covariance_matrix, refit, rtol=1e-9, atol=1e-10 * float(refit.abs().max())
    )


@cases
@given(seed=seeds, size=st.integers(2, 5), exponent=st.floats(0, 6), data=st.data())
def test_linear_regression_deletion_is_a_refit_without_the_columns(seed, size, exponent, data):
    gone = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size)))
    kept = [i for i in range(size) if i not in gone]
    problem = Regression(seed, size, 10.0**exponent)
    mean0, factor0 = (
        torch.zeros(size, dtype=torch.float64),
        torch.diag(torch.linspace(0.5, 2.0, size, dtype=torch.float64)),
    )
    mean, factor, evidence = problem.fit(mean0, factor0)
    result = delete(_normal(mean, factor), _normal(mean0, factor0), gone)
    if not kept:
        _assert_close(result.delta_f, float(-evidence))
        assert result.posterior is None
        return
    smaller = Regression(seed, size, 10.0**exponent)
    smaller.design, smaller.size = smaller.design[:, kept], len(kept)
    refit_mean, refit_factor, reduced_evidence = smaller.fit(mean0[kept], factor0[kept][:, kept])
    _assert_close(result.delta_f, float(reduced_evidence - evidence))
    torch.testing.assert_close(result.posterior.mean, refit_mean, rtol=1e-8, atol=1e-9)
    refit = refit_factor @ refit_factor.T
    torch.testing.assert_close(
        result.posterior.covariance_matrix, refit, rtol=1e-8, atol=1e-9 * float(refit.abs().max())
    )


def test_deletion_with_a_coupled_prior_and_a_value():
    # Savage-Dickey by brute force: the two marginal densities at the value
    covariance0 = _double([[1.0, 0.4, 0.1], [0.4, 2.0, -0.3], [0.1, -0.3, 0.7]])
    covariance = _double([[0.2, 0.05, 0.0], [0.05, 0.3, -0.1], [0.0, -0.1, 0.15]])
    mean0, mean = _double([0.1, -0.2, 0.3]), _double([0.5, 0.6, -0.7])
    q, p = dist.MultivariateNormal(mean, covariance), dist.MultivariateNormal(mean0, covariance0)
    index, value = [0, 2], _double([0.2, -0.1])
    marginals = [
        dist.MultivariateNormal(m[index], c[index][:, index]) for m, c in ((mean, covariance), (mean0, covariance0))
    ]
    result = delete(q, p, index, value)
    _assert_close(result.delta_f, marginals[0].log_prob(value) - marginals[1].log_prob(value))
    whole = torch.tensor([0.2, 0.9, -0.1], dtype=torch.float64)
    _assert_close(result.posterior.log_prob(whole[1:2]), q.log_prob(whole) - marginals[0].log_prob(value))
    torch.testing.assert_close(delete(q, p, torch.tensor([True, False, True]), value).delta_f, result.delta_f)
    for wrong in ([3], [-1], torch.tensor([True, False]), torch.tensor([[0]])):
        with pytest.raises(ReductionError, match="positions from 0 to 2"):
            delete(q, p, wrong)


def test_low_rank_diagonal_and_full_forms_agree_and_batches_are_independent():
    torch.manual_seed(2)
    loc, diagonal = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64) + 0.1
    vector = torch.randn(4, 3, 1, dtype=torch.float64)
    low_rank = dist.LowRankMultivariateNormal(loc, vector, diagonal)
    full = dist.MultivariateNormal(loc, low_rank.covariance_matrix)
    prior = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    reduced = dist.Normal(0.3 * torch.ones(3), 0.5).to_event(1)
    expected = reduce(full, dist.MultivariateNormal(torch.zeros(3), 4 * torch.eye(3)), reduced)
    result = reduce(low_rank, prior, reduced)
    assert result.delta_f.shape == (4,)
    _assert_close(result.delta_f, expected.delta_f)
    for i in range(4):
        one = reduce(dist.MultivariateNormal(loc[i], full.covariance_matrix[i]), prior, reduced)
        _assert_close(one.delta_f, result.delta_f[i])
    diag = dist.Normal(loc, diagonal).to_event(1)
    as_full = dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(diagonal))
    _assert_close(reduce(diag, prior, reduced).delta_f, reduce(as_full, prior, reduced).delta_f)


def test_matrix_normal_equals_its_vector_whichever_side_changes():
    torch.manual_seed(0)

    def factor(size: int, scale: float) -> Tensor:
        a = torch.randn(size, size, dtype=torch.float64)
        return torch.linalg.cholesky(scale * (a @ a.T / size + 0.3 * torch.eye(size)))

    def loc() -> Tensor:
        return torch.randn(3, 4, dtype=torch.float64)

    rows, columns = factor(3, 1.0), factor(4, 1.0)
    q, p = MatrixNormal(loc(), factor(3, 0.1), factor(4, 0.3)), MatrixNormal(loc(), rows, columns)
    for reduced in (
        MatrixNormal(loc(), factor(3, 1.0), columns),
        MatrixNormal(loc(), rows, factor(4, 1.0)),
        MatrixNormal(loc(), factor(3, 1.0), factor(4, 1.0)),
    ):
        result, twin = reduce(q, p, reduced), reduce(_as_vector(q), _as_vector(p), _as_vector(reduced))
        _assert_close(result.delta_f, twin.delta_f)
        _assert_close(result.posterior.mean, twin.posterior.mean)
        _assert_close(result.posterior.covariance_matrix, twin.posterior.covariance_matrix)
    wider = MatrixNormal(p.loc, 9.0 * rows, columns)
    assert torch.isnan(reduce(p.expand(()), MatrixNormal(p.loc, 0.5 * rows, columns), wider).delta_f)
    large = MatrixNormal(torch.zeros(50, 40), torch.eye(50), torch.eye(40))
    both = MatrixNormal(torch.zeros(50, 40), 0.5 * torch.eye(50), 0.5 * torch.eye(40))
    with pytest.raises(ReductionError, match="rows and columns"):
        reduce(large, large, both)
    rows_only = reduce(large, large, MatrixNormal(torch.zeros(50, 40), 0.5 * torch.eye(50), torch.eye(40)))
    assert rows_only.posterior is None and float(rows_only.delta_f) == pytest.approx(0.0, abs=1e-9)


positive = st.floats(0.1, 20.0)


@cases
@given(st.tuples(positive, positive, positive, positive), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_gamma_poisson(parameters, counts):
    a, b, c, d = parameters
    total, n = sum(counts), len(counts)

    def evidence(shape: float, rate: float) -> mp.mpf:
        mp.mp.dps = 40
        shape, rate = mp.mpf(shape), mp.mpf(rate)
        return (
            shape * mp.log(rate) - mp.loggamma(shape) + mp.loggamma(shape + total) - (shape + total) * mp.log(rate + n)
        )

    prior, reduced = dist.Gamma(_double(a), _double(b)), dist.Gamma(_double(c), _double(d))
    result = reduce(dist.Gamma(_double(a) + total, _double(b) + n), prior, reduced)
    _assert_close(result.delta_f, float(evidence(c, d) - evidence(a, b)), scale=10.0)
    _assert_close(result.posterior.concentration, c + total)
    _assert_close(result.posterior.rate, d + n)


@cases
@given(
    st.lists(st.tuples(positive, positive, st.integers(0, 50)), min_size=2, max_size=6),
)
def test_dirichlet_multinomial_and_beta_bernoulli(rows):
    p, r, counts = (_double([float(row[k]) for row in rows]) for k in range(3))

    def evidence(concentration: Tensor) -> mp.mpf:
        mp.mp.dps = 40
        c = [mp.mpf(v) for v in concentration.tolist()]
        n = [int(v) for v in counts.tolist()]
        rising = mp.fsum(mp.loggamma(a + k) - mp.loggamma(a) for a, k in zip(c, n, strict=True))
        return rising + mp.loggamma(mp.fsum(c)) - mp.loggamma(mp.fsum(c) + sum(n))

    expected = float(evidence(r) - evidence(p))
    result = reduce(dist.Dirichlet(p + counts), dist.Dirichlet(p), dist.Dirichlet(r))
    _assert_close(result.delta_f, expected, scale=10.0)
    _assert_close(result.posterior.concentration, r + counts)
    if len(rows) == 2:
        two = reduce(*(dist.Beta(c[0], c[1]) for c in (p + counts, p, r)))
        _assert_close(two.delta_f, expected, scale=10.0)
        _assert_close(two.posterior.mean, (r + counts)[0] / (r + counts).sum())


def test_golden_values():
    dirichlet = [dist.Dirichlet(_double(c)) for c in ([8.0, 3.0, 1.0], [1.0, 1.0, 1.0], [5.0, 1.0, 0.1])]
    assert float(reduce(*dirichlet).delta_f) == pytest.approx(2.10825828, abs=1e-8)
    gamma = [dist.Gamma(_double(a), _double(b)) for a, b in ((12.0, 5.0), (2.0, 1.0), (4.0, 3.0))]
    assert float(reduce(*gamma).delta_f) == pytest.approx(-0.27694144, abs=1e-8)
    q = _double([0.3, 0.3, 0.4]) * _double([0.2, 0.5, 0.1])
    classes = [
        dist.Categorical(q / q.sum()),
        dist.Categorical(_double([0.3, 0.3, 0.4])),
        dist.Categorical(_double([0.6, 0.39, 0.01])),
    ]
    result = reduce(*classes)
    assert float(result.delta_f) == pytest.approx(0.23428130, abs=1e-8)
    likelihood = _double([0.6, 0.39, 0.01]) * _double([0.2, 0.5, 0.1])
    _assert_close(result.posterior.probs, likelihood / likelihood.sum())
    point = reduce(
        dist.Normal(_double(0.3), _double(0.2)), dist.Normal(_double(0.0), _double(1.0)), dist.Delta(_double(0.0))
    )
    assert float(point.delta_f) == pytest.approx(0.48443791, abs=1e-8)


def test_bernoulli_is_a_categorical_of_two_and_keeps_extreme_odds():
    probs = [_double([0.3, 0.9]), _double([0.5, 0.2]), _double([0.1, 0.7])]
    pairs = [dist.Categorical(torch.stack([1 - v, v], -1)) for v in probs]
    result, twin = reduce(*(dist.Bernoulli(v) for v in probs)), reduce(*pairs)
    _assert_close(result.delta_f, twin.delta_f)
    _assert_close(result.posterior.probs, twin.posterior.probs[:, 1])
    logits = reduce(*(dist.Bernoulli(logits=_double(v)) for v in (800.0, 0.0, -800.0)))
    assert float(logits.delta_f) == pytest.approx(math.log(4.0) - 800.0, abs=1e-9)


def test_class_excluded_by_the_prior():
    q, p = dist.Categorical(_double([0.5, 0.5, 0.0])), dist.Categorical(_double([0.7, 0.3, 0.0]))
    inside = reduce(q, p, dist.Categorical(_double([0.2, 0.8, 0.0])))
    assert float(inside.delta_f) == pytest.approx(math.log(0.5 * 0.2 / 0.7 + 0.5 * 0.8 / 0.3))
    outside = reduce(q, p, dist.Categorical(_double([0.2, 0.7, 0.1])))
    assert torch.isnan(outside.delta_f) and "excludes" in outside.reason


def test_inverse_gamma_variance_and_wishart_precision():
    mp.mp.dps = 40
    torch.manual_seed(0)
    y = torch.randn(9, 2, dtype=torch.float64)

    def evidence_variance(a: float, b: float) -> float:
        n, square = 9, float(y[:, 0].square().sum())
        return float(
            a * mp.log(b)
            - mp.loggamma(a)
            + mp.loggamma(a + mp.mpf(n) / 2)
            - (a + mp.mpf(n) / 2) * mp.log(b + mp.mpf(square) / 2)
        )

    q = dist.InverseGamma(_double(2.0 + 4.5), _double(1.5) + 0.5 * y[:, 0].square().sum())
    result = reduce(q, dist.InverseGamma(_double(2.0), _double(1.5)), dist.InverseGamma(_double(4.0), _double(0.7)))
    _assert_close(result.delta_f, evidence_variance(4.0, 0.7) - evidence_variance(2.0, 1.5), scale=10.0)
    _assert_close(result.posterior.concentration, 8.5)

    scatter = y.T @ y

    def evidence_precision(df: float, inverse: Tensor) -> Tensor:
        rise = torch.special.multigammaln(_double((df + 9) / 2), 2) - torch.special.multigammaln(_double(df / 2), 2)
        return rise + 0.5 * df * torch.logdet(inverse) - 0.5 * (df + 9) * torch.logdet(inverse + scatter)

    one, two = torch.eye(2, dtype=torch.float64), _double([[2.0, 0.3], [0.3, 0.5]])
    laws = [Wishart(_double(df), precision_matrix=m) for df, m in ((13.0, one + scatter), (4.0, one), (6.0, two))]
    result = reduce(*laws)
    _assert_close(result.delta_f, evidence_precision(6.0, two) - evidence_precision(4.0, one))
    _assert_close(result.posterior.precision_matrix, two + scatter)
    _assert_close(result.posterior.df, 15.0)


def test_scalar_normal_against_an_exact_refit():
    # one observation y of noise 0.5 under N(0.1, 2^2), then under N(-0.4, 0.3^2)
    y, noise = 0.8, 0.5

    def fit(loc: float, scale: float) -> tuple[float, float, float]:
        precision = 1 / noise**2 + 1 / scale**2
        mean = (y / noise**2 + loc / scale**2) / precision
        return (
            mean,
            precision**-0.5,
            float(dist.Normal(_double(loc), _double(math.hypot(scale, noise))).log_prob(_double(y))),
        )

    full, small = fit(0.1, 2.0), fit(-0.4, 0.3)
    laws = [dist.Normal(_double(m), _double(s)) for m, s in (full[:2], (0.1, 2.0), (-0.4, 0.3))]
    result = reduce(*laws)
    _assert_close(result.delta_f, small[2] - full[2])
    _assert_close(result.posterior.mean, small[0])
    _assert_close(result.posterior.stddev, small[1])
    logs = reduce(*(dist.LogNormal(law.loc, law.scale) for law in laws))
    _assert_close(logs.delta_f, result.delta_f)
    assert isinstance(logs.posterior, dist.LogNormal)


UNDEFINED = {
    "Normal": (dist.Normal(0.0, 1.0), dist.Normal(0.0, 0.5), dist.Normal(0.0, 3.0)),
    "MultivariateNormal": tuple(dist.MultivariateNormal(torch.zeros(2), v * torch.eye(2)) for v in (1.0, 0.25, 9.0)),
    "Gamma": (dist.Gamma(2.0, 2.0), dist.Gamma(3.0, 1.0), dist.Gamma(0.5, 1.0)),
    "InverseGamma": (dist.InverseGamma(2.0, 1.0), dist.InverseGamma(2.0, 2.0), dist.InverseGamma(2.0, 0.5)),
    "Beta": (dist.Beta(1.0, 1.0), dist.Beta(2.0, 1.0), dist.Beta(0.5, 1.0)),
    "Dirichlet": tuple(dist.Dirichlet(torch.tensor(c)) for c in ([1.0, 1.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0])),
    "Wishart": tuple(Wishart(torch.tensor(df), torch.eye(2)) for df in (3.0, 6.0, 3.0)),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_inadmissible_reductions_are_undefined_not_numbers(name):
    result = reduce(*UNDEFINED[name])
    assert torch.isnan(result.delta_f).all() and result.reason
    assert not result.is_defined.any()


def test_undefined_entries_leave_the_others_and_their_gradients_alone():
    scale = torch.tensor([0.1, 2.0], dtype=torch.float64, requires_grad=True)
    result = reduce(
        dist.Normal(_double([0.2, 0.2]), scale),
        dist.Normal(_double(0.0), _double(1.0)),
        dist.Normal(_double(0.0), _double(5.0)),
    )
    assert result.is_defined.tolist() == [True, False]
    result.delta_f[0].backward()
    assert torch.isfinite(scale.grad).all()
