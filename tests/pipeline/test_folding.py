"""Folded posteriors: the same network, the moments of a product, and the prior that the ELBO likes best."""

import copy
import math
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrobc.dists import SoftCapped
from pyrobc.errors import FamilyError
from pyrobc.family import make_family
from pyrobc.fit import fit
from pyrobc.folding import FoldedFamily, fold_scales, refit_prior
from pyrobc.lift import lift
from pyrobc.meanfield import NormalFactor
from pyrobc.models.mlp import build
from pyrobc.posterior import Posterior


class Residual(nn.Module):
    """Batch norm, a residual add and a flatten that owns four features a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.again = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.pool, self.last = nn.AdaptiveAvgPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        h = torch.relu(h + self.again(self.inner(h)))
        return self.last(self.pool(h).flatten(1))


def build_lenet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 6, 2), nn.ReLU(), nn.Flatten(),
                         nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))  # fmt: skip


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: build(6, (7, 5), 3), (6,)),
    "lenet": (build_lenet, (1, 8, 8)),
    "residual": (Residual, (1, 6, 6)),
}


def some_posterior(net: nn.Module, shape: tuple[int, ...], family: Any, likelihood: str = "categorical") -> Posterior:
    """A posterior away from its start, with noise that matters; nothing is fitted."""
    model = lift(net, family, likelihood, torch.randn(2, *shape))
    for name, buffer in model.net.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.5, 0.5)
    guide = model.new_guide()
    with torch.no_grad():
        for key, parameter in guide.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) + (2.0 if key.endswith("log_scale") else 0.0))
    guide.project_()
    return Posterior(model, guide, num_data=60)


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
@pytest.mark.parametrize("family", ["group_normal_jeffreys", "group_horseshoe"])
@pytest.mark.parametrize("network", NETWORKS)
def test_folding_changes_no_output(network: str, family: str, likelihood: str) -> None:
    make, shape = NETWORKS[network]
    posterior = some_posterior(make(), shape, family, likelihood)
    before = {n: t.clone() for n, t in posterior.guide.state_dict().items()}
    folded = fold_scales(posterior)
    x = torch.randn(9, *shape)
    with torch.no_grad():
        expected = posterior.to_module()(x)
        torch.testing.assert_close(folded.to_module()(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(folded.model.eval().run(folded.mean(), x), expected, rtol=1e-5, atol=1e-5)
    assert folded.laws().keys() == folded.model.priors().keys()
    assert folded.scales() == {} and folded.num_data == 60
    with torch.no_grad():
        for parameter in folded.guide.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[n], t) for n, t in posterior.guide.state_dict().items()), "memory is shared"


def test_frozen_layers_keep_the_scales_of_what_they_read() -> None:
    net = build(6, (7, 5), 3)
    net[3].requires_grad_(False)
    posterior = some_posterior(net, (6,), "group_normal_jeffreys")
    x = torch.randn(9, 6)
    torch.testing.assert_close(fold_scales(posterior).to_module()(x), posterior.to_module()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("group_normal_jeffreys", {}), ("group_horseshoe", {}), ("group_horseshoe", {"slab": 0.9})],
)
def test_moments_are_those_of_the_product_of_a_scale_and_a_weight(family: str, settings: dict[str, Any]) -> None:
    posterior = some_posterior(build(2, (2,), 2), (2,), make_family(family, **settings))
    with torch.no_grad():  # scales as wide as fits leave them, at most
        for key, parameter in posterior.guide.named_parameters():
            if key.endswith("log_scale"):
                parameter.clamp_(max=-1.5)
    posterior.model.double()
    posterior.guide.double()
    folded = fold_scales(posterior).laws()
    spec, rows = posterior.model.spec, 1_000_000
    with torch.no_grad():
        laws = {n: law for n, law in posterior.laws().items()}
        gates = {n: s.posterior.sample((rows,)).double() for n, s in posterior.scales().items()}
        for block in spec.blocks:
            name = block.consumers[0].parameter
            weight = laws[name].base_dist
            for column in range(block.size):
                draws = gates[block.name][:, column] * (
                    weight.loc[0, column] + weight.scale[0, column] * torch.randn(rows, dtype=torch.float64)
                )
                assert float(folded[name].mean[0, column]) == pytest.approx(float(draws.mean()), abs=0.005)
                away = (draws - draws.mean()).square()
                error = float(away.std()) / math.sqrt(rows)
                assert abs(float(folded[name].variance[0, column]) - float(away.mean())) < 5 * error


def test_the_variance_under_a_cap_is_that_of_quadrature_and_of_draws() -> None:
    base = torch.distributions.LogNormal(
        torch.tensor([-3.0, 0.0, 2.0]).double(), torch.tensor([0.3, 1.0, 0.5]).double()
    )
    law = SoftCapped(base, 1.5)
    quantiles = base.icdf((torch.arange(200_000).double() + 0.5)[:, None] / 200_000)
    values = 1.5 * quantiles / (1.5**2 + quantiles.square()).sqrt()
    torch.testing.assert_close(law.variance, values.var(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(law.mean, values.mean(0), rtol=1e-6, atol=0)
    narrow = SoftCapped(torch.distributions.LogNormal(torch.tensor(0.0).double(), torch.tensor(1e-6).double()), 1.0)
    assert float(narrow.variance) == pytest.approx(1e-12 / 8, rel=1e-6), "nothing cancels"
    with pytest.raises(NotImplementedError, match="variance of a soft-capped HalfCauchy"):
        _ = SoftCapped(torch.distributions.HalfCauchy(torch.tensor(1.0)), 1.0).variance


def test_point_weights_cannot_be_folded() -> None:
    posterior = some_posterior(build(6, (7, 5), 3), (6,), "log_uniform")
    with pytest.raises(FamilyError, match=r"'log_uniform': got point weights; allowed: .*group_normal_jeffreys"):
        fold_scales(posterior)


def test_point_weights_fold_their_gates_and_start_as_wide_as_asked() -> None:
    posterior = some_posterior(build(6, (7, 5), 3), (6,), "log_uniform")
    x = torch.randn(9, 6)
    with torch.no_grad():
        plain = posterior.to_module()
        folded = fold_scales(posterior, width=0.03)
        torch.testing.assert_close(folded.to_module()(x), plain(x), rtol=1e-5, atol=1e-5)
        gate, weight = posterior.scales()["1"].posterior, posterior.guide.by_site()["3.weight"].value
        factor = folded.guide.by_site()["3.weight"]
        assert isinstance(factor, NormalFactor)
        noise = gate.variance.sqrt() * weight.abs().double()
        least = 0.03 * (gate.mean * weight.double()).square().mean().sqrt()
        expected = torch.maximum(noise, least)
        assert bool((noise > least).any()) and bool((noise < least).any()), "both ends are seen"
        torch.testing.assert_close(factor.log_scale.double().exp(), expected, rtol=1e-4, atol=1e-7)
    fitted = fit(folded.model, (x, torch.randint(0, 3, (9,))), epochs=1, guide=folded.guide, progress=False)
    assert fitted.history and fitted.laws().keys() == folded.model.priors().keys()


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_the_prior_is_the_one_with_the_largest_elbo(law: Any) -> None:
    posterior = fold_scales(some_posterior(Residual(), (1, 6, 6), "group_normal_jeffreys"))
    sites = posterior.guide.by_site()
    factor = sites["inner.weight"]
    assert isinstance(factor, NormalFactor)
    factor.keep_(torch.rand_like(factor.loc) < 0.4)
    family = refit_prior(posterior, law).model.family
    laws, shape = posterior.laws(), {n: p.shape for n, p in posterior.model.spec.parameters.items()}
    for name in ("inner.weight", "norm.weight", "last.bias"):
        fitted = family.prior_scales[name]

        def divergence(log_scale: float, name: str = name) -> float:
            center = 1.0 if name == "norm.weight" else 0.0
            kind = torch.distributions.Laplace if (law, center) == ("laplace", 0.0) else torch.distributions.Normal
            prior = kind(torch.full(shape[name], center), math.exp(log_scale))
            assert type(posterior.model.priors()[name].base_dist).__name__ == kind.__name__
            return float(kl_divergence(laws[name].base_dist, prior).detach().double().sum())

        best = minimize_scalar(divergence, bracket=(-3.0, 0.0), tol=1e-10)
        assert fitted == pytest.approx(math.exp(best.x), rel=2e-3), name
        assert divergence(math.log(fitted)) <= best.fun + 1e-4
    assert family.prior_scales.keys() == posterior.model.spec.parameters.keys()
    again = fold_scales(posterior)
    assert again is posterior, "what is folded gets its prior fitted again"


def test_a_law_that_is_not_offered_is_refused() -> None:
    posterior = fold_scales(some_posterior(build(6, (7, 5), 3), (6,), "group_normal_jeffreys"))
    with pytest.raises(FamilyError, match="'lapalce'; allowed: normal, laplace"):
        refit_prior(posterior, "lapalce")  # type: ignore[arg-type]
    assert posterior.model.family.law == "normal"


def test_a_held_scale_stays_until_a_law_is_named() -> None:
    posterior = fold_scales(some_posterior(Residual(), (1, 6, 6), "group_normal_jeffreys"))
    family, info = posterior.model.family, posterior.model.spec.parameters
    fitted = dict(refit_prior(posterior, "laplace").model.family.prior_scales)
    refit_prior(posterior, scale=0.05)
    assert family.law == "laplace"
    expected = {name: 0.05 if info[name].kind == "weight" else scale for name, scale in fitted.items()}
    assert 0.05 not in fitted.values() and set(expected.values()) > {0.05}
    for later in (refit_prior(posterior), posterior.copy()):
        assert later.model.family.prior_scales == expected
        assert later.model.priors()["inner.weight"].base_dist.scale.unique() == torch.tensor(0.05)
        assert refit_prior(later).model.family.settings()["held"] == 0.05
    assert refit_prior(posterior, "laplace").model.family.prior_scales == fitted
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(FamilyError, match=r"scale of the prior.*allowed: a positive number"):
            refit_prior(posterior, scale=scale)
    assert family.prior_scales == fitted


def test_a_prior_of_a_tensor_without_weights_is_one() -> None:
    posterior = fold_scales(some_posterior(build(6, (7, 5), 3), (6,), "group_normal_jeffreys"))
    factor = posterior.guide.by_site()["1.weight"]
    assert isinstance(factor, NormalFactor)
    factor.keep_(torch.zeros_like(factor.kept))
    assert refit_prior(posterior).model.family.prior_scales["1.weight"] == 1.0


def test_a_copy_can_be_fitted_without_changing_what_was_copied() -> None:
    posterior = fold_scales(some_posterior(Residual(), (1, 6, 6), "group_normal_jeffreys"))
    before = copy.deepcopy((posterior.guide.state_dict(), posterior.model.state_dict()))
    scales = dict(posterior.model.family.prior_scales)
    twin = posterior.copy()
    data = torch.randn(20, 1, 6, 6), torch.arange(20) % 3
    refit_prior(fit(twin.model, data, epochs=2, guide=twin.guide, progress=False, lr=0.1))
    after = (posterior.guide.state_dict(), posterior.model.state_dict())
    assert all(torch.equal(old[n], new[n]) for old, new in zip(before, after, strict=True) for n in old)
    assert posterior.model.family.prior_scales == scales != twin.model.family.prior_scales


def test_a_fitted_scale_is_told_to_four_digits() -> None:
    """Another processor fits the same scale to float precision, and its checkpoints are those of the same fit."""
    origin = make_family("group_normal_jeffreys")
    one, other, third = (FoldedFamily(origin, {"w": s}, held=s) for s in (0.12345671, 0.12345674, 0.1236))
    assert repr(one) == repr(other) != repr(third)
    assert "0.1235" in repr(one) and repr(origin) in repr(one)
