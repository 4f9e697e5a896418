"""Networks of many sizes from one score: nested, as large as asked, the same after a round trip, and equal when cut."""

import json

import numpy as np
import pytest
import torch

from pyrobc.decide import decide
from pyrobc.errors import BudgetError, PlanError
from pyrobc.levels import add_levels
from pyrobc.lift import lift
from pyrobc.models.mlp import build
from pyrobc.plan import Plan
from pyrobc.posterior import Posterior
from pyrobc.scores import score
from pyrobc.surgery import apply, mask

SHARES = (1.0, 0.6, 0.3, 0.1)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    """Gates at odds of their own; nothing is fitted."""
    torch.manual_seed(0)
    model = lift(build(8, (20, 12), 3), "gumbel_softmax", "categorical", torch.randn(2, 8))
    guide = model.new_guide()
    for block in model.spec.blocks:
        guide.by_site()[f"{block.name}.gate"].log_odds.data.copy_(2 * torch.randn(block.size))
    return Posterior(model, guide, 100)


@pytest.fixture(scope="module")
def plan(posterior: Posterior) -> Plan:
    scored = score(posterior)
    return add_levels(decide(scored), scored, SHARES)


def test_levels_are_nested_and_no_larger_than_asked(plan: Plan, posterior: Posterior) -> None:
    whole = plan.parameters[0]
    kept = [{name: set(groups) for name, groups in plan.at(share).kept().items()} for share in SHARES]
    for larger, smaller in zip(kept[:-1], kept[1:], strict=True):
        assert all(smaller[name] <= larger[name] for name in larger) and smaller != larger
    assert {name: len(groups) for name, groups in kept[0].items()} == {
        b.name: b.size for b in posterior.model.spec.blocks
    }
    odds = score(posterior).log_odds()
    for share, groups in zip(SHARES, kept, strict=True):
        at = plan.at(share)
        assert at.parameters[1] <= share * whole
        assert at.parameters[1] == posterior.model.spec.forecast({n: np.array(sorted(g)) for n, g in groups.items()})[0]
        gone = [(odds[n][i], n, i) for n in odds for i in range(len(odds[n])) if i not in groups[n]]
        if gone:  # one group more, the least certain of those that left, would be too much
            _, name, i = min(gone)
            more = {n: np.array(sorted(g | ({i} if n == name else set()))) for n, g in groups.items()}
            assert posterior.model.spec.forecast(more)[0] > share * whole


def test_a_level_is_chosen_between_those_that_are_stored(plan: Plan) -> None:
    assert plan.at(0.5).parameters == plan.at(0.3).parameters
    assert plan.at(0.3).at(0.6).kept() == plan.at(0.6).kept(), "a level leads to every other"
    with pytest.raises(PlanError, match=r"got 0.01 of the parameters; allowed: at least one of 1, 0\.\d"):
        plan.at(0.01)
    gone = sorted(set(plan.kept()["1"]) - set(plan.at(0.1).kept()["1"]))[0]
    assert "prune: the network of at most 0.1 of the parameters lacks it" in plan.at(0.1).explain(f"1[{gone}]")
    assert plan.at(0.1).rule["level"] == 0.1 and "whatever the odds" in plan.at(0.1).notes[-1]


def test_levels_survive_the_file_and_are_checked_in_it(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again.to_json() == text
    assert again.at(0.3).kept() == plan.at(0.3).kept()
    older = json.loads(text)
    del older["levels"]  # written before there were any
    assert Plan.from_json(json.dumps(older)).levels == ()
    bad = text.replace(f'"parameters": {plan.at(0.3).parameters[1]}', f'"parameters": {10 * plan.parameters[0]}')
    assert bad != text
    with pytest.raises(PlanError, match="do not fall"):
        Plan.from_json(bad)


def test_every_level_cuts_to_what_its_mask_computes(plan: Plan, posterior: Posterior) -> None:
    x = torch.randn(6, 8)
    for share in SHARES:
        at = plan.at(share)
        small = apply(at, posterior)
        assert sum(p.numel() for p in small.parameters()) == at.parameters[1]
        torch.testing.assert_close(small(x), mask(at, posterior.to_module())(x), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_stored_is_refused(plan: Plan, posterior: Posterior) -> None:
    scored = score(posterior)
    for share in (0.001, 1.5, float("nan")):
        with pytest.raises(BudgetError, match="level of a plan"):
            add_levels(decide(scored), scored, [share])
    other = lift(build(8, (5,), 3), "gumbel_softmax", "categorical", torch.randn(2, 8))
    with pytest.raises(PlanError, match="another network"):
        add_levels(plan, score(Posterior(other, other.new_guide(), 10)), [0.5])
    assert plan.then(decide(score(posterior.restricted({n: np.array(g) for n, g in plan.kept().items()})))).levels == ()
