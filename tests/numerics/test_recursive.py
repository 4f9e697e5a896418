"""Recursive Bayesian pruning: its prior by quadrature, its penalty's optima, the dependency between layers, surgery."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor, nn

import pyrobc as bc
from pyrobc.demo import load_digits
from pyrobc.dists import UniformScaleNormal, interval_log_mass
from pyrobc.errors import ConfigError, FamilyError
from pyrobc.family import make_family
from pyrobc.fit import fit
from pyrobc.guides.recursive import LayerByLayer, NoiseFactor
from pyrobc.lift import LiftedModel, lift
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.models.mlp import build
from pyrobc.models.regression import fit_linear
from pyrobc.scores import score
from pyrobc.surgery import mask

SIGNIFICANCE = 1e-4
LARGEST = 10.0


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise_of(guide: MeanFieldGuide, block: str) -> NoiseFactor:
    factor = guide.by_site()[f"{block}.noise"]
    assert isinstance(factor, NoiseFactor)
    return factor


def one_channel(width: float) -> tuple[LiftedModel, MeanFieldGuide]:
    family = make_family("recursive", width=width, largest=LARGEST)
    model = lift(build(1, (1,), 1).double(), family, "normal", torch.zeros(1, 1).double(), prune_inputs=False)
    return model, model.new_guide()


def penalty(model: LiftedModel, guide: MeanFieldGuide) -> Tensor:
    """Divergence of the channel's noise and its scale, nats, less the constant of the scale's flat prior."""
    kls = model.family.kl(guide.distributions(), model.priors())
    return kls["1.noise"] + kls["1.spread"] - math.log(LARGEST)


def duplicates() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Two channels that compute the same positive number, a sum of them, and targets equal to the number."""
    net = nn.Sequential(nn.Linear(1, 2, False), nn.ReLU(), nn.Linear(2, 1, False), nn.ReLU(), nn.Linear(1, 1, False))
    for parameter in net.double().parameters():
        parameter.requires_grad_(False).fill_(1.0)
    x = torch.rand(200, 1).double() + 0.5
    return net, (x, x + 0.01 * torch.randn(200, 1).double())


def test_the_prior_of_the_multiplier_by_quadrature() -> None:
    law = UniformScaleNormal(double(3.0))
    for value in (1e-3, 0.2, 1.0, 4.0, 20.0):
        density = quad(lambda t, v=value: scipy.stats.norm.pdf(v, scale=t) / 3.0, 0, 3, limit=400, epsabs=0)[0]
        assert float(law.log_prob(double(value)).exp()) == pytest.approx(density, rel=1e-6)
        below = quad(lambda t, v=value: scipy.stats.norm.cdf(v, scale=t) / 3.0, 0, 3, limit=400)[0]
        assert float(law.cdf(double(value))) == pytest.approx(below, rel=1e-9)
        inside = interval_log_mass(law, double(-value / 2), double(value)).exp()
        assert float(inside) == pytest.approx(float(law.cdf(double(value)) - law.cdf(double(-value / 2))), rel=1e-9)
    assert law.cdf(double(-math.inf, 0.0, math.inf)).tolist() == [0.0, 0.5, 1.0]
    draws = law.expand([1]).sample(torch.Size([4000]))
    assert scipy.stats.kstest(law.cdf(draws).flatten(), "uniform").pvalue > SIGNIFICANCE


def test_the_divergence_is_that_to_a_normal_of_the_best_scale() -> None:
    model, guide = one_channel(0.2)
    with torch.no_grad():
        noise_of(guide, "1").log_loc.fill_(math.log(0.7))
        divergence, spread = float(penalty(model, guide)), guide.distributions()["1.spread"]
    assert divergence == pytest.approx(1.291999, abs=1e-6)
    assert divergence == pytest.approx(0.5 * math.log(1 + 0.49 / 0.04), abs=1e-12)
    assert float(spread.v) ** 2 == pytest.approx(0.53, abs=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("target", "expected"), [(0.19, 1.9e-5), (0.21, 0.13702), (0.25, 0.2), (0.4, 0.37321)])
def test_descent_against_a_quadratic_ends_at_the_published_optima(target: float, expected: float) -> None:
    model, guide = one_channel(1e-3)
    log_loc = noise_of(guide, "1").log_loc

    def slope(_: float, state: np.ndarray) -> list[float]:
        with torch.no_grad():
            log_loc.fill_(float(state[0]))
        loss = 50 * (log_loc.exp() - target).square().sum() + penalty(model, guide)
        (gradient,) = torch.autograd.grad(loss, log_loc)
        return [-float(gradient)]

    end = solve_ivp(slope, (0, 1e6), [math.log(target)], method="BDF", rtol=1e-5, atol=1e-7).y[0, -1]
    assert math.exp(end) == pytest.approx(expected, rel=5e-3)


def test_given_the_layers_before_it_a_channel_has_the_conditional_gaussian() -> None:
    prior = dist.MultivariateNormal(double(1.0), double(0.25).reshape(1, 1))
    law = fit_linear(double(0.864).reshape(1, 1), double(1.1), prior, 0.3).weights
    assert float(law.loc) == pytest.approx(1.184279, abs=1e-6)
    assert float(law.variance) == pytest.approx(0.081338, abs=1e-6)


def test_a_pruned_duplicate_is_made_up_for_by_the_next_layer() -> None:
    """The reader of two equal channels is halved, unless one of them has gone before it is inferred."""
    net, data = duplicates()
    model = lift(net, make_family("recursive", width=0.01), "normal", data[0][:1], prune_inputs=False)
    settings = {"lr": 0.02, "batch_size": 20, "progress": False}

    one_shot = model.new_guide()
    noise_of(one_shot, "0").freeze_(2.0, 0.01)  # both stay, at one
    posterior = fit(model, data, epochs=25, guide=one_shot, **settings)
    assert float(posterior.mean().gates["2"]) == pytest.approx(0.5, abs=0.01)

    recursive = model.new_guide()
    with torch.no_grad():
        noise_of(recursive, "0").log_loc.copy_(double(0.0, math.log(0.02)))
    posterior = fit(model, data, epochs=60, guide=recursive, on_step=LayerByLayer(), **settings)
    gates = posterior.mean().gates
    assert float(gates["0"][1]) < 1e-6
    assert float(gates["0"][0] * gates["2"]) == pytest.approx(1.0, abs=0.01)
    assert float(gates["2"]) == pytest.approx(1.0, abs=0.03)  # the first layer was collapsed a little below one
    plan = bc.decide(score(posterior))
    assert plan.kept() == {"0": [0], "2": [0]}


def test_the_schedule_goes_from_input_to_output_and_is_the_same_from_any_start() -> None:
    model = lift(build(4, (3, 2), 2), "recursive", "categorical", torch.zeros(1, 4))
    guide, schedule = model.new_guide(), LayerByLayer(tune=0.5)
    noises = [noise_of(guide, name) for name in ("input", "1", "3")]
    with torch.no_grad():
        noises[0].log_loc.copy_(torch.tensor([0.0, -3.0, -6.0, -9.0]))
        noises[1].log_loc.fill_(-9.0)
    trail = []
    for done in (0.0, 0.16, 0.17, 0.34, 0.66, 0.67, 0.99):
        schedule(guide, done)
        trail.append([int(noise.state) for noise in noises])
    assert trail == [[0, 1, 1], [0, 1, 1], [2, 1, 1], [2, 0, 1], [2, 2, 1], [2, 2, 0], [2, 2, 2]]
    assert noises[0].log_loc.exp().gt(1e-6).tolist() == [True, True, False, False]
    assert int((noises[1].log_loc > -10).sum()) == 1  # the last channel of a block stays
    with torch.no_grad():
        noises[0].log_loc[1] = -9.0
    schedule(guide, 0.995)
    assert noises[0].log_loc[1].item() == -9.0, "what is frozen is judged once"
    fresh = model.new_guide()
    fresh.load_state_dict(guide.state_dict())
    assert [int(noise_of(fresh, name).state) for name in ("input", "1", "3")] == trail[-1]


def test_a_waiting_or_frozen_block_has_no_noise_and_no_gradient() -> None:
    model = lift(build(4, (3,), 2), "recursive", "categorical", torch.zeros(1, 4))
    guide = model.new_guide()
    noise_of(guide, "input").wait_()
    gates = model.family.draw_local(guide.distributions(), model.spec, 50).gates
    assert gates["input"].std().item() < 1e-5 < gates["1"].std().item()
    assert not gates["input"].requires_grad and gates["1"].requires_grad


def test_digits_from_fit_to_surgery() -> None:
    data = load_digits()
    family = make_family("recursive", noise_lr=3.0, num_draws=8)
    model = lift(build(64, (30, 20), 10), family, "categorical", data.train[0][:1], prune_inputs=False)
    posterior = fit(
        model, data.train, epochs=40, lr=5e-3, batch_size=128, progress=False, on_step=LayerByLayer(), temperature=2.0
    )
    plan = bc.decide(score(posterior))
    small = bc.apply(plan, posterior)
    widths = [len(plan.kept()[name]) for name in ("1", "3")]
    assert 0 < widths[0] < 30 and 0 < widths[1] < 20, widths
    x, y = data.validation
    assert float((small(x).argmax(1) != y).double().mean()) < 0.1
    masked = mask(plan, posterior.to_module())
    torch.testing.assert_close(small(x), masked(x), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(small(x), posterior.to_module()(x), rtol=0, atol=0.3)


def test_channels_count_by_the_multiply_accumulates_that_go_with_them() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(),
        nn.Linear(5, 4),
    )  # fmt: skip
    family = make_family("recursive", counts="macs")
    model = lift(net, family, "categorical", torch.zeros(1, 1, 6, 6), prune_inputs=False)
    by_hand = {"0": 16 * 9 + 3 * 4 * 9, "2": 2 * 4 * 9 + 4 * 5, "5": 12 + 4}  # one channel: made, and read
    mean = (2 * by_hand["0"] + 3 * by_hand["2"] + 5 * by_hand["5"]) / 10
    weights = model.family.kl_weights(model.spec, 100)
    assert weights == pytest.approx({f"{name}.noise": cost / mean for name, cost in by_hand.items()})
    assert make_family("recursive").kl_weights(model.spec, 100) == {}


def test_a_channel_has_to_be_needed_as_many_times_more_as_it_costs() -> None:
    """Optima of quadratic fits under the weighted divergence: there if and only if the target squared is 4 c / h."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2), nn.ReLU(), nn.Linear(2, 1))
    model = lift(
        net.double(), make_family("recursive", counts="macs", width=1e-4), "normal", torch.zeros(1, 1, 6, 6).double(),
        prune_inputs=False,
    )  # fmt: skip
    weights = model.family.kl_weights(model.spec, 1)
    kls = {name: weights[f"{name}.noise"] for name in ("0", "3")}
    assert kls["0"] > 4 * kls["3"]
    curvature = 8 * kls["3"]  # one channel of the cheap block stays at one, of the dear one it does not
    guide = model.new_guide()
    noises = {name: noise_of(guide, name) for name in kls}
    optimizer = torch.optim.Adam([noise.log_loc for noise in noises.values()], lr=0.05)
    for _ in range(1000):
        optimizer.zero_grad()
        divergences = model.family.kl(guide.distributions(), model.priors())
        gap = sum((noise.log_loc.exp() - 1).square().sum() for noise in noises.values())
        loss = sum(weights[f"{name}.noise"] * divergences[f"{name}.noise"] for name in kls) + 0.5 * curvature * gap
        torch.as_tensor(loss).backward()
        optimizer.step()
    expected = (1 + math.sqrt(1 - 4 * kls["3"] / curvature)) / 2
    assert noises["3"].log_loc.exp().tolist() == pytest.approx([expected] * 2, rel=1e-3)
    assert float(noises["0"].log_loc.detach().exp()) < 0.01


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(FamilyError, match="largest at least 4"):
        make_family("recursive", largest=1.0)
    with pytest.raises(FamilyError, match="counts='weights'; allowed: 'channels' or 'macs'"):
        make_family("recursive", counts="weights")
    with pytest.raises(ConfigError, match="0 < last_width"):
        LayerByLayer(first_width=0.001)
