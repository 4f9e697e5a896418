"""The largest of many numbers against sorting, in chunks of seven."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyrobc.bmr.sparsity as sparsity
import pyrobc.selection as selection
from pyrobc.bmr import learn_inclusion, learn_log_odds
from pyrobc.selection import find_largest, split_flat

numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, math.nan, math.inf, -math.inf, 1.7e308]),
)


def find_by_sorting(scores: dict[str, torch.Tensor], count: int) -> list[int]:
    """Positions in the joined scores: descending, and of equal ones the first."""
    flat = torch.cat([score.flatten() for score in scores.values()]).numpy()
    order = sorted(np.flatnonzero(np.isfinite(flat)), key=lambda i: (-flat[i], i))
    return sorted(order[:count])


@given(st.lists(numbers, max_size=40), st.lists(numbers, max_size=20), st.integers(0, 70))
def test_as_sorting_finds_them(first: list[float], second: list[float], count: int) -> None:
    scores = {"a": torch.tensor(first, dtype=torch.float64), "b": torch.tensor(second, dtype=torch.float64)[:, None]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK", 7)
        found = find_largest(scores, count)
    assert found["b"].shape == scores["b"].shape
    flat = torch.cat([where.flatten() for where in found.values()])
    assert flat.nonzero().squeeze(1).tolist() == find_by_sorting(scores, count)


def test_numbers_that_differ_in_the_last_bit() -> None:
    """All four passes are needed."""
    close = torch.tensor([1.0, np.nextafter(1.0, 2.0), np.nextafter(1.0, 0.0)], dtype=torch.float64).repeat(5)
    for count in range(16):
        found = find_largest({"a": close}, count)["a"]
        assert found.nonzero().squeeze(1).tolist() == find_by_sorting({"a": close}, count)


def test_single_precision_beside_double() -> None:
    scores = {"a": torch.tensor([3.0, -1.0, math.nan]), "b": torch.tensor([2.0, 4.0], dtype=torch.float64)}
    found = find_largest(scores, 3)
    assert found["a"].tolist() == [True, False, False] and found["b"].tolist() == [True, True]


def test_chunks_are_views() -> None:
    tensor = torch.zeros(5, 7)
    for chunk in split_flat(tensor):
        chunk += 1
    assert bool((tensor == 1).all())


@pytest.mark.parametrize("case", ["mixed", "spread", "all kept", "undefined", "few"])
def test_odds_learned_in_chunks_are_those_of_all_at_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    prices = torch.randn(5000, generator=generator, dtype=torch.float64)
    prices = {
        "mixed": torch.where(prices > 1, -40 * prices, 2 + 0.3 * prices),
        "spread": 30 * prices,
        "all kept": -prices.abs() - 1,
        "undefined": torch.where(prices > 1, torch.nan, torch.where(prices < -2, -torch.inf, 5 * prices)),
        "few": torch.where(torch.arange(5000) == 4999, 3.0, torch.nan),  # none in the sample
    }[case]
    plain = learn_log_odds(prices)
    assert plain == learn_inclusion(prices).log_odds
    passes = []
    step = torch.sigmoid
    monkeypatch.setattr(selection, "CHUNK", 400)
    monkeypatch.setattr(sparsity, "_SAMPLE", 400)
    monkeypatch.setattr(torch, "sigmoid", lambda x: passes.append(len(x)) or step(x))
    chunked = learn_log_odds(prices)
    assert float(chunked) == pytest.approx(float(plain), abs=2e-8)
    assert max(passes) <= 400
    if case in ("mixed", "spread"):
        rounds = sum(passes) / 5000
        assert rounds < 15, "Newton's steps save passes over all"
