"""Groups without a reader or an input leave, and the mean network computes what it computed before."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pyrobc.dead_units import remove_dead_units
from pyrobc.folding import fold_scales
from pyrobc.gridding import move_to_grid
from pyrobc.lift import lift
from pyrobc.meanfield import NormalFactor
from pyrobc.posterior import Posterior
from pyrobc.slicing import slice_groups
from pyrobc.weights import count_weights


class Residual(nn.Module):
    """Two layers that make the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.inner(h)))


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 4), activation, nn.Linear(4, 2))


def convolutional(padding: Any = 0) -> nn.Module:
    size = 6 if padding in (1, "same") else 2
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=padding), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=padding), nn.Tanh(),
                         nn.Flatten(), nn.Linear(4 * size**2, 3), nn.Sigmoid(), nn.Linear(3, 2))  # fmt: skip


def normalised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False),
                         nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 2))  # fmt: skip


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "relu": (lambda: mlp(nn.ReLU()), (5,)),
    "tanh": (lambda: mlp(nn.Tanh()), (5,)),
    "residual": (Residual, (5,)),
    "convolutions": (convolutional, (1, 6, 6)),
    "valid": (lambda: convolutional("valid"), (1, 6, 6)),
    "padded": (lambda: convolutional(1), (1, 6, 6)),
    "same": (lambda: convolutional("same"), (1, 6, 6)),
    "batch norm": (normalised, (1, 6, 6)),
}


def folded(name: str) -> tuple[Posterior, Tensor]:
    torch.manual_seed(4)
    make, shape = NETWORKS[name]
    model = lift(make(), "group_normal_jeffreys", "normal", torch.zeros(2, *shape))
    for key, buffer in model.net.named_buffers():
        if key.endswith("running_mean"):
            buffer.uniform_(-1.0, 1.0)
    guide = model.new_guide()
    with torch.no_grad():
        for key, parameter in guide.named_parameters():
            parameter.add_(0.5 * torch.randn_like(parameter) * (not key.endswith("log_scale")))
    return fold_scales(Posterior(model, guide, num_data=8)), torch.randn(8, *shape)


START = {name: folded(name) for name in NETWORKS}


def delete(posterior: Posterior, seed: int, share: float, lines: float) -> None:
    """Single weights at random, and whole rows and columns besides."""
    generator = torch.Generator().manual_seed(seed)
    for factor in posterior.guide.by_site().values():
        if isinstance(factor, NormalFactor):
            kept = torch.rand(factor.kept.shape, generator=generator) >= share
            for axis in range(min(2, kept.dim()) if kept.dim() > 1 else 0):
                gone = torch.rand(kept.shape[axis], generator=generator) < lines
                kept &= ~gone.reshape([-1 if a == axis else 1 for a in range(kept.dim())])
            factor.keep_(kept)


def outputs(posterior: Posterior, x: Tensor) -> Tensor:
    with torch.no_grad():
        return posterior.to_module()(x)


def sizes(posterior: Posterior) -> dict[str, int]:
    return {block.name: block.size for block in posterior.model.spec.blocks}


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.3, 0.7, 0.95]),
    lines=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
)
def test_outputs_stay_whatever_is_deleted(name: str, seed: int, share: float, lines: float) -> None:
    start, x = START[name]
    posterior = start.copy()
    delete(posterior, seed, share, lines)
    before = {n: t.clone() for n, t in posterior.guide.state_dict().items()}
    small = remove_dead_units(posterior, (x, x))
    torch.testing.assert_close(outputs(small, x), outputs(posterior, x), rtol=1e-5, atol=1e-5)
    other = 3 * torch.randn_like(x)
    torch.testing.assert_close(outputs(small, other), outputs(posterior, other), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[n], t) for n, t in posterior.guide.state_dict().items()), "changed in place"
    assert count_weights(small)[0] <= count_weights(posterior)[0], "biases that come back cost more than what leaves"
    assert remove_dead_units(small, (x, x)) is small, "once is enough"
    spec = start.model.spec
    origin = {b.name: np.arange(b.size) if b.origin is None else b.origin for b in small.model.spec.blocks}
    shapes = {n: p.shape for n, p in slice_groups(start.to_module(), spec, origin).named_parameters()}
    assert shapes == {n: p.shape for n, p in small.to_module().named_parameters()}, "groups know where they came from"


def masked(name: str, masks: dict[str, Tensor]) -> tuple[Posterior, Tensor]:
    posterior, x = START[name]
    posterior = posterior.copy()
    for site, kept in masks.items():
        factor = posterior.guide.by_site()[site]
        assert isinstance(factor, NormalFactor)
        factor.keep_(kept)
    return posterior, x


def without(shape: tuple[int, ...], axis: int, *lines: int) -> Tensor:
    kept = torch.ones(shape, dtype=torch.bool)
    kept.index_fill_(axis, torch.tensor(lines), False)
    return kept


def test_nothing_dead_nothing_done() -> None:
    posterior, x = START["relu"]
    assert remove_dead_units(posterior, (x, x)) is posterior


def test_unread_and_silent_units_leave_and_a_chain_of_them_too() -> None:
    posterior, x = masked("tanh", {"2.weight": without((4, 6), 0, 1), "4.weight": without((2, 4), 1, 3)})
    small = remove_dead_units(posterior, (x, x))
    assert sizes(small) == {"input": 5, "0": 6, "2": 2}
    assert small.model.spec.block("2").origin.tolist() == [0, 2]
    # unit 0 of the first layer is read by unit 3 alone, which nobody reads
    alone = without((4, 6), 1, 0)
    alone[3, 0] = True
    posterior, x = masked("tanh", {"2.weight": alone, "4.weight": without((2, 4), 1, 3)})
    assert sizes(remove_dead_units(posterior, (x, x))) == {"input": 5, "0": 5, "2": 3}


def test_deleted_biases_come_back_with_what_a_silent_unit_said() -> None:
    silent = {"2.weight": without((4, 6), 0, 1), "4.bias": torch.zeros(2, dtype=torch.bool)}
    posterior, x = masked("tanh", silent)
    small = remove_dead_units(posterior, (x, x))
    bias = small.guide.by_site()["4.bias"]
    assert isinstance(bias, NormalFactor) and bool(bias.kept.all()) and bool((bias.loc != 0).all())
    torch.testing.assert_close(outputs(small, x), outputs(posterior, x), rtol=1e-5, atol=1e-6)
    # relu of a deleted bias is zero: nothing to take over, and the bias stays deleted
    silent["2.bias"] = torch.zeros(4, dtype=torch.bool)
    posterior, x = masked("relu", silent)
    small = remove_dead_units(posterior, (x, x))
    assert sizes(small)["2"] == 3 and not bool(small.guide.by_site()["4.bias"].kept.any())


def test_a_silent_channel_stays_where_the_reader_pads_or_has_no_bias() -> None:
    silent = {"0.weight": without((3, 1, 3, 3), 0, 1)}
    for name, left in (("convolutions", 2), ("valid", 2), ("padded", 3), ("same", 3), ("batch norm", 3)):
        posterior, x = masked(name, silent)
        bias = posterior.guide.by_site()["1.bias" if name == "batch norm" else "0.bias"]
        assert isinstance(bias, NormalFactor)
        bias.loc.data.fill_(3.0)  # so that the channel says something
        assert sizes(remove_dead_units(posterior, (x, x)))["0"] == left, name
    silent["0.bias"] = torch.zeros(3, dtype=torch.bool)
    for name in ("padded", "same"):  # zero is what padding says as well
        posterior, x = masked(name, silent)
        assert sizes(remove_dead_units(posterior, (x, x)))["0"] == 2, name


@pytest.mark.parametrize("name", ["relu", "convolutions", "residual"])
def test_a_layer_that_is_empty_keeps_one_channel(name: str) -> None:
    posterior, x = START[name]
    sites = posterior.model.spec.parameters
    for site in [n for n, info in sites.items() if info.kind == "weight"]:
        empty, x = masked(name, {site: torch.zeros(sites[site].shape, dtype=torch.bool)})
        small = remove_dead_units(empty, (x, x))
        if name != "residual":  # whose channels have two sources and two readers
            assert min(sizes(small).values()) == 1
        torch.testing.assert_close(outputs(small, x), outputs(empty, x), rtol=1e-5, atol=1e-5)
        assert remove_dead_units(small, (x, x)) is small
    nothing, x = masked(name, {n: torch.zeros(info.shape, dtype=torch.bool) for n, info in sites.items()})
    small = remove_dead_units(nothing, (x, x))
    assert set(sizes(small).values()) == {1} and not bool(outputs(small, x).any())


def test_a_bias_on_a_grid_takes_nothing_over() -> None:
    posterior, x = masked("tanh", {"2.weight": without((4, 6), 0, 1)})
    gridded = move_to_grid(posterior, 1.0)
    assert remove_dead_units(gridded, (x, x)) is gridded
    assert sizes(remove_dead_units(posterior, (x, x)))["2"] == 3


def test_a_loader_is_read_without_touching_the_random_state() -> None:
    posterior, x = masked("tanh", {"2.weight": without((4, 6), 0, 1)})
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    small, again = (remove_dead_units(posterior, loader) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    a, b = small.guide.state_dict(), again.guide.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
