"""The automatic cut: heaps made by hand, the chance of a gap against Monte Carlo, and what must not matter."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pyrobc.gap import LARGEST_CHANCE, find_gap

finite = st.floats(-1e6, 1e6, allow_subnormal=False)
scores = st.lists(finite | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=40)


def heaps(*sizes_and_places: tuple[int, float]) -> list[float]:
    """Evenly filled heaps, each one wide."""
    return [place + i / max(size - 1, 1) for size, place in sizes_and_places for i in range(size)]


@pytest.mark.parametrize(("low", "high"), [(20, 20), (39, 1), (1, 39), (5, 12)])
def test_two_heaps_are_cut_in_the_middle_of_the_gap(low: int, high: int) -> None:
    top = 0.0 if low == 1 else 1.0
    values = heaps((low, 0.0), (high, 7.0))
    found = find_gap(values)
    assert found == (pytest.approx((top + 7.0) / 2), pytest.approx(7.0 - top), "")
    assert sum(v > found.cut for v in values) == high


def test_wider_of_two_gaps_where_there_are_three_heaps() -> None:
    """0-1, 8-9 and 1 at 30: below the wider gap are two heaps whose quartiles are 8 apart."""
    assert find_gap(heaps((15, 0.0), (15, 8.0), (2, 30.0))).cut == pytest.approx(19.5)
    assert "narrower than a heap" in find_gap(heaps((15, 0.0), (15, 8.0), (2, 16.5))).reason


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "0 finite scores"),
        ([3.0], "1 finite score,"),
        ([1.0, 9.0], "2 finite scores"),
        ([math.nan, math.inf, -math.inf, 1.0, 2.0], "2 finite scores"),
        ([2.5] * 30, "all scores are equal"),
        (list(range(30)), "several gaps are 1 wide"),
        ([0.0] * 9 + [5.0] * 9 + [10.0] * 9, "several gaps are 5 wide"),
        ([*np.linspace(0, 10, 30), 12.0], "the widest gap, 2, is narrower than a heap beside it, 5"),
        ([0.0, 1.0, 3.0], "the widest gap, 2, is no wider than 3 evenly thrown scores may leave"),
        ([-1.7e308, 0.0, 1.7e308], "too far apart"),
    ],
)  # fmt: skip
def test_no_cut_without_a_gap(values: list[float], reason: str) -> None:
    found = find_gap(values)
    assert math.isnan(found.cut) and math.isnan(found.width)
    assert found.reason.startswith("no gap to cut at: ") and reason in found.reason


def test_what_is_not_finite_is_left_aside() -> None:
    values = heaps((10, 0.0), (10, 9.0))
    assert find_gap([*values, math.nan, math.inf, -math.inf]) == find_gap(values)


@hypothesis.given(scores, st.randoms(use_true_random=False))
def test_order_does_not_matter(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert repr(find_gap(shuffled)) == repr(find_gap(values))


@hypothesis.given(scores, st.integers(-20, 20))
def test_unit_does_not_matter(values: list[float], power: int) -> None:
    """Powers of two stretch floating-point numbers exactly."""
    found, stretched = find_gap(values), find_gap([v * 2.0**power for v in values])
    np.testing.assert_equal(stretched[:2], (found.cut * 2.0**power, found.width * 2.0**power))


@hypothesis.given(scores)
def test_a_cut_parts_the_scores_at_a_gap(values: list[float]) -> None:
    found = find_gap(values)
    if not math.isnan(found.cut):
        known = np.array([v for v in values if math.isfinite(v)])
        below, above = known[known <= found.cut], known[known > found.cut]
        assert len(below) and len(above)
        assert above.min() - below.max() == found.width


@pytest.mark.parametrize("n", [4, 10, 40])
def test_even_scores_are_rarely_cut(n: int) -> None:
    """The third condition alone bounds the rate; 2,000 samples, four standard errors."""
    draws = np.random.default_rng(n).uniform(size=(2000, n))
    rate = np.mean([not math.isnan(find_gap(row).cut) for row in draws])
    assert rate <= LARGEST_CHANCE + 4 * math.sqrt(LARGEST_CHANCE / 2000)


def test_chance_of_a_gap_against_monte_carlo() -> None:
    """Of n - 2 uniform points the widest of the n - 1 spacings exceeds x >= 1/2 with probability (n-1)(1-x)^(n-2)."""
    n, x = 6, 0.55
    ends = np.broadcast_to([0.0, 1.0], (200_000, 2))
    points = np.sort(np.hstack([np.random.default_rng(0).uniform(size=(200_000, n - 2)), ends]), axis=1)
    rate = (np.diff(points, axis=1).max(axis=1) > x).mean()
    exact = (n - 1) * (1 - x) ** (n - 2)
    assert rate == pytest.approx(exact, abs=4 * math.sqrt(exact / 200_000))
