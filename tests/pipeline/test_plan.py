"""Plans on disk: the same after a round trip, refused in one way when corrupted."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pyrobc.decide import decide
from pyrobc.errors import PlanError
from pyrobc.plan import Plan, read_plan
from pyrobc.surgery import apply


@pytest.fixture(scope="module")
def plan(mlp_spec, by_hand):
    odds = {"input": [5, -5, 5, -5, -5, -5], "0": np.linspace(-5, 4, 10), "2": [np.nan, np.inf, -np.inf, 3, -3]}
    return decide(by_hand(mlp_spec, odds, mcse=0.25))


@pytest.fixture(scope="module")
def text(plan):
    return plan.to_json()


def test_round_trip_is_exact(plan, text):
    again = Plan.from_json(text)
    assert again.to_json() == text
    assert again.slices == plan.slices and again.widths == plan.widths
    np.testing.assert_array_equal(again.blocks[2].log_odds, plan.blocks[2].log_odds)  # NaN and both infinities
    assert json.loads(text)["blocks"][2]["log_odds"][0] == {"float": "nan"}, "strict JSON has no NaN"


def test_text_is_deterministic(plan, text):
    assert dataclasses.replace(plan).to_json() == text


def replace_at(value, path, new):
    """A deep copy of JSON data with the node at ``path`` replaced; ``path`` is taken modulo what is there."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    chosen = keys[path[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[chosen] = replace_at(copy[chosen], path[1:], new)
    return copy


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def check_refused_or_whole(text):
    try:
        plan = Plan.from_json(text)
    except PlanError as error:
        assert "; allowed: a plan of format 1" in str(error)
        return
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert len(plan.widths) <= len(plan.blocks)
    assert plan.compression_ratio == plan.compression_ratio
    for block in plan.blocks:
        if block.size:
            plan.explain(f"{block.name}[0]")


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(path=st.lists(st.integers(0, 40), min_size=1, max_size=5), new=junk)
@example(path=[0, 0, 3, 0], new=None)
@example(path=[0, 0], new={"name": "x"})
def test_any_changed_node_is_refused_or_harmless(text, path, new):
    check_refused_or_whole(json.dumps(replace_at(json.loads(text), path, new)))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), cut=st.integers(0, 60), insert=st.text(max_size=4))
def test_any_damaged_text_is_refused_or_harmless(text, where, cut, insert):
    start = int(where * len(text))
    check_refused_or_whole(text[:start] + insert + text[start + cut :])


@pytest.mark.parametrize(
    "bad", ["", "null", "[]", "{}", "\x00", '{"format": 2}', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]
)
def test_what_is_no_plan_is_refused(bad):
    with pytest.raises(PlanError, match="allowed: a plan of format 1"):
        Plan.from_json(bad, "run/plan.json")


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(PlanError, match="FileNotFoundError"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="UnicodeDecodeError"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(PlanError):
        read_plan(tmp_path)


@pytest.mark.parametrize("kept", [[], [3, 2], [0, 0], [-1, 2], [0, 99], [0.5]])
def test_indices_that_no_network_has_are_refused(text, kept):
    data = json.loads(text)
    data["slices"][0]["kept"] = kept
    with pytest.raises(PlanError, match="kept"):
        Plan.from_json(json.dumps(data))


def test_explain_names_the_numbers_and_the_nearest_group(plan):
    assert plan.explain("2[3]").startswith("2[3]: prune: log odds of being negligible 3 > 0.5")
    assert "abstain: undefined" in plan.explain("2[0]")
    with pytest.raises(PlanError, match="did you mean 'input"):
        plan.explain("inptu[1]")


def test_diff_says_what_changed(plan, mlp_spec, by_hand):
    odds = {"input": [-5, -5, 5, -5, -5, -5], "0": np.linspace(-5, 4, 10), "2": [np.nan, np.inf, -np.inf, 3, -3]}
    other = decide(by_hand(mlp_spec, odds, mcse=0.25), z=1.0)
    assert plan.diff(plan) == []
    lines = plan.diff(other)
    assert "input[0]: prune -> keep" in lines and "z: 2.0 -> 1.0" in lines
    with pytest.raises(PlanError, match="another network"):
        plan.diff(dataclasses.replace(other, network={}))


def test_one_plan_after_another_is_one_plan(traced, keeping):
    """Cutting twice, and once by the composed plan, give the same tensors."""
    net, spec, inputs = traced
    first = keeping(spec, {b.name: [i for i in range(b.size) if i % 3 != 1] for b in spec.blocks})
    once = apply(first, net, example_inputs=inputs)
    smaller = spec.restricted({name: np.array(groups) for name, groups in first.kept().items()})
    later = keeping(smaller, {b.name: list(range(max(b.size - 1, 1))) for b in smaller.blocks})
    twice = apply(later, once, example_inputs=inputs)
    composed = first.then(later)
    direct = apply(composed, net, example_inputs=inputs)
    assert sum(p.numel() for p in direct.parameters()) == composed.parameters[1] == later.parameters[1]
    for (name, a), (_, b) in zip(twice.named_parameters(), direct.named_parameters(), strict=True):
        np.testing.assert_array_equal(a.detach(), b.detach(), err_msg=name)
    assert Plan.from_json(composed.to_json()) == composed
    with pytest.raises(PlanError, match="another network"):
        later.then(first)
