"""Turbo-VBI from the fit to the smaller network: coordinate ascent inside training, supports, groups, deletions."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

from pyrobc.bmr import reduce
from pyrobc.dead_units import remove_dead_units
from pyrobc.decide import decide
from pyrobc.dists import interval_log_mass
from pyrobc.dists.scan import from_chains
from pyrobc.errors import FamilyError
from pyrobc.evidence import evidence
from pyrobc.family import make_family
from pyrobc.fit import fit
from pyrobc.folding import fold_scales
from pyrobc.lift import LiftedModel, lift
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.models.mlp import build
from pyrobc.objective import fast_loss, traced_loss
from pyrobc.posterior import Posterior
from pyrobc.scores import score
from pyrobc.surgery import apply
from pyrobc.weights import count_weights, prune_weights

STANDARD_ERRORS = 4.0
USED = slice(5, 10)


def make_data(rows: int = 600) -> tuple[Tensor, Tensor]:
    """Sixteen inputs, of which a run of five matters."""
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    return x, x[:, USED].sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1, generator=torch.Generator().manual_seed(1))


def trained_net() -> nn.Module:
    torch.manual_seed(0)
    net, (x, y) = build(16, (8,), 1), make_data()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def fitted() -> Posterior:
    family = make_family("turbo_vbi", every=5, idle_rate=1e-3)
    model = lift(trained_net(), family, "normal", make_data()[0][:1])
    return fit(model, make_data(), epochs=60, lr=1e-2, batch_size=100, progress=False)


def lifted(net: nn.Module, shape: tuple[int, ...], **settings: object) -> LiftedModel:
    return lift(net, make_family("turbo_vbi", **settings), "normal", torch.zeros(1, *shape).to(next(net.parameters())))


def spread(guide: MeanFieldGuide, seed: int = 0) -> MeanFieldGuide:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


@torch.no_grad()
def kl_of(model: LiftedModel, guide: MeanFieldGuide) -> float:
    return float(sum(model.family.kl(guide.distributions(), model.priors()).values()))


CONV = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5),
                     nn.ReLU(), nn.Linear(5, 2))  # fmt: skip


@pytest.mark.parametrize("block", ["joint", "factorised"])
@pytest.mark.parametrize("structure", ["chain", "independent"])
@pytest.mark.parametrize("walk", ["kernel", "channel"])
def test_passes_of_messages_never_raise_the_kl(block, structure, walk):
    model = lifted(copy.deepcopy(CONV).double(), (2, 4, 4), block=block, structure=structure, walk=walk, idle_rate=1e-2)
    guide = spread(model.new_guide())
    values = [kl_of(model, guide)]
    for _ in range(30):
        for factor in guide.by_site().values():
            if hasattr(factor, "refresh_"):
                factor.refresh_()
        values.append(kl_of(model, guide))
    assert max(np.diff(values)) < 1e-8 and values[-1] < values[0] - 1.0
    for factor in guide.by_site().values():
        if hasattr(factor, "refresh_") and structure == "independent":
            assert float(factor.enter) == pytest.approx(1 - float(factor.leave))
            assert float(factor.enter) == pytest.approx(float(factor.supports().mean.mean()), abs=1e-3)


def test_presence_is_the_share_of_draws_in_which_some_reader_is_active():
    model = lifted(CONV, (2, 4, 4), idle_rate=1e-1, density=0.1, run=2.0)
    posterior = Posterior(model, spread(model.new_guide()), 1)
    laws = posterior.laws()
    torch.manual_seed(0)
    for block in model.spec.blocks:
        alive = torch.zeros(4000, block.size, dtype=torch.bool)
        prior = torch.zeros(4000, block.size, dtype=torch.bool)
        for member in block.consumers:
            law = laws[member.parameter]
            chain = law.refreshed()
            for found, source in ((alive, chain), (prior, chain.given(torch.zeros_like(chain.log_odds)))):
                drawn = source.sample((4000,))
                active = from_chains(drawn, law.event_shape, "kernel")
                for group in range(block.size):
                    columns = torch.as_tensor(member.owned_by(np.array([group])))
                    found[:, group] |= (active.index_select(2, columns) > 0).flatten(1).any(1)
        scale = posterior.presence()[block.name]
        for found, expected in ((alive, scale.posterior.mean), (prior, scale.prior.mean)):
            error = (found.double().mean(0) - expected).abs()
            assert bool((error <= STANDARD_ERRORS * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all())
    assert posterior.scales() == {}


def test_fit_finds_the_inputs_that_matter_and_their_run(fitted):
    odds = fitted.weight_log_odds()["1.weight"]
    active = (odds < 0).any(0)
    assert torch.equal(active.nonzero()[:, 0], torch.arange(16)[USED])
    family, laws = fitted.model.family, {n: q for n, q in fitted.laws().items() if n in fitted.model.spec.parameters}
    runs, length = family.clusters(laws)["1.weight"]
    mask = (odds < 0).double()
    assert length == pytest.approx(float(mask.sum()) / runs, rel=0.3) and 1.5 < length <= 6
    chain_bits, independent_bits = family.mask_bits(laws)["1.weight"]
    assert 0 < chain_bits < independent_bits
    factor = fitted.guide.by_site()["1.weight"]
    assert int(factor.steps) == 60 * 6 and not math.isclose(float(factor.leave), 0.2)


def test_groups_leave_through_score_and_decide_and_the_cut_network_is_verified(fitted):
    found = score(fitted)
    assert found.label == "absent" and found.log_odds()["input"].shape == (16,)
    presence = fitted.presence()["input"]
    np.testing.assert_allclose(found.log_odds()["input"], -presence.posterior.logits.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.implied["input"], -presence.prior.logits.numpy(), rtol=1e-6)
    plan = decide(found, evidence(fitted, found, make_data(), num_draws=100, max_rows=200, progress=False))
    assert set(plan.kept()["input"]) == set(range(16)[USED])
    x, y = make_data()
    small = apply(plan, fitted)
    with torch.no_grad():
        dense_error, small_error = ((net(x) - y).square().mean() for net in (fitted.to_module(), small))
    assert float(small_error) < 1.5 * float(dense_error) + 0.02
    again = fit(fitted.restricted({n: np.asarray(g) for n, g in plan.kept().items()}).model, make_data(), epochs=1,
                guide=fitted.guide.restricted(fitted.model.spec, {n: np.asarray(g) for n, g in plan.kept().items()}),
                progress=False)  # fmt: skip
    assert np.isfinite(again.history[-1]["elbo"])


def test_weights_leave_where_their_support_is_less_likely_than_not(fitted):
    pruned = fitted.copy()
    odds = pruned.weight_log_odds()
    removed = prune_weights(pruned)
    assert removed == sum(int((o > 0).sum()) for o in odds.values()) > 50
    sites = pruned.guide.by_site()
    for name, value in odds.items():
        assert torch.equal(sites[name].kept, value <= 0)
        assert bool((sites[name].supports().mean[~sites[name].kept] == 0).all())
        assert bool(pruned.weight_log_odds()[name].isnan().eq(~sites[name].kept).all())
    assert prune_weights(pruned) == 0 or count_weights(pruned)[0] > 0
    x, y = make_data()
    with torch.no_grad():
        torch.testing.assert_close(pruned.to_module()(x), fitted.to_module()(x), rtol=0, atol=0.6)
    small = remove_dead_units(pruned, make_data())
    assert small.model.spec.block("input").size == 5
    with torch.no_grad():
        torch.testing.assert_close(small.to_module()(x), pruned.to_module()(x), rtol=1e-4, atol=1e-5)
    refitted = fit(small.model, make_data(), epochs=10, guide=small.guide, lr=3e-3, progress=False)
    with torch.no_grad():
        assert float((refitted.to_module()(x) - y).square().mean()) < 0.1 * float(y.var())
    fewer = fitted.copy()
    prune_weights(fewer, keep=30)
    assert count_weights(fewer)[0] == 30
    with pytest.raises(FamilyError, match="fold_scales"):
        prune_weights(fitted.copy(), per="row")


def test_losses_agree_after_deletions_and_the_bound_stays_finite(fitted):
    pruned = fitted.copy()
    prune_weights(pruned)
    x, y = make_data(rows=40)
    with torch.no_grad():
        fast = torch.stack([fast_loss(pruned.model, pruned.guide, 40)(x, y, 1.0) for _ in range(300)])
        traced = torch.stack([traced_loss(pruned.model, pruned.guide, 40)(x, y, 1.0) for _ in range(100)])
    error = (fast.var() / 300 + traced.var() / 100).sqrt()
    assert float((fast.mean() - traced.mean()).abs()) < STANDARD_ERRORS * float(error)


def test_folding_keeps_the_network(fitted):
    x, _ = make_data()
    with torch.no_grad():
        torch.testing.assert_close(fold_scales(fitted).to_module()(x), fitted.to_module()(x))


def test_an_interrupted_fit_resumes_to_the_same_bits(tmp_path):
    def run(epochs: int, name: str) -> Posterior:
        model = lift(trained_net(), make_family("turbo_vbi", every=4), "normal", make_data()[0][:1])
        return fit(model, make_data(), epochs=epochs, checkpoint=tmp_path / name, progress=False)

    straight = run(4, "a.pt")
    run(2, "b.pt")
    resumed = run(4, "b.pt")
    for (name, one), other in zip(
        straight.guide.state_dict().items(), resumed.guide.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_masses_of_bernoulli_laws():
    law = Bernoulli(logits=torch.tensor([-60.0, 0.3, 60.0]).double())
    for lower, upper, expected in (
        (-math.inf, 0.5, law.log_prob(torch.zeros(3).double())),
        (0.5, math.inf, law.log_prob(torch.ones(3).double())),
        (-1.0, 2.0, torch.zeros(3).double()),
        (0.2, 0.7, torch.full((3,), -math.inf).double()),
    ):
        found = interval_log_mass(law, torch.tensor(lower), torch.tensor(upper))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_absence_has_no_floor():
    logits = torch.tensor([-400.0, 3.0, 400.0]).double()
    law, prior = Bernoulli(logits=logits), Bernoulli(logits=torch.full((3,), 60.0).double())
    reduced = make_family("turbo_vbi").reduced()["absent"].of(prior, torch.full((3,), 0.1).double())
    expected = torch.nn.functional.logsigmoid(-logits) + 60.0
    torch.testing.assert_close(reduce(law, prior, reduced).delta_f, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.9, "run": 2.0}, "leave room for gaps"),
        ({"idle_rate": 1.0}, "more precise"),
        ({"every": 0}, "positive"),
        ({"structure": "markov"}, "chain, independent"),
        ({"block": "full"}, "joint, factorised"),
        ({"walk": "row"}, "kernel, channel"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(FamilyError, match=message):
        make_family("turbo_vbi", **settings)
