"""Chains of zeros and ones against enumeration of all of them."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrobc.dists import BinaryChain, Rates, count_bits, fit_chain
from pyrobc.dists.scan import from_chains, to_chains

FALSE_ALARM = 4.5  # standard errors


def make(log_odds: list[float], start: float, enter: float, leave: float) -> BinaryChain:
    return BinaryChain(rates_of(start, enter, leave), torch.tensor(log_odds, dtype=torch.float64))


def rates_of(*values: float) -> Rates:
    return Rates(*torch.tensor(values, dtype=torch.float64))


def enumerate_states(chain: BinaryChain) -> tuple[Tensor, Tensor]:
    """All states, and prior times evidence of each, by the definition."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=chain.event_shape[0])), dtype=torch.float64)
    start, enter, leave = (float(rate) for rate in chain.rates)
    steps = {(0, 1): enter, (0, 0): 1 - enter, (1, 0): leave, (1, 1): 1 - leave}
    odds, weights = chain.log_odds.exp().tolist(), []
    for state in states.int().tolist():
        weight = math.prod(steps[pair] for pair in itertools.pairwise(state)) * (start if state[0] else 1 - start)
        weights.append(weight * math.prod(o for o, s in zip(odds, state, strict=True) if s))
    return states, torch.tensor(weights, dtype=torch.float64)


rates = st.floats(0.02, 0.98)
evidence = st.lists(st.floats(-6, 6), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(evidence, rates, rates, rates)
def test_everything_equals_enumeration(log_odds, start, enter, leave):
    chain = make(log_odds, start, enter, leave)
    states, weights = enumerate_states(chain)
    total, q = weights.sum(), weights / weights.sum()
    torch.testing.assert_close(chain.log_partition, total.log())
    torch.testing.assert_close(chain.mean, q @ states)
    torch.testing.assert_close(chain.variance, q @ states - (q @ states).square())
    torch.testing.assert_close(chain.log_prob(states), q.log())
    torch.testing.assert_close(chain.entropy(), -(q * q.log()).sum())
    prior = make([0.0] * len(log_odds), start, enter, leave).log_prob(states)
    torch.testing.assert_close(chain.kl_from_prior, (q * (q.log() - prior)).sum())
    runs = states[:, 0] + ((states[:, :-1] == 0) & (states[:, 1:] == 1)).sum(-1)
    torch.testing.assert_close(chain.num_runs, q @ runs)
    for i in range(len(log_odds) - 1):
        for a, b in itertools.product((0, 1), repeat=2):
            where = (states[:, i] == a) & (states[:, i + 1] == b)
            torch.testing.assert_close(chain.pairs[i, a, b], q[where].sum())
    for i in range(len(log_odds)):
        without = list(log_odds)
        without[i] = 0.0
        states, weights = enumerate_states(make(without, start, enter, leave))
        is_on = states[:, i] == 1
        torch.testing.assert_close(chain.extrinsic[i], (weights[is_on].sum() / weights[~is_on].sum()).log())


@settings(max_examples=20, deadline=None)
@given(evidence, rates, rates, rates)
def test_zeros_of_an_owner_equal_enumeration_where_adjacent_and_do_not_exceed_it_elsewhere(
    log_odds, start, enter, stay
):
    chain = make(log_odds, start, min(enter, stay), 1 - max(enter, stay))  # ones attract each other
    states, weights = enumerate_states(chain)
    count = len(log_odds)
    for low, high in itertools.combinations(range(count + 1), 2):
        owner = torch.full((count,), 1)
        owner[low:high] = 0
        exact = (weights[states[:, low:high].sum(-1) == 0].sum() / weights.sum()).log()
        torch.testing.assert_close(chain.log_zeros(owner, 1)[0], exact)
    apart = torch.arange(count) % 2
    exact = (weights[states[:, ::2].sum(-1) == 0].sum() / weights.sum()).log()
    assert float(chain.log_zeros(apart, 2)[0] - exact) < 1e-9


@settings(max_examples=20, deadline=None)
@given(evidence, rates)
def test_transitions_that_do_not_depend_give_independent_nodes(log_odds, rate):
    chain = make(log_odds, rate, rate, 1 - rate)
    logit = math.log(rate / (1 - rate))
    torch.testing.assert_close(chain.extrinsic, torch.full_like(chain.log_odds, logit))
    odds = chain.log_odds.exp()
    torch.testing.assert_close(chain.log_partition, (1 - rate + rate * odds).log().sum())


def test_known_chains():
    chain = make([2, -1, 0.5, -3, 1.5, 0.2], 0.2, 0.1, 0.3)
    marginals = torch.tensor([0.50410, 0.22482, 0.19737, 0.05953, 0.39353, 0.36378], dtype=torch.float64)
    extrinsics = torch.tensor([0.12093, 0.44082, 0.12979, 0.55974, 0.12647, 0.31886], dtype=torch.float64)
    torch.testing.assert_close(chain.mean, marginals, rtol=0, atol=6e-6)
    torch.testing.assert_close(chain.extrinsic.sigmoid(), extrinsics, rtol=0, atol=6e-6)
    assert float(chain.log_partition) == pytest.approx(0.649458, abs=6e-7)
    two = make([math.log(9), 0.0], 0.25, 0.1, 0.3)
    torch.testing.assert_close(two.mean, torch.tensor([0.75, 0.55]).double())
    torch.testing.assert_close(two.extrinsic.sigmoid(), torch.tensor([0.25, 0.55]).double())
    prior = make([0.0] * 1000, 0.2, 0.0375, 0.15)
    assert float(prior.num_runs) == pytest.approx(30.2, abs=0.05)
    assert float(make([0.0] * 1000, 0.2, 0.2, 0.8).num_runs) == pytest.approx(160.0, abs=0.05)
    assert float(prior.entropy()) / 1000 / math.log(2) == pytest.approx(0.3065, abs=5e-4)


def test_gradients_are_marginals_and_extreme_evidence_is_harmless():
    chain = make([900.0, -900.0, 0.3, -math.inf, 4.0], 0.2, 1e-4, 0.3)
    chain.log_odds.requires_grad_()
    (gradient,) = torch.autograd.grad(chain.log_partition, chain.log_odds)
    torch.testing.assert_close(gradient, chain.mean.detach())
    assert chain.mean[3] == 0 and bool(torch.isfinite(gradient).all())
    assert bool(torch.isfinite(chain.kl_from_prior)) and bool(torch.isfinite(chain.entropy()))
    single = chain.log_odds.detach().float()
    low = BinaryChain(Rates(*torch.tensor([0.2, 1e-4, 0.3])), single)
    torch.testing.assert_close(low.mean.double(), chain.mean.detach(), rtol=1e-4, atol=1e-6)


def test_draws_have_the_pairs_of_the_law():
    chain = make([0.5, -1.0, 1.0, 0.2], 0.3, 0.15, 0.25)
    torch.manual_seed(0)
    drawn = chain.sample((20_000,))
    for i in range(3):
        joint = torch.stack([(drawn[:, i] == a) & (drawn[:, i + 1] == b) for a in (0, 1) for b in (0, 1)]).double()
        expected = chain.pairs[i].flatten()
        error = (joint.mean(1) - expected).abs() / (expected * (1 - expected) / 20_000).sqrt()
        assert float(error.max()) < FALSE_ALARM


def test_estimating_transitions_raises_the_evidence_to_a_fixed_point():
    torch.manual_seed(1)
    true = BinaryChain(rates_of(0.3, 0.05, 0.2), torch.zeros(40, 200).double())
    s = true.sample()
    evidence = dist.Normal(2 * (2 * s - 1), 2.0).sample()  # log odds of a Normal observation
    found, last = rates_of(0.5, 0.5, 0.4), -math.inf
    for _ in range(60):
        chain = BinaryChain(found, evidence)
        value = float(chain.log_partition.sum())
        assert value >= last - 1e-9
        last, found = value, chain.estimate()
    counted = fit_chain(s)
    for rates in (found, counted.rates):
        torch.testing.assert_close(torch.stack(rates[1:]), torch.tensor([0.05, 0.2]).double(), rtol=0.15, atol=0)
    for shift in (0.9, 1.1):  # counting is most likely
        for name in ("enter", "leave"):
            rates = counted.rates._replace(**{name: shift * getattr(counted.rates, name)})
            assert float(BinaryChain(rates, counted.log_odds).log_prob(s).sum()) < float(counted.log_prob(s).sum())
    chain_bits, independent_bits = count_bits(s)
    assert chain_bits == pytest.approx(float(true.entropy().sum()) / math.log(2), rel=0.05)
    assert independent_bits == pytest.approx(8000 * float(dist.Bernoulli(s.mean()).entropy()) / math.log(2), rel=1e-3)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (2, 3, 4, 3), (2, 3, 1, 1)])
@pytest.mark.parametrize("walk", ["kernel", "channel"])
def test_scans_come_back_and_step_to_neighbours(shape, walk):
    size = torch.Size(shape)
    index = torch.arange(size.numel()).reshape(1, *shape)
    chains = to_chains(index, size, walk)
    assert torch.equal(from_chains(chains, size, walk), index)
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).flatten(0, -2)
    steps = places[chains[..., 1:].flatten()] - places[chains[..., :-1].flatten()]
    assert bool((steps.abs().sum(-1) == 1).all()), "every step is to a neighbour along one axis"
    along = steps.abs().sum(0)
    assert along[0] == 0 and (along[1] == 0) == (walk == "kernel" and math.prod(shape[2:]) > 1)
