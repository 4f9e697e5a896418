"""Self-compression: its KL, its training without draws, and what its scores say, against closed forms and draws."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pyrobc as bc
from pyrobc.accounting import _find_variances
from pyrobc.bmr import reduce
from pyrobc.dists import interval_log_mass
from pyrobc.errors import FamilyError, FitError, GroupError, ReductionError
from pyrobc.family import make_family
from pyrobc.folding import fold_scales
from pyrobc.lift import lift
from pyrobc.likelihoods import make_likelihood
from pyrobc.meanfield import NormalFactor
from pyrobc.moment_loss import MomentLoss
from pyrobc.moments import Moments
from pyrobc.negligible import negligible_thresholds
from pyrobc.objective import fast_loss
from pyrobc.posterior import Posterior
from pyrobc.predictive import keep_covariance, propagate
from pyrobc.propagation import propagate_chain

KERNELS = {"0": np.array([0, 2]), "3": np.array([1, 2, 4])}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)
    )  # fmt: skip


def fitted(family: str = "moment_propagation", noise: float = 0.3, dtype: torch.dtype = torch.float64) -> Posterior:
    """A posterior with means and scales that are all different."""
    model = lift(network().to(dtype), family, "categorical", torch.randn(1, 1, 4, 4, dtype=dtype))
    guide = model.new_guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    guide.project_()
    return Posterior(model, guide, 100)


def draw_outputs(posterior: Posterior, x: Tensor, count: int) -> Tensor:
    model = posterior.model
    with torch.no_grad():
        return torch.stack(
            [model.run(model.family.combine(posterior.draw(seed), model.spec), x) for seed in range(count)]
        )


def test_kl_of_a_kernel() -> None:
    model = lift(nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten(), nn.Linear(2, 2)), "moment_propagation",
                 example_inputs=torch.randn(1, 1, 5, 5))  # fmt: skip
    guide = model.new_guide()
    factor = guide.by_site()["0.weight"]
    assert factor.log_scale.shape == (2, 1, 1, 1)
    factor.loc.data = torch.full((2, 1, 5, 5), 0.2)
    factor.log_scale.data.fill_(0.5 * math.log(0.3))
    kl = model.family.kl(guide.distributions(), model.priors())["0.weight"]
    assert float(kl.detach()) == pytest.approx(2 * 6.7997, abs=1e-3)


def test_without_a_likelihood_every_kernel_returns_to_the_prior() -> None:
    posterior = fitted()
    optimizer = torch.optim.Adam(posterior.guide.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        sum(posterior.model.family.kl(posterior.laws(), posterior.model.priors()).values()).backward()
        optimizer.step()
    for factor in posterior.guide.by_site().values():
        torch.testing.assert_close(factor.loc.detach(), torch.zeros_like(factor.loc), rtol=0, atol=1e-3)
        torch.testing.assert_close(factor.log_scale.detach(), torch.zeros_like(factor.log_scale), rtol=0, atol=1e-3)


def test_the_gaussian_density_of_one_hot_targets() -> None:
    moments = Moments(torch.tensor([[0.7, 0.3]]).double(), torch.diag(torch.tensor([0.04, 0.01]).double())[None], True)
    value = MomentLoss().gaussian(moments, torch.tensor([0]))
    assert float(value) == pytest.approx(-1.3364, abs=1e-4)
    law = dist.MultivariateNormal(moments.mean, moments.covariance + 1e-3 * torch.eye(2))
    expected = law.log_prob(torch.tensor([1.0, 0.0]).double()) + math.log(2 * math.pi)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "normal"])
@pytest.mark.parametrize("is_full", [True, False])
def test_the_expected_log_likelihood_to_second_order(name: str, is_full: bool) -> None:
    """Against the Hessian, by torch, and against draws where noise is small."""
    likelihood, mean = make_likelihood(name), torch.randn(3, 4).double()
    values = {"y.scale": torch.tensor(0.7).double()}
    targets = torch.randint(0, 4, (3,)) if name == "categorical" else torch.randint(0, 2, (3, 4)).double()
    factor = 0.1 * torch.randn(3, 4, 4).double()
    spread = factor @ factor.transpose(1, 2) if is_full else factor[:, 0].square()
    moments = Moments(mean, spread, is_full)
    got = likelihood.curvature(moments, values)
    for row in range(3):

        def log_prob(z: Tensor, row: int = row) -> Tensor:
            return likelihood.distribution(z[None], values).log_prob(targets[row : row + 1]).sum()

        hessian = torch.autograd.functional.hessian(log_prob, mean[row])
        torch.testing.assert_close(got[row], -(hessian * moments.covariance[row]).sum())
    draws = torch.distributions.MultivariateNormal(mean, moments.covariance + 1e-12 * torch.eye(4)).sample((40_000,))
    log_probs = torch.stack([likelihood.distribution(z, values).log_prob(targets) for z in draws])
    expected = likelihood.distribution(mean, values).log_prob(targets) - 0.5 * got
    assert bool(((log_probs.mean(0) - expected).abs() < 4 * log_probs.std(0) / 200 + 2e-3).all())


def test_the_loss_is_the_expected_log_likelihood_of_draws() -> None:
    x, y = torch.randn(4, 5).double(), torch.randint(0, 3, (4,))
    model = lift(nn.Sequential(nn.Linear(5, 3)).double(), "moment_propagation", "categorical", x[:1])
    laws = model.new_guide().distributions()
    with torch.no_grad():
        effective = model.family.draw_local(laws, model.spec, 4)
        got = MomentLoss().log_likelihood(model, effective, x, y, {})
        weights, biases = (laws[name].sample((40_000,)) for name in ("0.weight", "0.bias"))
        outputs = torch.einsum("sko,ro->srk", weights, x) + biases.unsqueeze(1)
        draws = outputs.log_softmax(2)[:, torch.arange(4), y]
        at_mean = model.run(model.family.mean(laws, model.spec), x).log_softmax(1)[torch.arange(4), y]
    error = (draws.mean(0) - got).abs()
    assert bool((error < 0.2 * (draws.mean(0) - at_mean).abs() + 4 * draws.std(0) / 200).all())


def test_the_loss_draws_nothing_and_knows_the_kl() -> None:
    posterior, x, y = fitted(), torch.randn(6, 1, 4, 4).double(), torch.randint(0, 3, (6,))
    model = posterior.model
    losses = {
        t: [float(MomentLoss()(model, posterior.guide, 60)(x, y, t).detach()) for _ in range(2)] for t in (1.0, 0.25)
    }
    assert all(first == second for first, second in losses.values())
    kl = float(sum(model.family.kl(posterior.laws(), model.priors()).values()).detach())
    assert losses[1.0][0] - losses[0.25][0] == pytest.approx(0.75 * kl)


def test_the_loss_is_the_traced_one_where_weights_are_almost_known() -> None:
    posterior, x, y = fitted(), torch.randn(6, 1, 4, 4).double(), torch.randint(0, 3, (6,))
    with torch.no_grad():
        for factor in posterior.guide.by_site().values():
            factor.log_scale.fill_(-9.0)
    found = [
        float(path(posterior.model, posterior.guide, 60)(x, y, 1.0).detach())
        for path in (MomentLoss(), MomentLoss("full", "exact"), fast_loss)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("family", ["moment_propagation", "group_normal_jeffreys", "group_horseshoe"])
def test_outputs_have_the_moments_of_draws(family: str, covariance: str) -> None:
    posterior, x = fitted(family, noise=0.02), torch.randn(3, 1, 4, 4).double()
    for factor in posterior.guide.by_site().values():
        for name, parameter in factor.named_parameters():
            if name == "log_scale":  # of weights; scales of groups are shared by a column, which folding leaves out
                parameter.data.fill_(-3.0 if isinstance(factor, NormalFactor) else -8.0)
    result = propagate(posterior, x, covariance=covariance, relu="exact")
    draws = draw_outputs(posterior, x, 500)
    torch.testing.assert_close(result.mean, draws.mean(0), rtol=0.05, atol=0.04)
    spread = draws.var(0)
    assert float(((result.variance - spread).abs() / spread).mean()) < (0.15 if covariance == "full" else 0.35)
    if covariance == "full":
        for row in range(3):
            expected = draws[:, row].T.cov()
            assert float((result.covariance[row] - expected).norm() / expected.norm()) < 0.2


def test_the_lifted_network_and_the_plain_one_pass_on_the_same_moments() -> None:
    posterior, x = fitted(), torch.randn(3, 1, 4, 4).double()
    model = posterior.model
    effective = model.family.draw_local(posterior.laws(), model.spec, 3)
    for covariance in ("full", "diagonal"):
        start = Moments(x, None, covariance == "full")
        lifted = model.call(effective, start, propagate_chain)
        plain = propagate(posterior, x, covariance=covariance)
        torch.testing.assert_close(lifted.mean, plain.mean)
        torch.testing.assert_close(lifted.covariance, plain.covariance)


def test_the_cut_network_keeps_its_covariance() -> None:
    posterior, x = fitted(), torch.randn(3, 1, 4, 4).double()
    small = posterior.restricted(KERNELS)
    assert small.guide.by_site()["0.weight"].log_scale.shape == (2, 1, 1, 1)
    kept = keep_covariance(small, covariance="full")
    assert sum(p.numel() for p in kept.net.parameters()) == sum(p.numel() for p in small.to_module().parameters())
    with torch.no_grad():
        for factor in posterior.guide.by_site().values():  # masked: removed groups have neither mean nor noise
            factor.log_scale.data = factor.log_scale.data.expand_as(factor.loc).clone()
        sites = posterior.guide.by_site()
        gone = {"3.weight": [i for g in (1, 3) for i in range(4 * g, 4 * g + 4)], "5.weight": [0, 3]}
        for name, columns in gone.items():
            sites[name].loc.data[:, columns] = 0
            sites[name].log_scale.data[:, columns] = -40
        masked = propagate(posterior, x, covariance="full")
        result = kept(x)
    torch.testing.assert_close(result.mean, masked.mean)
    torch.testing.assert_close(result.covariance, masked.covariance)
    torch.testing.assert_close(result.mean, small.to_module()(x).detach())


def test_scales_are_the_laws_of_lengths_along_the_mean() -> None:
    posterior = fitted()
    weight, bias = (posterior.guide.by_site()[f"0.{n}"].distribution().base_dist for n in ("weight", "bias"))
    mean = torch.cat([weight.loc.flatten(1), bias.loc[:, None]], 1).detach()
    direction = mean / mean.norm(dim=1, keepdim=True)
    scale = posterior.presence()["0"]
    torch.testing.assert_close(scale.size, mean.norm(dim=1))
    torch.testing.assert_close(scale.posterior.mean, scale.size)
    with torch.no_grad():
        for law, parts in ((scale.posterior, (weight, bias)), (scale.prior, None)):
            if parts is None:
                draws = torch.randn(4000, 4, 10).double()
            else:
                draws = torch.cat([weight.sample((4000,)).flatten(2), bias.sample((4000,)).unsqueeze(2)], 2)
            uniform = law.cdf((draws * direction).sum(2))
            for group in range(4):
                assert stats.kstest(uniform[:, group].numpy(), "uniform").pvalue > 1e-3


def test_an_input_feature_is_the_weights_that_read_it() -> None:
    model = lift(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), "moment_propagation",
                 example_inputs=torch.randn(1, 4))  # fmt: skip
    posterior = Posterior(model, model.new_guide(), 1)
    weight = posterior.guide.by_site()["0.weight"].loc.detach().double()
    torch.testing.assert_close(posterior.presence()["input"].size, weight.norm(dim=0))
    bias = posterior.guide.by_site()["0.bias"].loc.detach().double()
    torch.testing.assert_close(posterior.presence()["0"].size, torch.cat([weight, bias[:, None]], 1).norm(dim=1))


def test_a_group_without_trained_weights_says_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    model = lift(net, "moment_propagation", example_inputs=torch.randn(1, 4), prune_inputs=False)
    scale = Posterior(model, model.new_guide(), 1).presence()["0"]
    for label, reduced in model.family.reduced().items():
        delta_f = reduce(scale.posterior, scale.prior, reduced.of(scale.prior, torch.full((5,), 0.1).double())).delta_f
        assert torch.equal(delta_f, torch.zeros(5).double()), label


def test_deleting_a_kernel_is_the_savage_dickey_ratio_of_all_its_weights() -> None:
    posterior = fitted()
    scale = posterior.presence()["0"]
    found = reduce(scale.posterior, scale.prior, dist.Delta(torch.zeros(4).double())).delta_f
    expected = torch.zeros(4).double()
    for name in ("0.weight", "0.bias"):
        q = posterior.guide.by_site()[name].distribution().base_dist
        p = dist.Normal(torch.zeros_like(q.loc), torch.ones_like(q.loc))
        terms = reduce(q, p, dist.Delta(torch.zeros_like(q.loc))).delta_f
        expected += terms.detach().reshape(4, -1).sum(1)
    torch.testing.assert_close(found, expected)
    variance = (2 * posterior.guide.by_site()["0.weight"].log_scale.detach()).exp().flatten()
    norm = posterior.guide.by_site()["0.weight"].loc.detach().flatten(1).square().sum(1)
    bias = posterior.guide.by_site()["0.bias"]
    closed = -4.5 * variance.log() - 0.5 * norm / variance
    rest = -bias.log_scale.detach() - 0.5 * (bias.loc.detach() / bias.log_scale.detach().exp()).square()
    torch.testing.assert_close(found, closed + rest)
    with pytest.raises(ReductionError, match="zero, which deletes"):
        reduce(scale.posterior, scale.prior, dist.Delta(torch.ones(4).double()))


def test_the_rope_and_the_published_ranking() -> None:
    posterior = fitted()
    score = bc.score(posterior)
    scale, threshold = posterior.presence()["0"], posterior.thresholds(0.01)["0"]
    q = interval_log_mass(scale.posterior, -threshold, threshold).exp()
    np.testing.assert_allclose(score.log_odds()["0"], (q.log() - torch.log1p(-q)).numpy())
    norm = bc.score(posterior, "kernel_norm")
    np.testing.assert_allclose(norm.delta_f["0"], -np.log(scale.size.numpy()))
    assert norm.unit == "negative log norm of the mean kernel"


def test_thresholds_are_shares_of_the_deployed_size() -> None:
    """What a gate of that share would be, in units of the group's own size."""
    posterior = fitted()
    scales = posterior.presence()
    plain = negligible_thresholds(posterior.model.spec, posterior.mean(), {}, 0.01)
    found = posterior.thresholds(0.01)
    for block, share in plain.items():
        torch.testing.assert_close(found[block], share * scales[block].size)


def test_folding_and_counting_see_no_gates() -> None:
    posterior = fitted()
    folded = fold_scales(posterior)
    variances = _find_variances(posterior)
    for name, law in posterior.laws().items():
        torch.testing.assert_close(folded.laws()[name].mean, law.mean)
        torch.testing.assert_close(folded.laws()[name].variance, law.variance)
        np.testing.assert_allclose(variances[name], law.variance.detach().numpy())
    assert folded.guide.by_site()["0.weight"].log_scale.shape == (4, 1, 3, 3)


def blobs(rows: int = 240) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, 3, (rows,))
    return 0.3 * torch.randn(rows, 6) + torch.eye(6)[y], y


@pytest.mark.parametrize("path", [None, "moments", MomentLoss("full", "exact"), MomentLoss(density="gaussian"), "fast"])
def test_fit_takes_the_familys_road_or_another(path: object) -> None:
    torch.manual_seed(1)
    x, y = blobs()
    family = make_family("moment_propagation", initial_variance=1e-3)
    model = lift(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), family, example_inputs=x[:1])
    posterior = bc.fit(model, (x, y), epochs=25, lr=2e-2, batch_size=40, temperature=0.1, path=path, progress=False)
    assert posterior.history[-1]["elbo"] > posterior.history[0]["elbo"]
    with torch.no_grad():
        assert float((posterior.to_module()(x).argmax(1) == y).double().mean()) > 0.95


def test_a_gated_family_can_be_trained_on_moments_too() -> None:
    x, y = blobs()
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = lift(net, "group_normal_jeffreys", "categorical", x[:1])
    posterior = bc.fit(
        model, (x, y), epochs=25, lr=2e-2, batch_size=40, temperature=0.1, path="moments", progress=False
    )
    with torch.no_grad():
        assert float((posterior.to_module()(x).argmax(1) == y).double().mean()) > 0.95


def test_compress_runs_the_family_from_end_to_end() -> None:
    x, y = blobs()
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    result = bc.compress(net, (x, y), family="moment_propagation", epochs=8, lr=2e-2, progress=False, num_draws=25)
    assert result.plan.parameters[1] <= result.plan.parameters[0]
    assert result.net(x).shape == (240, 3)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last(h + self.second(h).relu())


def test_what_cannot_be_propagated_is_refused() -> None:
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    model = lift(Residual(), "moment_propagation", "categorical", x[:1])
    with pytest.raises(GroupError, match="Residual.*path='fast'"):
        bc.fit(model, (x, y), epochs=1, progress=False)
    bc.fit(model, (x, y), epochs=1, path="fast", progress=False)
    points = lift(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), "log_uniform", "categorical", x[:1])
    with pytest.raises(FamilyError, match="point weights"):
        propagate(Posterior(points, points.new_guide(), 1), x)
    real = lift(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), "moment_propagation", "normal", x[:1])
    with pytest.raises(FitError, match="gaussian.*class labels"):
        bc.fit(real, (x, torch.randn(8, 3)), epochs=1, path=MomentLoss(density="gaussian"), progress=False)
    with pytest.raises(FamilyError, match="positive numbers"):
        make_family("moment_propagation", prior_scale=0.0)
