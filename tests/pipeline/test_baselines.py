"""Published scores through the interface of log Bayes factors: scored, cut at the gap, decided on, explained."""

import math
import re

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrobc.batches import seeded
from pyrobc.compress import Result, compress
from pyrobc.decide import decide
from pyrobc.dists import SoftCapped
from pyrobc.errors import BudgetError, ConfigError, PlanError, ReductionError
from pyrobc.family import make_family
from pyrobc.figures import draw_odds_sensitivity, draw_scores
from pyrobc.plan import Plan
from pyrobc.report import write_report
from pyrobc.scores import Score, score


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    with seeded(7):
        x = torch.randn(300, 10)
        return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


@pytest.fixture(scope="module")
def result(data: tuple[Tensor, Tensor]) -> Result:
    """Ten inputs, of which two make the labels; twelve hidden units, of which one is enough."""
    with seeded(0):
        net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 2))
    return compress(
        net, data, family="group_normal_jeffreys", family_args={"num_draws": 4}, reduction="log_alpha", epochs=300,
        readapt_epochs=0, lr=3e-2, batch_size=100, num_draws=30, progress=False,
    )  # fmt: skip


def scored_by_hand(spec: object, by_hand: object, values: dict[str, list[float]], cuts: dict[str, float]) -> Score:
    import dataclasses

    made = by_hand(spec, values, reasons={n: "no gap" for n, c in cuts.items() if math.isnan(c)})  # type: ignore[operator]
    return dataclasses.replace(made, label="some_score", unit="apples", cuts=cuts)


def test_two_heaps_of_log_alpha_are_found_in_a_fit(result: Result) -> None:
    """The cut lies where posterior odds put it: the inputs that made the labels stay, the other eight leave."""
    assert result.plan.kept()["input"] == [0, 1]
    assert len(result.plan.kept()["0"]) == 1
    assert result.plan.rule["baseline"] == "log_alpha" and "prior_odds" not in result.plan.rule
    assert result.net(torch.randn(3, 10)).shape == (3, 2)


def test_scores_are_those_of_the_laws(result: Result) -> None:
    cut = result.posterior  # of the compact network
    found, laws = score(cut, "log_alpha"), cut.scales()
    for name, scale in laws.items():
        ratio = scale.posterior.variance / scale.posterior.mean.square()
        np.testing.assert_allclose(found.delta_f[name], ratio.log(), rtol=1e-6)
    assert found.unit == "log variance over squared mean"
    assert list(found.to_frame().columns[:3]) == ["log_alpha", "mcse", "above_cut"]


def test_plan_says_which_score_decided(result: Result) -> None:
    plan = result.plan
    assert re.fullmatch(
        r"input\[5\]: prune: log_alpha minus its cut \S+ > 0 \(log_alpha = \S+, minus its cut = \S+\) "
        r"by BeyondCut\(\) & Predictive\(max_worse=2.0\) on log_alpha",
        plan.explain("input[5]"),
    )
    assert "nats" not in plan.explain("input[0]")
    assert Plan.from_json(plan.to_json()).rule == plan.rule
    assert "log_alpha minus its cut" in draw_scores(plan).svg and "shift of the cuts" in draw_odds_sensitivity(plan).svg


def test_report_says_which_score_decided(result: Result, tmp_path: object) -> None:
    page = write_report(result, tmp_path / "report.html").read_text(encoding="utf-8")  # type: ignore[operator]
    assert "<th>log_alpha</th><th>log_alpha minus its cut</th>" in page
    assert "\u0394F (nats)" not in page and "log odds" not in page


def test_default_decision_stays_posterior_odds(compressed: object) -> None:
    posterior = compressed.posterior  # type: ignore[attr-defined]
    assert score(posterior).label == "rope" and score(posterior).cuts is None
    by_noise = decide(score(posterior, "log_noise"))
    assert by_noise.kept()["input"] == [0, 1]


def test_above_the_cut_is_pruned(mlp_spec: object, by_hand: object) -> None:
    values = {"input": [0.0] * 6, "0": [-3.0, 5.0] * 5, "2": [1.0, 2.0, 3.0, math.nan, math.inf]}
    plan = decide(scored_by_hand(mlp_spec, by_hand, values, {"input": math.nan, "0": 1.0, "2": 2.0}))
    outcomes = {b.name: b.outcomes for b in plan.blocks}
    assert outcomes["input"] == ("abstain",) * 6, "no gap, no decision"
    assert outcomes["0"] == ("keep", "prune") * 5
    assert outcomes["2"] == ("keep", "abstain", "prune", "abstain", "abstain")
    assert plan.blocks[0].reasons[0] == "undefined: no gap"
    assert plan.rule == {
        "baseline": "some_score", "unit": "apples", "cuts": {"input": None, "0": 1.0, "2": 2.0}, "max_worse": 2.0,
        "budget": None,
    }  # fmt: skip


def test_budget_follows_the_distance_from_the_cut(mlp_spec: object, by_hand: object) -> None:
    values = {"input": [-30.0] * 6, "0": [float(i) for i in range(-10, 0)], "2": [-20.0] * 5}
    made = scored_by_hand(mlp_spec, by_hand, values, {"input": 0.0, "0": 0.0, "2": 0.0})
    plan = decide(made, budget=decide(made).parameters[0] - 20)
    gone = [i for i in range(10) if i not in plan.kept()["0"]]
    assert gone and gone == list(range(10 - len(gone), 10))
    assert "some_score minus its cut" in plan.blocks[1].reasons[9]
    with pytest.raises(BudgetError):
        decide(made, budget=1)
    with pytest.raises(PlanError, match="all 10 groups pruned"):
        decide(scored_by_hand(mlp_spec, by_hand, values, {"input": 0.0, "0": -99.0, "2": 0.0}), empty_block="raise")


def test_horseshoe_score_is_minus_the_log_of_the_mode() -> None:
    """The mode of a log-normal, found on a grid; a slab changes nothing."""
    law = dist.LogNormal(torch.tensor([0.3, -2.0]).double(), torch.tensor([0.5, 1.5]).double())
    of = make_family("group_horseshoe").baselines()["negative_log_mode"].of
    grid = torch.linspace(-8, 2, 200_001, dtype=torch.float64)[:, None].exp()
    modes = grid[law.log_prob(grid).argmax(0), 0]
    torch.testing.assert_close(of(law), -modes.log(), rtol=0, atol=1e-4)
    torch.testing.assert_close(of(SoftCapped(law, 1.0)), of(law))


def test_odds_of_a_baseline_are_refused(result: Result) -> None:
    with pytest.raises(
        ReductionError, match="prior odds for the baseline 'log_alpha': got 'learned'.*leave prior_odds"
    ):
        score(result.posterior, "log_alpha").log_odds("learned")
    with pytest.raises(ReductionError, match="allowed: rope, log_alpha, l2, magnitude; fix: did you mean 'log_alpha'"):
        score(result.posterior, "log_alfa")


def test_refused_before_the_fit(data: tuple[Tensor, Tensor]) -> None:
    net = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="none for a baseline"):
        compress(net, data, family="group_normal_jeffreys", reduction="log_alpha", prior_odds=0.5)
    with pytest.raises(ConfigError, match="allowed: rope, negative_log_mode, l2, magnitude; fix: did you mean"):
        compress(net, data, family="group_horseshoe", reduction="negative_log_node")
