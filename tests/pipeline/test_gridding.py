"""Means on grids: exact multiples of a half-precision step, steps as derived, gradients as said, bytes without loss."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrobc import codec
from pyrobc.errors import ConfigError
from pyrobc.fit import fit
from pyrobc.folding import fold_scales
from pyrobc.gridding import GridFactor, move_to_grid, read_steps
from pyrobc.lift import lift
from pyrobc.meanfield import NormalFactor
from pyrobc.posterior import Posterior

DATA = torch.randn(60, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(60) % 3
TENSORS = ("0.weight", "0.bias", "4.weight", "4.bias")


def pruned() -> Posterior:
    """A small convolutional network with batch norm, folded, a third of its weights deleted."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model = lift(net, "group_normal_jeffreys", "categorical", DATA[0][:2])
    posterior = fold_scales(fit(model, DATA, epochs=2, lr=2e-2, progress=False))
    with torch.no_grad():  # tensors that are known differently well
        posterior.guide.by_site()["4.weight"].log_scale += 2 * torch.rand(3, 64) - 0.5
    for factor in posterior.guide.by_site().values():
        if isinstance(factor, NormalFactor):
            factor.keep_(torch.rand(factor.kept.shape) < 0.67)
    return posterior


@pytest.fixture(scope="module")
def start() -> Posterior:
    return pruned()


@pytest.fixture(scope="module")
def gridded(start: Posterior) -> Posterior:
    moved = move_to_grid(start, 2.0, 1.0)
    return fit(moved.model, DATA, epochs=3, lr=1e-2, guide=moved.guide, progress=False)


def grids(posterior: Posterior) -> dict[str, GridFactor]:
    return {n: f for n, f in posterior.guide.by_site().items() if isinstance(f, GridFactor)}


def test_steps_are_so_many_harmonic_mean_deviations(start: Posterior) -> None:
    steps = read_steps(move_to_grid(start, 2.5, 0.5))
    assert steps.keys() == set(TENSORS), "normalisation stays as it is"
    for name, step in steps.items():
        factor = start.guide.by_site()[name]
        assert isinstance(factor, NormalFactor)
        precision = (-2 * factor.log_scale.detach().double()).exp()[factor.kept].mean()
        width = (0.5 if name.endswith("bias") else 2.5) / math.sqrt(float(precision))
        assert step == pytest.approx(width, rel=2**-11)
        assert step == float(torch.tensor(step).half()), "two bytes hold it"
    same = read_steps(move_to_grid(start, 2.5))
    assert same["4.bias"] == pytest.approx(5 * steps["4.bias"], rel=2**-10)


def test_steps_meet_the_condition_for_the_cheapest(start: Posterior) -> None:
    """One exchange rate of nats for bits: the mean of (step / deviation)^2 is the same in every tensor."""
    for name, step in read_steps(move_to_grid(start, 2.0)).items():
        factor = start.guide.by_site()[name]
        assert isinstance(factor, NormalFactor)
        ratio = step**2 * (-2 * factor.log_scale.detach()).exp()[factor.kept]
        assert float(ratio.mean()) == pytest.approx(4.0, rel=2e-3)


def test_means_are_exact_multiples_after_fitting(start: Posterior, gridded: Posterior) -> None:
    first, steps = read_steps(move_to_grid(start, 2.0, 1.0)), read_steps(gridded)
    assert steps != first, "steps learn"
    state, laws = gridded.to_module().state_dict(), gridded.laws()
    for name, factor in grids(gridded).items():
        step = torch.tensor(steps[name])
        assert torch.equal(step, step.half().float())
        integers = (state[name] / step).round()
        assert torch.equal(integers * step, state[name]) and float(integers.abs().max()) < 2**13
        assert torch.equal(state[name], laws[name].mean.detach())
        assert not bool(state[name][~factor.kept].any())
        assert bool((laws[name].variance[factor.kept] > 0).all()), "the noise stays"
        assert float((state[name] - factor.loc.detach())[factor.kept].abs().max()) <= steps[name]
        assert not torch.equal(factor.loc, grids(move_to_grid(start, 2.0))[name].loc), "the means are fitted"


def test_moving_does_not_change_what_is_moved(start: Posterior) -> None:
    before = {n: t.clone() for n, t in start.guide.state_dict().items()}
    moved = move_to_grid(start, 2.0)
    fit(moved.model, DATA, epochs=1, lr=0.1, guide=moved.guide, progress=False)
    assert all(torch.equal(before[n], t) for n, t in start.guide.state_dict().items())
    assert read_steps(start) == {}


def test_files_hold_the_very_numbers(gridded: Posterior, tmp_path: Path) -> None:
    net = gridded.to_module()
    codec.pack(net, tmp_path / "x.rbc", steps=read_steps(gridded))
    back = codec.unpack(tmp_path / "x.rbc")
    expected, got = net.state_dict(), back.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    plain = codec.pack(net, tmp_path / "plain.rbc").num_bytes
    assert (tmp_path / "x.rbc").stat().st_size <= plain < 4 * sum(t.numel() for t in expected.values())
    with torch.no_grad():
        assert torch.equal(net(DATA[0]), back(DATA[0]))


def test_gradients_pass_the_rounding_and_reach_the_step_exactly() -> None:
    start = NormalFactor(torch.tensor([0.62, -0.9, 0.04, 2.2, 0.7]).double(), -1.0)
    start.keep_(torch.tensor([True, True, True, True, False]))
    factor = GridFactor(start, 0.25)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 7.0]).double()
    integers = (factor.mean() / factor.step).detach().round()
    (weights * factor.distribution().mean.tanh()).sum().backward()
    slope = weights * (1 - (integers * 0.25).tanh().square()) * factor.kept
    torch.testing.assert_close(factor.loc.grad, slope, rtol=1e-12, atol=1e-12)

    def value(log_step: float) -> float:
        return float((weights * (integers * math.exp(log_step)).tanh())[:4].sum())

    at, h = math.log(0.25), 1e-6
    assert float(factor.log_step.grad) == pytest.approx((value(at + h) - value(at - h)) / (2 * h), rel=1e-6)


def test_steps_learn_slowly() -> None:
    factor = GridFactor(NormalFactor(torch.randn(4), -1.0), 0.25)
    rates = factor.parameters_by_rate()
    assert sorted(rates) == [0.06, 1.0] and rates[0.06] == [factor.log_step]
    assert {id(p) for group in rates.values() for p in group} == {id(p) for p in factor.parameters()}


def test_cutting_groups_keeps_the_steps(gridded: Posterior) -> None:
    import numpy as np

    small = gridded.restricted({"0": np.array([0, 3])})
    assert read_steps(small) == read_steps(gridded)
    assert grids(small)["4.weight"].loc.shape == (3, 32)


def test_extreme_steps_stay_positive_and_finite() -> None:
    for scale in (1e-12, 1e-3, 1e6):
        factor = GridFactor(NormalFactor(torch.randn(4) * scale, math.log(scale)), scale)
        assert 0 < float(factor.step.detach()) < math.inf and bool(factor.mean().isfinite().all())


@pytest.mark.parametrize("values", [(0.0,), (-1.0,), (math.nan,), (math.inf,), (2.0, 0.0)])
def test_coarseness_that_makes_no_sense_is_refused(start: Posterior, values: Any) -> None:
    with pytest.raises(ConfigError, match="coarseness of the grid: got .*allowed: positive numbers"):
        move_to_grid(start, *values)


def test_shapes_are_those_of_the_network(gridded: Posterior) -> None:
    shapes: dict[str, Tensor] = gridded.to_module().state_dict()
    assert {n: tuple(shapes[n].shape) for n in TENSORS} == {n: tuple(f.loc.shape) for n, f in grids(gridded).items()}
