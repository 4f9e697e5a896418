"""The expected share of parameters, by enumeration of gates, and fits that reach a target."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from pyrobc.density import TargetDensity, expected_density
from pyrobc.dists import Switch
from pyrobc.errors import ConfigError, FamilyError
from pyrobc.fit import fit
from pyrobc.lift import LiftedModel, lift
from pyrobc.models.mlp import build

GATED = ("spike_and_slab_lasso", "spike_and_slab_horseshoe", "gumbel_softmax")


def conv_net() -> nn.Module:
    """A flatten that owns four features a channel, and a batch norm whose statistics are not trained."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


def enumerate_density(model: LiftedModel, probabilities: dict[str, torch.Tensor]) -> float:
    """Mean over all states of the gates of what surgery would leave."""
    spec, total = model.spec, 0.0
    flat = np.concatenate([probabilities[b.name].numpy() for b in spec.blocks])
    for state in itertools.product([0, 1], repeat=len(flat)):
        weight = float(np.prod(np.where(state, flat, 1 - flat)))
        parts = np.split(np.array(state), np.cumsum([b.size for b in spec.blocks])[:-1])
        kept = {b.name: np.flatnonzero(part) for b, part in zip(spec.blocks, parts, strict=True)}
        count = 0
        indices = spec.kept_indices(kept)
        for name, info in spec.parameters.items():
            sides = [len(indices[name, a]) if (name, a) in indices else n for a, n in enumerate(info.shape)]
            count += math.prod(sides)
        total += weight * count
    return total / sum(math.prod(info.shape) for info in spec.parameters.values())


@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_the_density_is_the_mean_over_all_states_of_the_gates(family: str, network: str) -> None:
    net, x = (build(3, (4, 2), 2), torch.randn(2, 3)) if network == "mlp" else (conv_net(), torch.randn(2, 1, 4, 4))
    model = lift(net.double(), family, "categorical", x.double())
    guide = model.new_guide()
    probabilities = {}
    with torch.no_grad():
        for block in model.spec.blocks:
            site = guide.by_site()[f"{block.name}.gate"]
            site.log_odds.copy_(torch.randn(block.size))
            probabilities[block.name] = torch.sigmoid(site.log_odds)
    found = expected_density(model, guide)
    assert float(found.detach()) == pytest.approx(enumerate_density(model, probabilities), rel=1e-12)
    found.backward()
    assert all(bool((guide.by_site()[f"{b.name}.gate"].log_odds.grad > 0).all()) for b in model.spec.blocks)


def some_rows() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1] > 0).long()


@pytest.mark.parametrize("target", [0.15, 0.5])
@pytest.mark.parametrize("family", ["gumbel_softmax", "log_uniform"])
def test_a_fit_ends_at_its_target(family: str, target: float) -> None:
    torch.manual_seed(0)
    model = lift(build(8, (24, 24), 2), family, "categorical", torch.randn(1, 8), prune_inputs=False)
    loss = TargetDensity(target, strength=5.0, keeps_kl=False)
    posterior = fit(model, some_rows(), epochs=60, lr=0.05, batch_size=64, path=loss, progress=False)
    assert float(expected_density(posterior.model, posterior.guide).detach()) == pytest.approx(target, abs=0.06)


def test_what_has_no_gates_or_no_target_is_refused() -> None:
    model = lift(build(8, (6,), 2), "group_horseshoe", "categorical", torch.randn(1, 8))
    with pytest.raises(FamilyError, match=r"'group_horseshoe' with a target density: got .*gates.*budget"):
        fit(model, some_rows(), epochs=1, path=TargetDensity(0.5), progress=False)
    with pytest.raises(ConfigError, match="target=1.5"):
        TargetDensity(1.5)


def test_two_logits_with_gumbel_noise_are_one_switch() -> None:
    """The published gate, drawn from torch's own Gumbel-softmax, against ours: probabilities, and mean gradients."""
    temperature, draws = 3.0, 400_000
    logits = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    hard = nn.functional.gumbel_softmax(logits.expand(draws, 2), tau=temperature, hard=True)[:, 0]
    hard.mean().backward()
    assert logits.grad is not None
    odds = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    drawn = Switch(odds, torch.tensor(-6.0, dtype=torch.float64), temperature).rsample(torch.Size([draws]))
    drawn.mean().backward()
    assert odds.grad is not None
    se = math.sqrt(0.25 / draws)
    assert float(hard.detach().mean()) == pytest.approx(1 / (1 + math.exp(-1.1)), abs=4 * se)
    assert float((drawn > 0).double().mean()) == pytest.approx(1 / (1 + math.exp(-1.1)), abs=4 * se)
    assert float(odds.grad) == pytest.approx(float(logits.grad[0]), rel=5e-3)
    assert float(logits.grad[1]) == pytest.approx(-float(logits.grad[0]), rel=1e-9)
