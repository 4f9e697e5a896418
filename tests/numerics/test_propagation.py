"""Moments of networks with uncertain weights against enumeration, quadrature, Monte Carlo and the plain network."""

import copy
import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor, nn
from torch.func import functional_call

from pyrobc.errors import GroupError
from pyrobc.moments import Moments, propagate_affine
from pyrobc.propagation import MomentNetwork, propagate_chain, propagate_layer, softmax_moments

MODES = ("full", "diagonal")
RULES = ("first_order", "exact")


def spread_over(net: nn.Module, low: float = 0.05, high: float = 0.6) -> dict[str, Tensor]:
    return {name: low + (high - low) * torch.rand_like(p) for name, p in net.named_parameters()}


def enumerate_moments(net: nn.Module, variances: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance where every weight is one of two values: a law of the right means and variances."""
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=sum(sizes.values()))), dtype=torch.float64)
    parts = dict(zip(sizes, signs.split(list(sizes.values()), dim=1), strict=True))
    stacked = {
        name: p.detach() + variances[name].sqrt() * parts[name].reshape(-1, *p.shape)
        for name, p in net.named_parameters()
    }
    outputs = torch.func.vmap(lambda values: functional_call(net, values, (x,)).flatten(1))(stacked)
    mean = outputs.mean(0)
    away = outputs - mean
    return mean, torch.einsum("dri,drj->rij", away, away) / len(outputs)


def cnn(*, smooth: bool = False) -> nn.Sequential:
    """Every kind of layer there is a rule for, on 2 x 7 x 7 inputs."""
    activation = nn.Tanh if smooth else nn.ReLU
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), activation()),
        nn.MaxPool2d(2, stride=1), nn.Conv2d(3, 3, 2, groups=3), nn.SiLU(), nn.AvgPool2d(2), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(3, 4), activation(), nn.Unflatten(1, (4, 1)), nn.AdaptiveAvgPool1d(1), nn.Identity(),
        nn.Flatten(), nn.Linear(4, 3), nn.Softmax(1),
    ).double()  # fmt: skip


def warm(net: nn.Module, x: Tensor) -> nn.Module:
    """Statistics and affine parameters that are not the initial ones, then evaluation mode."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
        net(x)
    return net.eval()


def test_a_linear_unit_with_an_uncertain_input() -> None:
    moments = Moments(torch.tensor([[1.0, 2.0]]), torch.diag(torch.tensor([0.5, 0.25]))[None], True)
    weight, variance = torch.tensor([[3.0, -1.0]]), torch.full((1, 2), 0.1)
    result = propagate_affine(None, moments, weight, None, variance)
    torch.testing.assert_close(result.mean, torch.tensor([[1.0]]))
    torch.testing.assert_close(result.covariance, torch.tensor([[[4.75 + 0.5 + 0.075]]]))
    diagonal = propagate_affine(None, Moments(moments.mean, moments.variance), weight, None, variance)
    torch.testing.assert_close(diagonal.variance, torch.tensor([[5.325]]))


@pytest.mark.parametrize(
    ("mean", "sd", "expected"),
    [
        (1.0, 0.5, (1.004245, 0.240049)),
        (0.0, 1.0, (0.398942, 0.340845)),
        (0.2, 1.0, (0.506895, 0.423696)),
        (-1.0, 0.5, (0.004245, 0.001424)),
    ],
)
def test_a_rectified_normal(mean: float, sd: float, expected: tuple[float, float]) -> None:
    given_moments = Moments(torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[sd**2]], dtype=torch.float64))
    exact = propagate_layer(nn.ReLU(), given_moments, "exact")
    assert exact.mean.item() == pytest.approx(expected[0], abs=1e-6)
    assert exact.variance.item() == pytest.approx(expected[1], abs=1e-6)
    first = propagate_layer(nn.ReLU(), given_moments)
    expected_first = (max(mean, 0.0), sd**2 if mean > 0 else 0.0)
    assert (first.mean.item(), first.variance.item()) == pytest.approx(expected_first, abs=1e-15)


@given(mean=st.floats(-8, 8), log_sd=st.floats(-4, 3))
def test_a_rectified_normal_against_quadrature(mean: float, log_sd: float) -> None:
    sd = math.exp(log_sd)
    law = stats.norm(mean, sd)
    low, high = max(0.0, mean - 12 * sd), max(0.0, mean + 12 * sd)
    first, second = (integrate.quad(lambda z, k=k: z**k * law.pdf(z), low, high, epsabs=1e-13)[0] for k in (1, 2))
    result = propagate_layer(
        nn.ReLU(),
        Moments(torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[sd * sd]], dtype=torch.float64)),
        "exact",
    )
    assert result.mean.item() == pytest.approx(first, rel=1e-6, abs=1e-9 * sd)
    assert result.variance.item() == pytest.approx(second - first**2, rel=1e-5, abs=1e-8 * sd * sd)


def test_covariance_after_an_exact_relu_is_right_for_weak_correlations() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, factor = torch.tensor([0.3, -0.2]).double(), torch.tensor([[1.0, 0.0], [0.1, 0.8]]).double()
    covariance = factor @ factor.T
    draws = (mean + torch.randn(400_000, 2, dtype=torch.float64, generator=generator) @ factor.T).relu()
    result = propagate_layer(nn.ReLU(), Moments(mean[None], covariance[None], True), "exact")
    torch.testing.assert_close(result.covariance[0], draws.T.cov(), rtol=0.02, atol=2e-3)


def test_the_softmax_to_first_order() -> None:
    mean = torch.tensor([[2.0, 0.0, -1.0]]).double()
    covariance = torch.tensor([[0.02, 0.005, 0.0], [0.005, 0.01, 0.0], [0.0, 0.0, 0.03]]).double()
    result = softmax_moments(Moments(mean, covariance[None], True))
    expected = torch.tensor([3.5099e-4, 1.9124e-4, 7.5652e-5]).double()
    torch.testing.assert_close(result.variance[0], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(result.covariance.sum(2), torch.zeros(1, 3).double(), rtol=0, atol=1e-15)
    generator = torch.Generator().manual_seed(0)
    factor = torch.linalg.cholesky(covariance)
    draws = (mean + torch.randn(400_000, 3, dtype=torch.float64, generator=generator) @ factor.T).softmax(1)
    torch.testing.assert_close(draws.var(0), torch.tensor([3.575e-4, 1.932e-4, 7.98e-5]).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(result.variance[0], draws.var(0), rtol=0.06, atol=0)


@pytest.mark.parametrize("covariance", MODES)
def test_a_linear_layer_against_monte_carlo(covariance: str) -> None:
    layer, x, num_draws = nn.Linear(6, 4).double(), torch.randn(1, 6).double(), 400_000
    net = MomentNetwork(nn.Sequential(layer), {f"0.{n}": v for n, v in spread_over(layer).items()}, covariance)
    weights = layer.weight + getattr(net, "0/weight").sqrt() * torch.randn(num_draws, 4, 6).double()
    draws = (weights @ x[0] + layer.bias + getattr(net, "0/bias").sqrt() * torch.randn(num_draws, 4).double()).detach()
    with torch.no_grad():
        result = net(x)
    size = draws.var(0).mean()
    torch.testing.assert_close(result.covariance[0], draws.T.cov(), rtol=0.02, atol=0.02 * float(size))


LINEAR_CHAINS = {
    "linear": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False), nn.Linear(1, 2)), (2,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), (3, 2)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Conv1d(2, 1, 2, padding=1)), (1, 4)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(1, 2, (1, 2), stride=2, padding=1), nn.AvgPool2d(2, 1), nn.Flatten(),
                                     nn.Linear(4, 1)), (1, 3, 2)),
    "depthwise": (lambda: nn.Sequential(nn.Conv1d(1, 2, 1), nn.Conv1d(2, 4, 2, groups=2)), (1, 3)),
    "norm": (lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(4, 1)), (1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR_CHAINS)
def test_full_covariance_is_exact_for_linear_networks(name: str) -> None:
    """The rule knows means and variances only, so any law that has them must give its moments: here a discrete one."""
    build, shape = LINEAR_CHAINS[name]
    net = build().double().eval()
    x = torch.randn(2, *shape).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    variances = spread_over(net)
    mean, covariance = enumerate_moments(net, variances, x)
    with torch.no_grad():
        result = MomentNetwork(net, variances, "full")(x)
    torch.testing.assert_close(result.mean.flatten(1), mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.covariance, covariance, rtol=1e-10, atol=1e-10)


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 3))
def test_full_covariance_is_exact_for_any_small_linear_network(seed: int, rows: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)).double()
    variances, x = spread_over(net, 0.0, 2.0), torch.randn(rows, 2).double()
    mean, covariance = enumerate_moments(net, variances, x)
    with torch.no_grad():
        result = MomentNetwork(net, variances, "full")(x)
    torch.testing.assert_close(result.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.covariance, covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Tanh(), nn.ReLU(),
     nn.Flatten(), nn.AdaptiveAvgPool2d(2), nn.Linear(6, 2)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_diagonal_rules_keep_the_diagonal_of_full_ones_for_uncorrelated_inputs(layer: nn.Module, rule: str) -> None:
    layer = copy.deepcopy(layer).double().eval()
    variances = list(spread_over(layer).values())
    mean, variance = torch.randn(2, 3, 4, 6).double(), torch.rand(2, 3, 4, 6).double()
    full = propagate_layer(layer, Moments(mean, torch.diag_embed(variance.flatten(1)), True), rule, *variances)
    diagonal = propagate_layer(layer, Moments(mean, variance), rule, *variances)
    torch.testing.assert_close(full.mean, diagonal.mean)
    torch.testing.assert_close(full.variance, diagonal.variance)


@pytest.mark.parametrize("covariance", MODES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("smooth", [False, True])
def test_known_weights_give_the_plain_network(covariance: str, rule: str, smooth: bool) -> None:
    x = torch.randn(3, 2, 7, 7).double()
    net = warm(cnn(smooth=smooth), x)
    with torch.no_grad():
        expected = net(x)
        for variances in ({}, {name: torch.zeros_like(p) for name, p in net.named_parameters()}):
            result = MomentNetwork(net, variances, covariance, rule)(x)
            torch.testing.assert_close(result.mean, expected, rtol=1e-12, atol=1e-12)
            assert float(result.variance.abs().max()) == 0.0
        tiny = {name: torch.full_like(p, 1e-16) for name, p in net.named_parameters()}
        result = MomentNetwork(net, tiny, covariance, rule)(x)
        torch.testing.assert_close(result.mean, expected, rtol=1e-5, atol=1e-6)
        assert 0 < float(result.variance.max()) < 1e-10


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=20)
@given(seed=st.integers(0, 1000), size=st.floats(-3, 1))
def test_covariances_are_symmetric_and_positive_semidefinite(rule: str, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 2, 7, 7).double()
    net = warm(cnn(), x)
    for depth in (1, 5, 12, len(net)):
        part = net[:depth]
        with torch.no_grad():
            result = MomentNetwork(part, spread_over(part, 0.0, 10**size), "full", rule)(x).covariance
        torch.testing.assert_close(result, result.transpose(1, 2), rtol=1e-9, atol=1e-12)
        eigenvalues = torch.linalg.eigvalsh(result)
        assert float(eigenvalues.min()) >= -1e-9 * max(float(eigenvalues.max()), 1e-12)


def test_a_network_close_to_monte_carlo_where_noise_is_small() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 2, 7, 7).double()
    net = warm(cnn(smooth=True), x)
    variances = {n: torch.full_like(p, 1e-4) for n, p in net.named_parameters()}
    with torch.no_grad():
        draws = torch.func.vmap(lambda values: functional_call(net, values, (x,)))(
            {n: p + 1e-2 * torch.randn(4000, *p.shape).double() for n, p in net.named_parameters()}
        )
        result = MomentNetwork(net, variances, "full")(x)
    expected = torch.stack([draws[:, row].T.cov() for row in range(2)])
    assert float((result.covariance - expected).norm() / expected.norm()) < 0.08
    torch.testing.assert_close(result.mean, draws.mean(0), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, stride=1, padding=1), nn.MaxPool1d(2)])
def test_max_pooling_takes_over_the_entries_that_are_largest_in_the_mean(pool: nn.Module) -> None:
    """All means differ, so that an entry is known by its mean."""
    mean = torch.randperm(2 * 3 * 16).double().reshape(2, 3, *((16,) if isinstance(pool, nn.MaxPool1d) else (4, 4)))
    factor = torch.randn(2, 48, 48).double()
    covariance = factor @ factor.transpose(1, 2)
    full = propagate_layer(pool, Moments(mean, covariance, True))
    diagonal = propagate_layer(pool, Moments(mean, covariance.diagonal(dim1=1, dim2=2).reshape(mean.shape)))
    torch.testing.assert_close(full.mean, pool(mean))
    for row in range(2):
        came_from = [mean[row].flatten().tolist().index(value) for value in pool(mean)[row].flatten().tolist()]
        expected = covariance[row][came_from][:, came_from]
        assert torch.equal(full.covariance[row], expected)
        assert torch.equal(diagonal.variance[row].flatten(), expected.diagonal())


def test_the_softmax_layer_is_the_softmax() -> None:
    moments = Moments(torch.randn(2, 3), torch.rand(2, 3))
    layer = propagate_layer(nn.Softmax(1), moments)
    torch.testing.assert_close(layer.variance, softmax_moments(moments).variance)


def test_dropout_in_training_adds_the_variance_of_its_mask() -> None:
    layer, mean, variance = nn.Dropout(0.3), torch.tensor([[2.0]]), torch.tensor([[0.5]])
    masks, draws = torch.rand(400_000) >= 0.3, 2.0 + 0.5**0.5 * torch.randn(400_000)
    expected = (masks * draws / 0.7).var()
    for moments in (Moments(mean, variance), Moments(mean, variance[None], True)):
        result = propagate_layer(layer, moments)
        torch.testing.assert_close(result.variance[0, 0], expected, rtol=0.02, atol=0)
        assert torch.equal(propagate_layer(layer.eval(), moments).variance, moments.variance)
        layer.train()


def test_batch_norm_in_training_uses_and_updates_the_statistics_of_the_means() -> None:
    moments = Moments(torch.randn(6, 3, 4), torch.rand(6, 3, 4))
    ours, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    result = propagate_layer(ours, moments)
    torch.testing.assert_close(result.mean, plain(moments.mean))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    ratio = moments.mean.var((0, 2), unbiased=False) + plain.eps
    torch.testing.assert_close(result.variance, moments.variance / ratio.reshape(1, 3, 1))


@pytest.mark.parametrize("covariance", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_finite(covariance: str, rule: str) -> None:
    net = cnn().float().train()
    x = torch.randn(3, 2, 7, 7)
    x[0] = 0
    variances = {name: v.float().requires_grad_() for name, v in spread_over(net).items()}
    result = propagate_chain(net, Moments(x, None, covariance == "full"), rule, variances)
    (result.mean[:, 0].sum() + result.covariance.square().sum()).backward()
    for tensor in (*net.parameters(), *variances.values()):
        assert tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


@pytest.mark.parametrize("layer", [Residual(), nn.Softmax(2), nn.AvgPool2d(2, padding=1), nn.AdaptiveAvgPool2d(2)])
def test_what_has_no_rule_is_refused(layer: nn.Module) -> None:
    with pytest.raises(GroupError, match="no rule.*Sequential.*draws"):
        propagate_chain(nn.Sequential(layer), Moments(torch.randn(1, 2, 3, 3), torch.rand(1, 2, 3, 3)))


def test_a_moment_network_saves_its_variances(tmp_path: object) -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    first = MomentNetwork(net, spread_over(net), "full")
    second = MomentNetwork(nn.Sequential(nn.Linear(3, 2)), spread_over(net), "full")
    torch.save(first.state_dict(), f"{tmp_path}/net.pt")
    second.load_state_dict(torch.load(f"{tmp_path}/net.pt", weights_only=True))
    x = torch.randn(2, 3)
    np.testing.assert_array_equal(*(n(x).covariance.detach().numpy() for n in (first, second)))
