"""Decision rules alone and composed, against simulation, scipy, brute force and the networks they leave."""

import dataclasses
import inspect
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit

from pyrobc import rules
from pyrobc.cli import main
from pyrobc.decide import decide
from pyrobc.errors import BudgetError, ConfigError, DataError, ReductionError
from pyrobc.evidence import Evidence
from pyrobc.plan import Plan
from pyrobc.rules import (
    BeyondCut,
    Budget,
    FalsePruneRate,
    HighestDensity,
    OnScore,
    PosteriorOdds,
    Predictive,
    Rule,
    Verdict,
    make_rule,
)
from pyrobc.rules.registry import RULES
from pyrobc.scores import score
from pyrobc.surgery import apply

BLOCKS = {"input": 6, "0": 10, "2": 5}


def spread(values):
    """Twenty-one numbers over the blocks."""
    values = np.asarray(values, dtype=float)
    edges = np.cumsum(list(BLOCKS.values()))[:-1]
    return dict(zip(BLOCKS, np.split(values, edges), strict=True))


def flatten(outcomes):
    return [row[0] for rows in outcomes.values() for row in rows]


class Says(Rule):
    """Gives the outcomes it was made with."""

    name = "stub"

    def __init__(self, outcomes):
        self.said = outcomes

    def judge(self, score, evidence=None):
        parts = spread(np.arange(len(self.said)))
        outcomes = {
            name: [(self.said[int(i)], f"because {self.said[int(i)]}") for i in part] for name, part in parts.items()
        }
        return Verdict(outcomes, parts, notes=("seen",))


def path_of(*rows, order=range(21), se=2.0):
    candidates = [SimpleNamespace(num_removed=n, diff=d, se=se, khat_bad=0.0) for n, d in rows]
    return SimpleNamespace(
        candidates=candidates,
        order=np.asarray(order),
        method="by hand",
        posterior_khat=0.1,
        good_k=0.7,
        gain=50.0,
        gain_se=5.0,
    )


def draws_of(*laws):
    """Evidence whose draws of the multiplier are evenly spaced quantiles of 21 laws."""
    grid = (np.arange(4001) + 0.5) / 4001
    values = np.stack([law.ppf(grid) for law in laws], axis=1)[None]
    tree = xr.DataTree.from_dict({"posterior": xr.Dataset({"multiplier": (("chain", "draw", "group"), values)})})
    return Evidence(tree, (), np.arange(21), 0.1, 0.7, "by hand")


@pytest.mark.parametrize(("sign", "table"), [("&", "kkkkaakap"), ("|", "kapaapppp")])
def test_composition_is_three_valued_logic(mlp_spec, by_hand, sign, table):
    """All nine pairs, keep < abstain < prune; the reason names both rules and what each said."""
    pairs = list(itertools.product(("keep", "abstain", "prune"), repeat=2))
    rest = [("keep", "keep")] * 12
    first, second = (Says([pair[i] for pair in pairs + rest]) for i in (0, 1))
    both = first & second if sign == "&" else first | second
    verdict = both.judge(by_hand(mlp_spec, spread(np.zeros(21))))
    assert [outcome[0] for outcome in flatten(verdict.outcomes)[:9]] == list(table)
    assert verdict.outcomes["input"][1][1] == f"stub: keep (because keep) {sign} stub: abstain (because abstain)"
    assert verdict.notes == ("seen",)


def test_brackets_and_order_change_no_outcome(mlp_spec, by_hand):
    scored = by_hand(mlp_spec, spread(np.zeros(21)))
    triples = list(itertools.product(("keep", "abstain", "prune"), repeat=3))[:21]
    a, b, c = (Says([triple[i] for triple in triples]) for i in range(3))
    for left, right in (((a & b) & c, c & (b & a)), ((a | b) | c, c | (b | a)), (a & (b | c), (a & b) | (a & c))):
        assert flatten(left.judge(scored).outcomes) == flatten(right.judge(scored).outcomes)


@settings(max_examples=12)
@given(
    level=st.sampled_from([0.01, 0.05, 0.1, 0.3]),
    centre=st.floats(-2, 3),
    width=st.floats(0.5, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_false_prune_rate_is_held_where_probabilities_are_calibrated(mlp_spec, by_hand, level, centre, width, seed):
    """Truth drawn from the odds themselves: the realised share of needed groups among the pruned, 200 networks."""
    generator = np.random.default_rng(seed)
    shares = []
    for _ in range(200):
        odds = generator.normal(centre, width, 21)
        is_needed = generator.random(21) < expit(-odds)
        is_pruned = np.array(flatten(FalsePruneRate(level).judge(by_hand(mlp_spec, spread(odds))).outcomes)) == "prune"
        shares.append((is_pruned & is_needed).sum() / max(is_pruned.sum(), 1))
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= level + 4 * max(error, 0.5 * level / np.sqrt(200))


@given(seed=st.integers(0, 2**32 - 1), level=st.sampled_from([0.02, 0.1, 0.2]))
@settings(max_examples=25)
def test_no_larger_set_would_do(mlp_spec, by_hand, seed, level):
    """Against all subsets of ten undecided groups, the other eleven being needed for sure."""
    odds = np.full(21, -50.0)
    odds[:10] = np.random.default_rng(seed).normal(2, 1.5, 10)
    pruned = flatten(FalsePruneRate(level).judge(by_hand(mlp_spec, spread(odds))).outcomes).count("prune")
    needed = expit(-odds[:10])
    sets = (list(s) for size in range(1, 11) for s in itertools.combinations(np.flatnonzero(needed < 0.5), size))
    best = max((len(s) for s in sets if needed[s].mean() <= level), default=0)
    assert pruned == best


def test_false_prune_rate_says_what_it_did(mlp_spec, by_hand):
    odds = np.full(21, -9.0)
    odds[:4] = [5.0, 4.0, 0.5, np.nan]
    plan = decide(by_hand(mlp_spec, spread(odds)), rule=FalsePruneRate(0.05))
    assert plan.blocks[0].outcomes == ("prune", "prune", "abstain", "abstain", "keep", "keep")
    mean = expit([-5.0, -4.0]).mean()
    assert f"on average {mean:.3g} <= 0.05 over the 2 pruned" in plan.explain("input[0]")
    assert f"the average would be {expit([-5.0, -4.0, -0.5]).mean():.3g} > 0.05" in plan.explain("input[2]")
    assert "undefined" in plan.explain("input[3]") and plan.num_abstained == 2
    unsure = decide(by_hand(mlp_spec, spread(odds), mcse=1.5), rule=FalsePruneRate(0.05))
    assert unsure.blocks[0].outcomes[:2] == ("abstain", "abstain"), "two standard errors lower: 2 and 1"


def test_learned_odds_know_how_many_are_needed(mlp_spec, by_hand):
    """The same evidence on one group convinces in a block where the rest is negligible, and not where it is needed."""
    values = {"input": [2.0, -12.0] + [12.0] * 4, "0": [2.0] + [-12.0] * 9, "2": [-12.0] * 5}
    plan = decide(by_hand(mlp_spec, values), rule=FalsePruneRate(0.05, prior_odds="learned"))
    assert [block.outcomes[0] for block in plan.blocks] == ["prune", "keep", "keep"]


LAWS = {
    "normal": (scipy.stats.norm(1.0, 0.2), (0.6080, 1.3920)),  # 1 -+ 1.959964 x 0.2
    "exponential": (scipy.stats.expon(), (0.0, -np.log(0.05))),
    "log-normal": (scipy.stats.lognorm(0.8), None),
}


@pytest.mark.parametrize("name", LAWS)
def test_interval_is_the_shortest(mlp_spec, by_hand, name):
    """Against the known interval, or the shortest between two quantiles of scipy; its ends decide."""
    law, bounds = LAWS[name]
    if bounds is None:
        start = minimize_scalar(
            lambda p: law.ppf(p + 0.95) - law.ppf(p), bounds=(1e-9, 0.05 - 1e-9), method="bounded"
        ).x
        bounds = law.ppf(start), law.ppf(start + 0.95)
    found = draws_of(*[law] * 21)
    np.testing.assert_allclose(found.hdi(0.95)[3], bounds, atol=0.02)
    edges = spread(
        [bounds[1] + 0.05, bounds[1] - 0.05, bounds[0] + 0.05, max(bounds[0] - 0.05, 0.01), np.nan] + [9.0] * 16
    )
    scored = dataclasses.replace(by_hand(mlp_spec, spread(np.zeros(21))), threshold=edges)
    outcomes = flatten(HighestDensity(0.95).judge(scored, found).outcomes)
    outside = "abstain" if name == "exponential" else "keep"
    assert outcomes[:6] == ["prune", "abstain", "abstain", outside, "abstain", "prune"]


def test_a_constant_multiplier_is_inside_or_outside(mlp_spec, by_hand):
    scored = dataclasses.replace(by_hand(mlp_spec, spread(np.zeros(21))), threshold=spread([0.5, 2.0] + [1.0] * 19))
    found = draws_of(*[scipy.stats.uniform(1.0, 0.0)] * 21)
    found.tree["posterior"]["multiplier"].values[:] = 1.0
    assert flatten(HighestDensity().judge(scored, found).outcomes)[:3] == ["keep", "prune", "keep"]


def test_smallest_candidate_that_predicts_as_well(mlp_spec, by_hand):
    scored = by_hand(mlp_spec, spread(np.full(21, -1.0)))
    path = path_of((0, 0.0), (3, -1.9), (5, -2.1), (8, np.nan), (9, -np.inf))
    plan = decide(scored, path, Predictive(1.0))
    assert [i for i, outcome in enumerate(o for b in plan.blocks for o in b.outcomes) if outcome == "prune"] == [
        0,
        1,
        2,
    ]
    assert "one of 3 groups whose removal changes the ELPD by -1.9 nats, not below -1 x SE 2" in plan.explain(
        "input[0]"
    )
    assert plan.explain("input[4]").startswith("input[4]: abstain: kept back: removing 5 groups costs 2.1 nats")
    assert plan.evidence["checked"]["num_removed"] == 3 and plan.num_abstained == 18
    undefined = by_hand(mlp_spec, spread([np.nan] + [-1.0] * 20))
    assert decide(undefined, path, Predictive(1.0)).blocks[0].outcomes[:2] == ("abstain", "prune")


def test_default_is_odds_and_prediction(compressed):
    default = decide(compressed.score, compressed.evidence)
    composed = decide(compressed.score, compressed.evidence, PosteriorOdds() & Predictive())
    assert [b.outcomes for b in composed.blocks] == [b.outcomes for b in default.blocks]
    assert composed.kept() == default.kept()


def test_every_rule_keeps_what_made_the_labels(compressed):
    for rule in (FalsePruneRate(0.05), HighestDensity(), Predictive(), PosteriorOdds() & HighestDensity()):
        plan = decide(compressed.score, compressed.evidence, rule)
        assert {0, 1} <= set(plan.kept()["input"]) and plan.parameters[1] < plan.parameters[0], rule


@pytest.mark.parametrize("unit", ["parameters", "macs", "bytes"])
def test_budget_is_met_by_the_network_that_is_left(compressed, unit):
    full = {"parameters": 132, "macs": 120, "bytes": 528}[unit]
    rule = Budget(**{unit: full // 2})
    plan = decide(compressed.score, rule=rule)
    net = apply(plan, compressed.posterior)
    stored = sum(tensor.numel() for tensor in net.state_dict().values())
    spent = {"parameters": sum(p.numel() for p in net.parameters()), "macs": plan.macs[1], "bytes": 4 * stored}[unit]
    assert spent <= full // 2
    last = min(
        (odds, block.name, i)
        for block in plan.blocks
        for i, (outcome, odds) in enumerate(zip(block.outcomes, block.log_odds, strict=True))
        if outcome == "prune"
    )
    kept = {name: np.array(groups) for name, groups in plan.kept().items()}
    kept[last[1]] = np.sort(np.append(kept[last[1]], last[2]))
    spec = compressed.score.spec
    sizes = {"bytes": 4 * sum(int(np.prod(s)) for s in spec.restricted(kept).tensors.values())}
    sizes |= dict(zip(("parameters", "macs"), spec.forecast(kept), strict=True))
    assert sizes[unit] > full // 2, "the last group to leave had to"


def test_budget_adds_to_the_odds(mlp_spec, by_hand):
    scored = by_hand(mlp_spec, spread([3.0, 2.0] + list(np.linspace(-1, -9, 19))))
    free = decide(scored)
    plan = decide(scored, rule=PosteriorOdds() | Budget(parameters=free.parameters[1] - 20))
    assert plan.parameters[1] <= free.parameters[1] - 20
    assert set(plan.kept()["input"]) < set(free.kept()["input"])
    with pytest.raises(BudgetError, match="got 7 parameters; allowed: at least 8"):
        decide(scored, rule=Budget(parameters=7))
    neither = decide(scored, rule=Budget(parameters=10**6, macs=10**6))
    assert neither.parameters[0] == neither.parameters[1]
    assert "the budget of 1000000 parameters and 1000000 macs is met without its removal" in neither.explain("2[0]")


def test_rules_may_look_at_other_scores(compressed):
    """A baseline beside the odds, and a wider ROPE beside the default one."""
    magnitude = score(compressed.posterior, "magnitude", cut=-10.0)
    plan = decide(compressed.score, rule=PosteriorOdds() & BeyondCut().on(magnitude))
    above = magnitude.log_odds()["input"] > 0
    pruned = np.array([outcome == "prune" for outcome in plan.blocks[0].outcomes])
    assert (pruned <= above).all()
    assert "cut on magnitude: prune (magnitude minus its cut" in plan.blocks[0].reasons[int(np.flatnonzero(above)[0])]
    assert "BeyondCut().on(magnitude" in plan.rule["by"] and plan.baseline is None


def test_reasons_of_composed_rules_can_be_read(mlp_spec, by_hand, tmp_path, capsys):
    odds = spread([3.0, -3.0] + [-1.0] * 19)
    plan = decide(
        by_hand(mlp_spec, odds), path_of((0, 0.0), (1, -9.0)), PosteriorOdds() & (FalsePruneRate(0.1) | Predictive())
    )
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    assert main(["inspect", str(tmp_path), "--group", "input[0]"]) == 0
    assert capsys.readouterr().out.strip() == (
        "input[0]: prune: posterior odds: prune (log odds of being negligible 3 > 0) & (false-prune rate: prune "
        "(probability of being needed 0.0474, on average 0.0474 <= 0.1 over the 1 pruned) | predictive: abstain (kept "
        "back: removing 1 groups costs 9 nats of ELPD, not known to be within 2 x SE 2)) (dF = 3 nats, log odds = 3) "
        f"by {plan.describe_rule()}"
    )
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-4:-2] == [
        "rule: PosteriorOdds(prior_odds='implied', z=2.0) & "
        "(FalsePruneRate(level=0.1, prior_odds='implied', z=2.0) | Predictive(max_worse=2.0)) "
        "on by hand with epsilon=0.01",
        "evidence: checked (diff 0, khat_bad 0, num_removed 0, se 2); method by hand; posterior_khat 0.1",
    ]
    assert Plan.from_json(plan.to_json()) == plan


def test_the_rule_of_a_plan_is_written_as_python(compressed):
    """The default one too, in the form that gives the same plan."""
    plain = decide(compressed.score, compressed.evidence)
    assert plain.describe_rule() == (
        "PosteriorOdds(prior_odds='implied', z=2.0) & Predictive(max_worse=2.0) on rope with epsilon=0.01"
    )
    small = decide(compressed.score, compressed.evidence, budget=60, round_to=2)
    assert small.describe_rule() == (
        "(PosteriorOdds(prior_odds='implied', z=2.0) & Predictive(max_worse=2.0)) | Budget(parameters=60), round_to=2 "
        "on rope with epsilon=0.01"
    )
    rule = eval(small.describe_rule().split(", round_to")[0])
    again = decide(compressed.score, compressed.evidence, rule, round_to=2)
    assert [b.outcomes for b in again.blocks] == [b.outcomes for b in small.blocks]
    by_cut = decide(score(compressed.posterior, "magnitude", cut=-10.0))
    assert by_cut.describe_rule() == "BeyondCut() on magnitude"


NAMED = {
    "predictive": Predictive(),
    "beyond_cut": BeyondCut(),
    '{"budget": {"macs": 60}}': Budget(macs=60),
    '{"false_prune_rate": null}': FalsePruneRate(),
    '{"all": ["posterior_odds", {"highest_density": {"probability": 0.9}}]}': PosteriorOdds() & HighestDensity(0.9),
    '{"any": [{"all": ["posterior_odds", "predictive"]}, {"budget": {"parameters": 9}}]}': (
        PosteriorOdds() & Predictive()
    )
    | Budget(parameters=9),
}


@pytest.mark.parametrize("text", NAMED)
def test_rules_by_name_are_the_rules(text):
    given = json.loads(text) if text.startswith("{") else text
    assert make_rule(given) == NAMED[text] and repr(make_rule(given)) == repr(NAMED[text])
    assert make_rule(NAMED[text]) is NAMED[text]


UNNAMED = {
    '"odds"': "did you mean 'posterior_odds'",
    '{"false_prune_rate": {"levle": 0.1}}': "did you mean 'level'",
    '{"false_prune_rate": {"level": "low"}}': "rule false_prune_rate: got",
    '{"false_prune_rate": {"level": 2}}': "a share between 0 and 1",
    '{"false_prune_rate": 0.05}': r"write \{false_prune_rate: \{level: 0.05\}\}",
    '{"beyond_cut": {"z": 1}}': "no settings",
    '{"posterior_odds": {"prior_odds": "sometimes"}}': "'implied', 'learned', 'none', or a probability",
    '{"posterior_odds": {}, "predictive": {}}': "got 2 keys, posterior_odds, predictive; .* under all or any",
    '{"all": "predictive"}': "a list of rules",
    '{"any": []}': "a list of rules",
    '["predictive"]': "a name, ",
    "3": "a name, ",
}


@pytest.mark.parametrize("text", UNNAMED)
def test_rules_that_have_no_meaning_are_refused(text):
    with pytest.raises(ConfigError, match=UNNAMED[text]):
        make_rule(json.loads(text))


def test_every_rule_has_a_name():
    assert set(RULES.values()) == {kind for kind in vars(rules).values() if inspect.isclass(kind)
                                   and issubclass(kind, Rule) and kind not in (Rule, OnScore)}  # fmt: skip


def test_what_makes_no_sense_is_refused(mlp_spec, by_hand, compressed):
    scored = by_hand(mlp_spec, spread(np.zeros(21)))
    for rule in (HighestDensity(), Predictive()):
        with pytest.raises(DataError, match="no evidence.*pass evidence"):
            decide(scored, rule=rule)
    with pytest.raises(ConfigError, match="got z, budget beside PosteriorOdds"):
        decide(scored, rule=PosteriorOdds(), z=3.0, budget=9)
    with pytest.raises(ConfigError, match="the class PosteriorOdds"):
        decide(scored, rule=PosteriorOdds)
    with pytest.raises(ConfigError, match="rule: got str"):
        PosteriorOdds() & "learned"
    makers = (lambda: FalsePruneRate(0.0), lambda: FalsePruneRate(prior_odds="none"), lambda: HighestDensity(1.0))
    for make in (*makers, lambda: Predictive(-1.0), lambda: PosteriorOdds(z=np.nan), Budget, lambda: Budget(macs=0)):
        with pytest.raises(ConfigError, match="; fix: "):
            make()
    baseline = score(compressed.posterior, "magnitude", cut=0.0)
    for rule in (PosteriorOdds(), FalsePruneRate()):
        with pytest.raises(ReductionError, match="use BeyondCut"):
            decide(baseline, rule=rule)
    with pytest.raises(ReductionError, match="allowed: a baseline"):
        decide(scored, rule=BeyondCut())
    with pytest.raises(ConfigError, match="another network"):
        decide(dataclasses.replace(scored, spec=mlp_spec.restricted({n: np.arange(3) for n in BLOCKS})),
               rule=PosteriorOdds().on(scored))  # fmt: skip
