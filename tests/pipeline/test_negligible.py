"""Thresholds against a loop over groups, readers and columns."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrobc.decide import decide
from pyrobc.dependency import trace_groups
from pyrobc.dists import HalfCauchyProduct, TruncatedLogUniform, interval_log_mass
from pyrobc.evidence import evidence
from pyrobc.family import Effective
from pyrobc.fit import fit
from pyrobc.groups import GroupSpec
from pyrobc.lift import lift
from pyrobc.negligible import negligible_thresholds
from pyrobc.posterior import Posterior
from pyrobc.rules import FalsePruneRate
from pyrobc.scores import score
from pyrobc.surgery import apply


class TwoReaders(nn.Module):
    """One convolution read by another and, concatenated with it, by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 1)
        self.head = nn.Conv2d(5, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.head(torch.cat([h, torch.relu(self.side(h))], 1)).flatten(1)


def a_case() -> tuple[GroupSpec, Effective, dict[str, Tensor]]:
    net = TwoReaders().double()
    spec = trace_groups(net, torch.randn(2, 1, 4, 4).double())
    assert {b.name: b.size for b in spec.blocks} == {"stem": 3, "side": 2}
    parameters = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    gates = {b.name: torch.rand(b.size).double() for b in spec.blocks}
    rms = {"side.weight": torch.rand(3).double(), "head.weight": torch.rand(5).double()}
    return spec, Effective(gates, parameters), rms


def naive(spec: GroupSpec, mean: Effective, rms: dict[str, Tensor], epsilon: float) -> dict[str, list[float]]:
    """The formula of the docstring, one column at a time."""

    def owner(weight: str, column: int) -> tuple[str, int] | None:
        for block, member in ((b, m) for b in spec.blocks for m in b.consumers if m.parameter == weight):
            for g in range(block.size):
                if column in member.indices[member.ptr[g] : member.ptr[g + 1]]:
                    return block.name, g
        return None

    def power(weight: str, column: int) -> float:
        w = mean.parameters[weight][:, column].flatten()
        r = float(rms[weight][column]) if weight in rms else 1.0
        return r**2 * sum(float(a) ** 2 for a in w)

    found = {}
    for block in spec.blocks:
        bounds = [math.inf] * block.size
        for g, member in product(range(block.size), block.consumers):
            weight = member.parameter
            columns = range(mean.parameters[weight].shape[1])
            carried = math.sqrt(sum(power(weight, c) for c in columns if owner(weight, c) == (block.name, g)))
            received = 0.0
            for c in columns:
                o = owner(weight, c)
                gate = 1.0 if o is None else float(mean.gates[o[0]][o[1]])
                received += gate**2 * power(weight, c)
            bounds[g] = min(bounds[g], epsilon * math.sqrt(received) / carried)
        found[block.name] = bounds
    return found


@pytest.mark.parametrize("has_rms", [False, True])
def test_thresholds_equal_a_naive_loop(has_rms: bool) -> None:
    spec, mean, rms = a_case()
    rms = rms if has_rms else {}
    found = negligible_thresholds(spec, mean, rms, 1e-2)
    for block, expected in naive(spec, mean, rms, 1e-2).items():
        assert found[block].dtype == torch.float64
        np.testing.assert_allclose(found[block], expected, rtol=1e-10)


def test_a_group_at_its_threshold_carries_exactly_the_stated_share() -> None:
    """Measured on pre-activations: random signs of the input make contributions add in squares."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)).double()
    spec = trace_groups(net, torch.randn(1, 4).double())
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    mean = Effective({"input": torch.rand(4).double() + 0.5, "0": torch.ones(6).double()}, parameters)
    bound = negligible_thresholds(spec, mean, {"0.weight": torch.ones(4).double()}, 0.05)["input"]
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=4))).double()  # root mean square one, uncorrelated
    received = ((signs * mean.gates["input"]) @ parameters["0.weight"].T).square().sum(1).mean().sqrt()
    for g in range(4):
        carried = (signs[:, g : g + 1] * bound[g] * parameters["0.weight"][:, g]).square().sum(1).mean().sqrt()
        assert float(carried / received) == pytest.approx(0.05, rel=1e-10)


def test_thresholds_are_proportional_to_epsilon() -> None:
    spec, mean, rms = a_case()
    small, large = (negligible_thresholds(spec, mean, rms, e) for e in (1e-3, 1e-1))
    for block in small:
        torch.testing.assert_close(large[block], 100 * small[block])


def log_mass_above(prior: object, bound: Tensor) -> Tensor:
    """Of multipliers larger than the bound, on both sides of zero."""
    top = torch.full_like(bound, math.inf)
    return torch.logaddexp(interval_log_mass(prior, bound, top), interval_log_mass(prior, -top, -bound))


def test_the_prior_caps_a_threshold_where_it_ends() -> None:
    spec, mean, rms = a_case()
    mean.parameters["side.weight"][:, 0].zero_()
    mean.parameters["head.weight"][:, 0].zero_()  # group 0 of the stem carries nothing anywhere
    free = negligible_thresholds(spec, mean, rms, 1e-2)["stem"]
    assert float(free[0]) > 1e100
    uniform = TruncatedLogUniform(torch.full((3,), -20.0).double(), torch.zeros(3).double())
    cauchy = HalfCauchyProduct(torch.ones(3).double())
    for prior in (uniform, cauchy):
        capped = negligible_thresholds(
            spec, mean, rms, 1e-2, {"stem": prior, "side": HalfCauchyProduct(torch.ones(2).double())}
        )
        assert float(log_mass_above(prior, capped["stem"])[0].exp()) == pytest.approx(1e-12, rel=1e-3)
        torch.testing.assert_close(capped["stem"][1:], free[1:])


@pytest.mark.parametrize("family", ["log_uniform", "group_horseshoe", "group_normal_jeffreys"])
def test_the_cap_is_beyond_all_but_the_end_of_the_prior(family: str) -> None:
    """Signed multipliers count on both sides, and odds are finite and far above those of any rate that is asked for."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight[:, 0] = 0.0  # an input that carries nothing
    model = lift(net, family, "categorical", torch.randn(2, 3).double())
    posterior = Posterior(model.double(), model.new_guide(), num_data=10)
    bound = posterior.thresholds(1e-2)["input"]
    prior = posterior.scales()["input"].prior
    assert float(log_mass_above(prior, bound)[0].exp()) == pytest.approx(1e-12, rel=1e-3)
    odds = score(posterior).log_odds()["input"]
    assert 15 < odds[0] <= 700 and np.isfinite(odds).all()


def test_an_unlearnt_gate_that_carries_nothing_is_not_needed() -> None:
    """q = p, weights of zero: posterior odds are prior odds, and a rate of 0.001 is met."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight[:, :2] = 0.0
    model = lift(net, "log_uniform", "categorical", torch.randn(2, 3).double())
    guide = model.new_guide()
    with torch.no_grad():
        gates = guide.by_site()["input.gate"]
        gates.loc.fill_(-10.0)
        gates.log_scale.fill_(8.0)  # flat on the support: the log-uniform law itself
    scored = score(Posterior(model.double(), guide, num_data=10))
    np.testing.assert_allclose(scored.log_odds()["input"][:2], math.log(1e12), rtol=1e-4)
    outcomes = [row[0] for row in FalsePruneRate(0.001).judge(scored).outcomes["input"]]
    assert outcomes[:2] == ["prune", "prune"] and outcomes[2] != "prune"


@pytest.mark.parametrize("family", ["log_uniform", "group_horseshoe", "group_normal_jeffreys"])
def test_what_a_dead_layer_feeds_is_not_needed(family: str) -> None:
    """Every unit is off on every row: nothing is received, and the network that is left says the same."""
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
        net[2].bias.fill_(-1.0)
    x, y = torch.rand(60, 5), torch.randint(0, 3, (60,))
    posterior = fit(lift(net, family, "categorical", x[:1]), (x, y), epochs=1, progress=False)
    assert float(posterior.input_rms["2.weight"].max()) == 0.0
    scored = score(posterior)
    for block in ("0", "2"):
        assert (scored.log_odds()[block] > 10).all(), block
    plan = decide(scored, evidence(posterior, scored, (x, y), num_draws=30, num_candidates=1))
    assert plan.widths["0"] == (6, 1) and plan.widths["2"] == (4, 1)
    assert any("the fit is worthless" in note for note in plan.notes)
    small = apply(plan, posterior)
    torch.testing.assert_close(small(x), posterior.to_module()(x), rtol=1e-4, atol=1e-5)
