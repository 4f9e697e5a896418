"""The lifted network computes the network, and local draws have the moments of weight draws."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrobc.calling import call_network
from pyrobc.errors import ConfigError, FamilyError
from pyrobc.family import Effective
from pyrobc.fit import fit
from pyrobc.groups import Member
from pyrobc.lift import LiftedModel, lift
from pyrobc.lifted_layers import LayerLaw, LiftedLayer
from pyrobc.models.mlp import build
from pyrobc.slicing import mask_groups

STANDARD_ERRORS = 4.5  # many elements at once


def vision() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 5)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, 4)).double(), torch.randn(6, 2, 6, 6).double()


def effective_of(model: LiftedModel, gates: dict[str, Tensor] | None = None, **kwargs: Any) -> Effective:
    parameters = {n: p.detach() for n, p in model.template.named_parameters() if n in model.spec.parameters}
    ones = {b.name: torch.ones(b.size).double() for b in model.spec.blocks}
    return Effective(ones | (gates or {}), parameters, **kwargs)


def perturb(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p + torch.randn_like(p) for n, p in parameters.items()}


@pytest.mark.parametrize("is_training", [True, False])
def test_with_gates_of_one_the_lifted_network_is_the_network(is_training: bool) -> None:
    net, x = vision()
    model = lift(net.train(is_training), "log_uniform", "categorical", x[:2]).train(is_training)
    torch.testing.assert_close(model.run(effective_of(model), x), net(x), rtol=1e-12, atol=1e-12)


def test_gates_of_zero_are_masked_groups() -> None:
    net, x = vision()
    model = lift(net, "log_uniform", "categorical", x[:2]).eval()
    gates = {"0": torch.tensor([1.0, 0.0, 1.0]).double(), "5": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).double()}
    masked = mask_groups(net.eval(), model.spec, {"0": np.array([0, 2]), "5": np.array([1, 2, 4])})
    torch.testing.assert_close(model.run(effective_of(model, gates), x), masked(x), rtol=1e-12, atol=1e-12)


def test_gates_and_parameters_fold_into_a_plain_module() -> None:
    net, x = vision()
    model = lift(net, "log_uniform", "categorical", x[:2]).eval()
    effective = effective_of(model, {b.name: torch.rand(b.size).double() for b in model.spec.blocks})
    effective = Effective(effective.gates, perturb(dict(effective.parameters)))
    plain = model.to_module(effective)
    assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()] and not plain.training
    torch.testing.assert_close(plain(x), model.run(effective, x), rtol=1e-12, atol=1e-12)


def test_gates_per_example_equal_a_loop_over_examples() -> None:
    net, x = vision()
    model = lift(net, "log_uniform", "categorical", x[:2]).eval()
    per_example = {b.name: torch.rand(len(x), b.size).double() for b in model.spec.blocks}
    together = model.run(effective_of(model, per_example), x)
    for i in range(len(x)):
        alone = model.run(effective_of(model, {n: g[i] for n, g in per_example.items()}), x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_fewer_draws_than_examples_serve_equal_runs_of_them(draws: int) -> None:
    net, x = vision()
    model = lift(net, "log_uniform", "categorical", x[:2]).eval()
    gates = {b.name: torch.rand(draws, b.size).double() for b in model.spec.blocks}
    run = torch.arange(len(x)) * draws // len(x)
    expected = model.run(effective_of(model, {n: g[run] for n, g in gates.items()}), x)
    torch.testing.assert_close(model.run(effective_of(model, gates), x), expected)
    assert set(run.tolist()) == set(range(draws))


def test_gates_on_sequences_belong_to_the_last_axis() -> None:
    x = torch.randn(4, 3, 5).double()
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    model = lift(net, "log_uniform", "normal", x[:1])
    gates = {b.name: torch.rand(4, b.size).double() for b in model.spec.blocks}
    together = model.run(effective_of(model, gates), x)
    for i in range(4):
        alone = model.run(effective_of(model, {n: g[i] for n, g in gates.items()}), x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "linear on sequences": (lambda: nn.Linear(4, 3, bias=False), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 2, stride=2), (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3, padding=1), (2, 4, 3, 3)),
    "circular conv2d": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 4, 4)),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_noise_on_pre_activations_has_the_moments_of_noise_on_weights(kind: str) -> None:
    """Mean and variance of every pre-activation against a naive twin that draws the weights many times."""
    make, shape = LAYERS[kind]
    plain = make().double()
    h = torch.randn(shape).double()
    size = plain.weight.shape[1]
    member = Member("weight", 1, "consume", np.arange(size + 1), np.arange(size))
    is_gated = size > 1
    consumed = [("input", member)] if is_gated else []
    layer = LiftedLayer(copy.deepcopy(plain), consumed, frozen=(False, False))
    gate = torch.rand(size).double() if is_gated else torch.ones(1).double()
    mean, variance = plain.weight.detach().clone(), torch.rand_like(plain.weight)
    bias = None if plain.bias is None else plain.bias.detach().clone()
    bias_variance = None if bias is None else torch.rand_like(bias)
    layer.law = LayerLaw({"input": gate}, mean, bias, variance, bias_variance)
    draws = 2000
    with torch.no_grad():
        local = torch.stack([layer(h) for _ in range(draws)])
        twin = []
        for _ in range(draws):
            plain.weight.copy_(
                (mean + variance.sqrt() * torch.randn_like(mean)) * gate.reshape(1, -1, *[1] * (mean.dim() - 2))
            )
            if plain.bias is not None and bias is not None and bias_variance is not None:
                plain.bias.copy_(bias + bias_variance.sqrt() * torch.randn_like(bias))
            twin.append(plain(h))
    weights = torch.stack(twin)
    for a, b in ((local, weights), ((local - weights.mean(0)) ** 2, (weights - weights.mean(0)) ** 2)):
        se = ((a.var(0) + b.var(0)) / draws).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() <= STANDARD_ERRORS * se).all())
    assert float(weights.var(0).min()) > 0


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.same = nn.Linear(3, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.same(self.first(x)))


def repeated(width: int) -> nn.Module:
    same = nn.Linear(width, width, bias=False)
    return nn.Sequential(nn.Linear(3, width), same, same)


def tied(width: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(3, width), nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False))
    net[2].weight = net[1].weight
    return net


SHARED = [Twice, repeated, tied]


@pytest.mark.parametrize("make", SHARED)
def test_shared_weights_stay_shared(make: Any) -> None:
    net, x = make(4).double(), torch.randn(5, 3).double()
    model = lift(net, "log_uniform", "categorical", x)
    effective = effective_of(model)
    effective = Effective(effective.gates, perturb(dict(effective.parameters)))
    plain = copy.deepcopy(net)
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            tensor.copy_(effective.parameters[name])
    torch.testing.assert_close(model.run(effective, x), plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.to_module(effective)(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", SHARED)
def test_uses_of_a_shared_weight_share_its_noise(make: Any) -> None:
    """Of width one the network is ``w^2 h``: never negative, unless each use draws a weight of its own."""
    net, x = make(1).double(), torch.ones(1, 3).double()
    model = lift(net, "group_horseshoe", "categorical", x)
    (shared,) = set(model.spec.parameters) - {n for n in model.spec.parameters if n.startswith(("0", "first"))}
    mean = effective_of(model).parameters
    first = {n: torch.ones_like(p) for n, p in mean.items() if n != shared}
    effective = Effective(
        effective_of(model).gates, first | {shared: torch.zeros(1, 1).double()}, {shared: torch.ones(1, 1).double()}
    )
    outputs = torch.stack([model.run(effective, x) for _ in range(50)])
    assert float(outputs.min()) >= 0 and len(outputs.unique()) == 50


def test_frozen_layers_keep_their_values_and_have_no_sites() -> None:
    net, x = vision()
    net[5].weight.requires_grad_(False)
    net[1].requires_grad_(False)
    model = lift(net, "group_horseshoe", "categorical", x[:2])
    assert {"5.weight", "1.weight", "1.bias"}.isdisjoint(model.priors())
    posterior = fit(model, (x, torch.tensor([0, 1, 2, 3, 0, 1])), epochs=2, progress=False)
    assert {b: t.shape for b, t in posterior.thresholds(1e-2).items()} == {"0": (3,), "5": (5,)}
    plain = posterior.to_module()
    torch.testing.assert_close(plain[1].weight, net[1].weight)
    gate = posterior.mean().gates["0"].repeat_interleave(4)
    torch.testing.assert_close(plain[5].weight, net[5].weight * gate)


def test_dict_and_tuple_inputs_reach_the_network() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(2, 3), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"logits": self.out(torch.relu(self.a(left) + self.b(right)))}

    net, left, right = Two(), torch.randn(6, 2), torch.randn(6, 4)
    y = torch.randint(0, 2, (6,))
    for inputs in ((left, right), {"left": left, "right": right}):
        model = lift(net, "group_horseshoe", "categorical", inputs)
        outputs = model.run(model.family.mean(model.new_guide().distributions(), model.spec), inputs)
        assert outputs.shape == (6, 2) and model(inputs, y).shape == (6,)
        posterior = fit(model, [(inputs, y)], epochs=2, progress=False)
        assert call_network(posterior.to_module(), inputs)["logits"].shape == (6, 2)


def test_restricting_keeps_the_groups_that_are_left() -> None:
    """Even where tracing anew would find others: a depthwise convolution with one channel is an ordinary one."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(12, 2)).double()  # fmt: skip
    x = torch.randn(4, 1, 4, 4).double()
    posterior = fit(
        lift(net, "group_horseshoe", "categorical", x), (x, torch.tensor([0, 1, 0, 1])), epochs=1, progress=False
    )
    small = posterior.restricted({"0": np.array([1])})
    assert {b.name: b.size for b in small.model.spec.blocks} == {"0": 1}
    assert small.guide.distributions().keys() == small.model.priors().keys()
    again = fit(small.model, (x, torch.tensor([0, 1, 0, 1])), epochs=1, guide=small.guide, progress=False)
    assert np.isfinite(again.history[0]["elbo"])


def test_restricting_follows_the_dtype_of_the_fit() -> None:
    x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
    model = lift(build(4, (3,), 2), "log_uniform", "categorical", x[:1])
    posterior = fit(model, (x, y), epochs=1, dtype=torch.float64, progress=False)
    small = posterior.restricted({"input": np.array([0, 3]), "1": np.array([2])})
    assert small.to_module()(x.double()).dtype == torch.float64
    assert small.input_rms["1.weight"].shape == (2,)


def test_unknown_names_suggest_the_nearest() -> None:
    x = torch.zeros(1, 4)
    with pytest.raises(FamilyError, match="did you mean 'log_uniform'"):
        lift(build(4, (3,), 2), "loguniform", "categorical", x)
    with pytest.raises(ConfigError, match="did you mean 'categorical'"):
        lift(build(4, (3,), 2), "log_uniform", "categorial", x)


def test_a_frozen_weight_leaves_its_bias_the_noise_it_has() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight.requires_grad_(False)
    model = lift(net, "group_normal_jeffreys", "categorical", torch.randn(2, 3))
    guide = model.new_guide()
    with torch.no_grad():
        guide.by_site()["2.bias"].log_scale.fill_(1.0)
        effective = model.family.draw_local(guide.distributions(), model.spec, 6)
        outputs = torch.stack([model.run(effective, torch.zeros(6, 3)) for _ in range(400)])
    assert float(outputs.std(0).mean()) == pytest.approx(math.e, rel=0.15)
