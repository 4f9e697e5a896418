"""What every change of prior obeys, whatever the types, and what is refused."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Wishart
from torch.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform, SigmoidTransform

from pyrobc.bmr import Reduction, reduce, register_reduction, registered_triples
from pyrobc.bmr.registry import closed_form
from pyrobc.dists import MatrixNormal, Restricted, TruncatedLogNormal, TruncatedLogUniform
from pyrobc.errors import ReductionError


def _double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _normal(loc: object, scale: object) -> dist.Normal:
    return dist.Normal(_double(loc), _double(scale))


def _spd(seed: int) -> Tensor:
    a = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / 3 + 0.5 * torch.eye(3)


def _vector(seed: int, scale: float = 1.0) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(_double([0.1, -0.2, 0.05]) * seed, scale * _spd(seed))


def _matrix(seed: int, scale: float) -> MatrixNormal:
    rows = torch.linalg.cholesky(scale * _spd(seed))
    return MatrixNormal(torch.full((3, 3), 0.1 * seed, dtype=torch.float64), rows, torch.linalg.cholesky(_spd(1)))


# posterior, prior, reduced prior, further reduced prior
CHAINS: dict[str, tuple[Distribution, Distribution, Distribution, Distribution]] = {
    "normal": (_normal(0.3, 0.2), _normal(0.1, 1.0), _normal(-0.2, 0.6), _normal(0.0, 0.01)),
    "log normal": tuple(dist.LogNormal(_double(m), _double(s)) for m, s in ((0.3, 0.2), (0, 1), (1, 0.6), (0, 0.1))),
    "multivariate": (_vector(2, 0.05), _vector(3), _vector(4, 0.6), _vector(5, 0.1)),
    "matrix": (_matrix(2, 0.05), _matrix(3, 1.0), _matrix(4, 0.6), _matrix(5, 0.2)),
    "gamma": tuple(dist.Gamma(_double(a), _double(b)) for a, b in ((12, 5), (2, 1), (4, 3), (9, 9))),
    "inverse gamma": tuple(dist.InverseGamma(_double(a), _double(b)) for a, b in ((12, 5), (2, 1), (4, 3), (9, 9))),
    "beta": tuple(dist.Beta(_double(a), _double(b)) for a, b in ((8, 3), (1, 1), (2, 0.5), (30, 30))),
    "dirichlet": tuple(dist.Dirichlet(_double(c)) for c in ([8, 3.0, 1], [1, 1, 1.0], [5, 1, 0.1], [9, 9, 9.0])),
    "categorical": tuple(
        dist.Categorical(_double(c)) for c in ([0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.6, 0.3, 0.1], [1, 0.0, 0])
    ),
    "bernoulli": tuple(dist.Bernoulli(_double(c)) for c in (0.8, 0.4, 0.6, 0.01)),
    "wishart": tuple(
        Wishart(_double(d), covariance_matrix=_spd(k)) for d, k in ((14.0, 3), (4.0, 3), (6.0, 3), (5.0, 3))
    ),
    "truncated normal": (
        TruncatedLogNormal(_double(-4.0), _double(0.7)),
        TruncatedLogUniform(_double(-20.0), _double(0.0)),
        TruncatedLogNormal(_double(-18.0), _double(3.0)),
        TruncatedLogNormal(_double(-19.0), _double(0.5)),
    ),
    "truncated uniform": (
        TruncatedLogNormal(_double(-4.0), _double(0.7)),
        TruncatedLogUniform(_double(-20.0), _double(0.0)),
        TruncatedLogNormal(_double(-9.0), _double(3.0)),
        TruncatedLogUniform(_double(-15.0), _double(-5.0)),
    ),
    "intervals": (
        _normal(0.3, 0.2),
        _normal(0.1, 1.0),
        Restricted(_normal(0.1, 1.0), -1.0, 1.0),
        Restricted(Restricted(_normal(0.1, 1.0), -1.0, 1.0), -0.2, 0.3),
    ),
    "independent": tuple(
        _normal([m, -m], s).to_event(1) for m, s in ((0.3, 0.2), (0.1, 1.0), (-0.2, 0.6), (0.0, 0.01))
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_rule_and_identity(name):
    q, p, r, t = CHAINS[name]
    first, direct = reduce(q, p, r, num_draws=0), reduce(q, p, t, num_draws=0)
    second = reduce(first.posterior, _as_prior(first.posterior, r), _as_prior(first.posterior, t), num_draws=0)
    torch.testing.assert_close(first.delta_f + second.delta_f, direct.delta_f, rtol=1e-9, atol=1e-9)
    same = reduce(q, p, p if name != "intervals" else Restricted(p, -math.inf, math.inf), num_draws=0)
    torch.testing.assert_close(same.delta_f, torch.zeros_like(same.delta_f), rtol=0, atol=1e-9)
    assert direct.delta_f.dtype == torch.float64 and direct.reason == ""


def _as_prior(posterior: Distribution | None, prior: Distribution) -> Distribution:
    """A reduced posterior of a matrix is a vector, and so its next priors have to be."""
    if isinstance(posterior, dist.MultivariateNormal) and isinstance(prior, MatrixNormal):
        rows, columns = prior.row_scale_tril, prior.column_scale_tril
        return dist.MultivariateNormal(
            prior.loc.flatten(), scale_tril=torch.kron(rows.contiguous(), columns.contiguous())
        )
    return prior


def test_permutation_of_elements_and_of_groups():
    order = torch.tensor([2, 0, 1])

    def permuted(law: dist.MultivariateNormal) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(law.loc[order], law.covariance_matrix[order][:, order])

    trio = (_vector(2, 0.05), _vector(3), _vector(4, 0.6))
    torch.testing.assert_close(reduce(*map(permuted, trio)).delta_f, reduce(*trio).delta_f, rtol=1e-9, atol=1e-9)
    q = TruncatedLogNormal(_double([-4.0, -9.0, -1.0]), _double([1.0, 3.0, 0.1]))
    moved = TruncatedLogNormal(q.loc[order], q.scale[order])
    p, r = TruncatedLogUniform(), TruncatedLogUniform(-16.0, -3.0)
    assert torch.equal(reduce(moved, p, r).delta_f, reduce(q, p, r).delta_f[order])


def test_reparameterisation():
    laws = [_normal([0.3, 1.0], 0.2), _normal(0.1, 1.0), _normal(-0.2, 0.6)]
    expected = reduce(*laws)
    for transforms in (
        [AffineTransform(1.5, -3.0)],
        [ExpTransform()],
        [AffineTransform(0.2, 2.0), ExpTransform()],
        [SigmoidTransform()],
        [ExpTransform(), AffineTransform(0.5, 2.0)],
        [ComposeTransform([]), ComposeTransform([ExpTransform()])],
    ):
        result = reduce(*(dist.TransformedDistribution(law, transforms) for law in laws), num_draws=0)
        torch.testing.assert_close(result.delta_f, expected.delta_f, rtol=1e-9, atol=1e-9)
        assert result.posterior is not None and result.posterior.batch_shape == (2,)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] @ torch.diag(_double([0.5, 1.0, 3.0]))
    trio = (_vector(2, 0.05), _vector(3), _vector(4, 0.6))
    mapped = [dist.MultivariateNormal(turn @ law.loc, turn @ law.covariance_matrix @ turn.T) for law in trio]
    torch.testing.assert_close(reduce(*mapped).delta_f, reduce(*trio).delta_f, rtol=1e-9, atol=1e-9)


def test_wrappers_change_nothing():
    q, p, r = _normal([0.3, 1.0], [0.2, 0.4]), _normal(0.1, 1.0), _normal(-0.2, 0.6)
    expected = reduce(q, p, r).delta_f
    expanded = reduce(q, ExpandedDistribution(p, torch.Size([2])), r.expand((2,)))
    assert torch.equal(expanded.delta_f, expected)
    joint = reduce(q.to_event(1), p.expand((2,)).to_event(1), r.expand((2,)).to_event(1))
    torch.testing.assert_close(joint.delta_f, expected.sum())
    assert joint.posterior.event_shape == (2,)
    nested = reduce(*(dist.Independent(dist.Independent(law.expand((3, 2)), 1), 1) for law in (q, p, r)))
    torch.testing.assert_close(nested.delta_f, 3 * expected.sum())
    rates = reduce(
        dist.Gamma(_double(5.0), _double(4.0)), dist.Exponential(_double(1.0)), dist.Exponential(_double(2.0))
    )
    twin = reduce(dist.Gamma(_double(5.0), _double(4.0)), *(dist.Gamma(_double(1.0), _double(b)) for b in (1.0, 2.0)))
    torch.testing.assert_close(rates.delta_f, twin.delta_f)
    point = reduce(q.to_event(1), p.expand((2,)).to_event(1), dist.Delta(torch.zeros(2), event_dim=1))
    torch.testing.assert_close(point.delta_f, reduce(q, p, dist.Delta(torch.zeros(2))).delta_f.sum())
    box = reduce(q.to_event(1), p.expand((2,)).to_event(1), Restricted(p.expand((2,)).to_event(1), -0.5, 0.5))
    torch.testing.assert_close(box.delta_f, reduce(q, p, Restricted(p, -0.5, 0.5)).delta_f.sum())


def test_point_reductions_are_density_ratios_for_any_law():
    q, p = dist.StudentT(_double(5.0), _double(0.4), _double(0.3)), dist.Cauchy(_double(0.0), _double(1.0))
    result = reduce(q, p, dist.Delta(_double(0.0)))
    assert float(result.delta_f) == pytest.approx(float(q.log_prob(_double(0.0)) - p.log_prob(_double(0.0))))
    full = reduce(_vector(2, 0.05), _vector(3), dist.Delta(torch.zeros(3), event_dim=1))
    zero = torch.zeros(3, dtype=torch.float64)
    assert float(full.delta_f) == pytest.approx(float(_vector(2, 0.05).log_prob(zero) - _vector(3).log_prob(zero)))
    classes = reduce(
        dist.Categorical(_double([0.8, 0.2])), dist.Categorical(_double([0.5, 0.5])), dist.Delta(torch.tensor(1))
    )
    assert float(classes.delta_f) == pytest.approx(math.log(0.4))


def test_single_precision_parameters_are_scored_in_double():
    q = dist.Normal(torch.tensor(0.3), torch.tensor(1e-3))
    result = reduce(q, dist.Normal(0.0, 1.0), dist.Normal(0.0, 1e-4))
    twin = reduce(
        dist.Normal(q.loc.double(), q.scale.double()),
        _normal(0.0, 1.0),
        dist.Normal(_double(0.0), torch.tensor(1e-4).double()),
    )
    assert result.delta_f.dtype == torch.float64 and torch.equal(result.delta_f, twin.delta_f)


def test_gradients_reach_float32_parameters():
    loc = torch.tensor([0.3, -0.1], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    q = dist.Normal(loc, 0.2).to_event(1)
    reduce(
        q, dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.Normal(torch.zeros(2), scale).to_event(1)
    ).delta_f.backward()
    # d/dr of ln N(m; 0, s'^2 + r^2)-type evidence, by finite differences
    step = 1e-4
    values = [
        reduce(_normal([0.3, -0.1], 0.2), _normal(0.0, 1.0), _normal(0.0, 0.5 + h)).delta_f.sum() for h in (step, -step)
    ]
    assert float(scale.grad) == pytest.approx(float(values[0] - values[1]) / (2 * step), rel=1e-4)
    assert torch.isfinite(loc.grad).all()


REFUSALS = {
    "improper prior": (
        (_normal(0.0, 1.0), dist.ImproperUniform(dist.constraints.real, (), ()), _normal(0.0, 1.0)),
        "ImproperUniform.*improper.*proper distribution.*TruncatedLogUniform",
    ),
    "masked": (
        (_normal(0.0, 1.0), _normal(0.0, 1.0).mask(False), _normal(0.0, 1.0)),
        "MaskedDistribution.*base_dist",
    ),
    "point posterior": (
        (dist.Delta(_double(0.0)), _normal(0.0, 1.0), _normal(0.0, 0.1)),
        "posterior Delta.*AutoNormal",
    ),
    "event shapes": (
        (_normal([0.0, 1.0], 1.0).to_event(1), _normal([0.0, 1.0], 1.0), _normal([0.0, 1.0], 1.0)),
        r"event shapes.*\(2,\), \(\), \(\).*to_event",
    ),
    "batch shapes": (
        (_normal([0.0, 1.0], 1.0), _normal([0.0, 1.0, 2.0], 1.0), _normal(0.0, 1.0)),
        r"batch shapes.*\(2,\), \(3,\).*broadcast",
    ),
    "wider support": (
        (dist.Gamma(2.0, 1.0), dist.Gamma(2.0, 1.0), _normal(0.0, 1.0)),
        "support of the reduced prior Normal.*Gamma",
    ),
    "posterior beyond the prior": (
        (_normal(0.0, 1.0), dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 1.0)),
        "support of the posterior Normal",
    ),
    "discrete against continuous": (
        (dist.Poisson(2.0), dist.Poisson(3.0), dist.Gamma(2.0, 1.0)),
        "support of the reduced prior Gamma",
    ),
    "discrete without closed form": (
        (dist.Poisson(2.0), dist.Poisson(3.0), dist.Poisson(1.0)),
        "discrete site without a closed form.*marginalise",
    ),
    "point outside the support": (
        (dist.Gamma(2.0, 1.0), dist.Gamma(2.0, 1.0), dist.Delta(_double(-1.0))),
        r"Delta under Gamma.*ROPE",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_and_why(name):
    trio, message = REFUSALS[name]
    with pytest.raises(ReductionError, match=message):
        reduce(*trio)


def test_no_closed_form_and_no_draws():
    with pytest.raises(ReductionError, match="Normal, Normal, Laplace.*num_draws=0.*num_draws=1000"):
        reduce(_normal(0.0, 0.5), _normal(0.0, 1.0), dist.Laplace(_double(0.0), _double(1.0)), num_draws=0)


def test_registry_takes_new_types_once_and_prefers_the_specific():
    class Odd(dist.Normal):
        pass

    @register_reduction(Odd, Odd, Odd)
    def reduce_odd(q: Odd, p: Odd, reduced: Odd) -> Reduction:
        return Reduction(torch.full(q.batch_shape, 7.0, dtype=torch.float64))

    assert (Odd, Odd, Odd) in registered_triples()
    odd = Odd(_double(0.0), _double(1.0))
    assert float(reduce(odd, odd, odd).delta_f) == 7.0
    assert float(reduce(odd, odd, _normal(0.0, 1.0)).delta_f) == 0.0  # falls back on the base class
    assert closed_form(Odd, Odd, dist.Laplace) is None
    with pytest.raises(ReductionError, match="Odd, Odd, Odd.*second closed form.*remove one"):
        register_reduction(Odd, Odd, Odd)(lambda q, p, r: Reduction(torch.zeros(())))


def test_large_batches_in_pieces_equal_one_piece():
    # without gradients millions of groups are scored a cache-full at a time
    generator = torch.Generator().manual_seed(0)
    loc = torch.rand(3, 70_001, generator=generator, dtype=torch.float64) * 25 - 20
    scale = (torch.rand(70_001, generator=generator, dtype=torch.float64) * 6 - 3).exp()
    for make, trio in (
        (TruncatedLogNormal, (TruncatedLogUniform(), TruncatedLogUniform(-16.0, -3.0))),
        (TruncatedLogNormal, (TruncatedLogUniform(), TruncatedLogNormal(-18.0, 0.5))),
        (dist.Normal, (_normal(0.1, 1.0), _normal(0.3, 0.4))),
    ):
        result = reduce(make(loc, scale), *trio)
        recorded = reduce(make(loc.clone().requires_grad_(), scale), *trio)
        assert result.delta_f.shape == (3, 70_001)
        torch.testing.assert_close(result.delta_f, recorded.delta_f.detach(), rtol=1e-12, atol=1e-12, equal_nan=True)
        assert result.posterior is not None and result.posterior is result.posterior
        assert result.posterior.batch_shape == (3, 70_001)


def test_a_reduction_shows_its_numbers_and_its_reason():
    shown = repr(reduce(dist.Normal(0.0, 1.0), dist.Normal(0.0, 0.5), dist.Normal(0.0, 3.0)))
    assert "nan" in shown and "no positive precision" in shown
