"""Every outcome and every rule, on scores made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pyrobc.decide import decide
from pyrobc.dependency import trace_groups
from pyrobc.errors import BudgetError, ConfigError, PlanError
from pyrobc.groups import GroupSpec
from pyrobc.rules import PosteriorOdds

KEEP = {"input": np.full(6, -5.0), "0": np.full(10, -5.0), "2": np.full(5, -5.0)}


def odds(**changes):
    """Six inputs, ten and five hidden units, all needed but for ``changes``, ``b0=[...]`` for block ``0``."""
    return KEEP | {name.removeprefix("b"): np.asarray(values, dtype=float) for name, values in changes.items()}


def outcomes(plan, name):
    return next(block.outcomes for block in plan.blocks if block.name == name)


def nested(order, *rows, khat=0.1, gain=50.0):
    """Evidence with candidates ``(num_removed, diff)``; the full network's SE is 2 nats."""
    candidates = [
        SimpleNamespace(num_removed=n, elpd=-50 + d, se=2.0, diff=d, diff_se=0.1, khat_bad=0.0, parameters=1, macs=1)
        for n, d in rows
    ]
    return SimpleNamespace(
        candidates=candidates,
        order=np.asarray(order),
        method="by hand",
        posterior_khat=khat,
        good_k=0.7,
        gain=gain,
        gain_se=5.0,
    )


def test_sign_decides(mlp_spec, by_hand):
    plan = decide(by_hand(mlp_spec, odds(b2=[3, -3, 3, -3, 0.1])))
    assert outcomes(plan, "2") == ("prune", "keep", "prune", "keep", "prune")
    assert plan.kept()["2"] == [1, 3]
    assert "the score alone decided" in plan.notes[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_undefined_never_prunes(mlp_spec, by_hand, value):
    plan = decide(by_hand(mlp_spec, odds(b2=[value, 3, -3, -3, -3]), reasons={"2": "improper prior"}))
    assert outcomes(plan, "2")[:2] == ("abstain", "prune")
    assert "improper prior" in plan.blocks[2].reasons[0]
    assert plan.num_abstained == 1
    assert plan.kept()["2"] == [0, 2, 3, 4]


def test_minus_infinity_keeps(mlp_spec, by_hand):
    assert outcomes(decide(by_hand(mlp_spec, odds(b2=[-np.inf, 3, 3, 3, -3]))), "2")[0] == "keep"


def test_within_monte_carlo_error_abstains(mlp_spec, by_hand):
    scored = by_hand(mlp_spec, odds(b2=[0.9, 1.1, -0.9, -1.1, -5]), mcse=0.5)
    assert outcomes(decide(scored, z=2), "2") == ("abstain", "prune", "abstain", "keep", "keep")
    assert outcomes(decide(scored, z=1), "2") == ("prune", "prune", "keep", "keep", "keep")


def test_steps_back_to_what_predicts_as_well(mlp_spec, by_hand):
    """Three groups want to leave; with all three gone the density falls by 4.1 > 2 x 2 nats, with two by 3.9."""
    scored = by_hand(mlp_spec, odds(b2=[9, 8, 7, -3, -3]))
    order = [16, 17, 18, *range(16), 19, 20]
    plan = decide(scored, nested(order, (0, 0.0), (2, -3.9), (3, -4.1)))
    assert outcomes(plan, "2") == ("prune", "prune", "abstain", "keep", "keep")
    assert "stepped back from 3 to 2" in plan.notes[0]
    assert "4.1 nats" in plan.blocks[2].reasons[2]
    assert plan.evidence["checked"]["num_removed"] == 2
    assert outcomes(decide(scored, nested(order, (0, 0.0), (2, -3.9), (3, -4.1)), max_worse=2.1), "2")[2] == "prune"


def test_a_better_reduced_network_passes(mlp_spec, by_hand):
    plan = decide(
        by_hand(mlp_spec, odds(b2=[9, 8, 7, -3, -3])), nested([16, 17, 18, *range(16), 19, 20], (0, 0), (3, 6.0))
    )
    assert plan.kept()["2"] == [3, 4]
    assert plan.notes == ()


def test_poor_guide_is_said(mlp_spec, by_hand):
    plan = decide(by_hand(mlp_spec, odds()), nested(range(21), (0, 0.0), khat=1.5))
    assert "k-hat 1.50 > 0.70" in plan.notes[0]


@pytest.mark.parametrize(("gain", "is_said"), [(-3.0, True), (9.9, True), (10.1, False), (np.nan, False)])
def test_a_worthless_fit_is_said(mlp_spec, by_hand, gain, is_said):
    """Two standard errors of five nats; under every rule, and whatever it prunes."""
    path = nested(range(21), (0, 0.0), gain=gain)
    for rule in (None, PosteriorOdds()):
        plan = decide(by_hand(mlp_spec, odds()), path, rule)
        assert any("the fit is worthless" in note for note in plan.notes) is is_said
    if is_said:
        assert f"its ELPD is {gain:.3g} nats (SE 5) above that of a predictor" in " ".join(plan.notes)


def test_block_is_never_emptied(mlp_spec, by_hand):
    scored = by_hand(mlp_spec, odds(b2=[3, 4, 2, 5, 6]))
    plan = decide(scored)
    assert plan.kept()["2"] == [2]
    assert "its best one was kept" in " ".join(plan.notes)
    with pytest.raises(PlanError, match="all 5 groups pruned"):
        decide(scored, empty_block="raise")


def test_budget_is_met_in_the_order_of_the_odds(mlp_spec, by_hand):
    values = odds(b0=np.arange(-10.0, 0), b2=[-20.0, -21, -22, -23, -24], input=np.full(6, -30.0))
    free = decide(by_hand(mlp_spec, values))
    plan = decide(by_hand(mlp_spec, values), budget=free.parameters[0] - 30)
    assert plan.parameters[1] <= free.parameters[0] - 30
    gone = [i for i in range(10) if i not in plan.kept()["0"]]
    assert gone == list(range(10 - len(gone), 10)) and plan.kept()["2"] == [0, 1, 2, 3, 4]
    assert f"{len(gone)} groups were pruned only to meet the budget" in plan.notes


def test_budget_asks_for_few_forecasts_however_many_groups_leave(by_hand, monkeypatch):
    net = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 2))
    spec = trace_groups(net, torch.randn(2, 6), prune_inputs=False)
    values = {b.name: [float(-i) for i in range(b.size)] for b in spec.blocks}
    calls = []
    forecast = GroupSpec.forecast
    monkeypatch.setattr(GroupSpec, "forecast", lambda self, kept: calls.append(1) or forecast(self, kept))
    plan = decide(by_hand(spec, values), budget=500)
    assert 500 - 9 < plan.parameters[1] <= 500  # the smallest step is one unit: 6 inputs, a bias, 2 outputs
    assert len(calls) < 40


def test_impossible_budget_says_what_is_possible(mlp_spec, by_hand):
    with pytest.raises(BudgetError, match="at least 8, with one group left"):
        decide(by_hand(mlp_spec, odds()), budget=7)  # 1-1-1-2: (1 + 1) + (1 + 1) + (2 + 2) = 8
    assert decide(by_hand(mlp_spec, odds()), budget=8).parameters[1] == 8


def test_rule_is_in_the_plan(mlp_spec, by_hand):
    plan = decide(by_hand(mlp_spec, odds()), prior_odds="learned", z=3.0)
    assert plan.rule == {
        "reduction": "by hand", "epsilon": 0.01, "prior_odds": "learned", "z": 3.0, "max_worse": 2.0, "budget": None,
    }  # fmt: skip


def test_widths_are_rounded_up_with_the_least_certain_groups(mlp_spec, by_hand):
    values = odds(b0=[9, 1, 8, -3, 7, 2, -4, 6, -5, 5], b2=[1, 2, 3, 4, -5], input=[-1, -1, -1, -1, 1, 2])
    plan = decide(by_hand(mlp_spec, values), round_to=4)
    assert plan.kept() == {"input": [0, 1, 2, 3], "0": [1, 3, 6, 8], "2": [0, 1, 2, 4]}
    assert "multiple of 4 (was: log odds of being negligible 1 > 0)" in plan.blocks[1].reasons[1]
    assert plan.rule["round_to"] == 4 and "4 groups came back to make widths multiples of 4" in plan.notes
    assert decide(by_hand(mlp_spec, values), round_to=8).widths == {"input": (6, 6), "0": (10, 8), "2": (5, 5)}
    with pytest.raises(BudgetError, match="round_to=4"):
        decide(by_hand(mlp_spec, values), round_to=4, budget=plan.parameters[1] - 1)
    with pytest.raises(ConfigError, match="round_to: got 0"):
        decide(by_hand(mlp_spec, values), round_to=0)


def test_real_decision_keeps_what_made_the_labels(compressed):
    assert compressed.plan.kept()["input"] == [0, 1]
    assert compressed.plan.parameters[1] < compressed.plan.parameters[0] / 3


def test_removals_that_no_candidate_covers_are_kept_back(mlp_spec, by_hand):
    """Other odds than the evidence was made with may want more, or fewer, than any candidate removes."""
    order = [16, 17, 18, *range(16), 19, 20]
    scored = by_hand(mlp_spec, odds(b2=[9, 8, 7, 6, -3]))
    plan = decide(scored, nested(order, (0, 0.0), (2, -1.0)))
    assert outcomes(plan, "2") == ("prune", "prune", "abstain", "abstain", "keep")
    assert "no candidate that removes it" in plan.blocks[2].reasons[2]
    fewer = by_hand(mlp_spec, odds(b2=[9, -8, -7, -6, -3]))
    assert outcomes(decide(fewer, nested(order, (0, 0.0), (3, -1e4))), "2")[0] == "abstain"
    assert outcomes(decide(fewer, nested(order, (0, 0.0), (3, -1.0))), "2")[0] == "prune"


def test_budget_counts_the_groups_that_are_given_back(mlp_spec, by_hand):
    emptied = odds(b2=[3, 4, 2, 5, 6])
    free = decide(by_hand(mlp_spec, emptied))
    plan = decide(by_hand(mlp_spec, emptied), budget=free.parameters[1] - 5)
    assert plan.parameters[1] <= free.parameters[1] - 5
    assert plan.kept()["2"] == [2]


def test_unknown_monte_carlo_error_abstains(mlp_spec, by_hand):
    assert outcomes(decide(by_hand(mlp_spec, odds(b2=[3, 3, 3, -3, -3]), mcse=np.nan)), "2")[0] == "abstain"
