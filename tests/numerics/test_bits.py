"""Bits per weight against the published numbers, float32's own round-off, exact counts and brute force."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from numpy.typing import NDArray

from pyrobc.bits import (
    choose_widths,
    count_layer_weights,
    estimate_code_bits,
    exponent_bits,
    layer_bits,
    measure_rise,
    published_rates,
    round_to_grid,
    significand_bits,
    stored_step,
)
from pyrobc.errors import BudgetError, DataError


def test_weights_of_layers_by_hand() -> None:
    assert count_layer_weights([784, 300, 100, 10]) == [235_200, 30_000, 1_000]
    assert count_layer_weights([1, 20, 50], [25, 25]) == [500, 25_000]


def test_maximum_column_by_hand() -> None:
    # 8 weights, half zero, a quarter each of two values: 1.5 bits each, and three values of 32 bits.
    rates = published_rates([64], [8], [4], values=[[0, 0, 0, 0, 1.0, 1.0, -1.0, -1.0]])
    assert rates.maximum == pytest.approx(32 * 64 / (8 * 1.5 + 3 * 32))


@pytest.mark.parametrize(("variance", "bits"), [(0.01, 5), (0.001, 8), (0.2, 1), (0.3, 0), (1e-8, 23)])
def test_significand_bits_golden(variance: float, bits: int) -> None:
    assert significand_bits(variance) == bits


@hypothesis.given(
    st.one_of(
        st.floats(min_value=0.0, allow_infinity=True, allow_nan=False),
        st.integers(-60, 10).map(lambda k: 2.0**k),
        st.integers(-60, 10).map(lambda k: math.nextafter(2.0**k, math.inf)),
    )
)
def test_significand_bits_count_thresholds(variance: float) -> None:
    assert significand_bits(variance) == sum(2 * variance < 2.0**-k for k in range(1, 24))


def test_layer_bits_average_weights_or_variances() -> None:
    variance = [0.01, 0.001, 0.2]  # 5, 8 and 1 bits: mean 4.67; the mean variance, 0.0703, has 2
    assert layer_bits(variance) == (5, 9)
    assert layer_bits(variance, of="variance", exponent=2) == (2, 5)
    assert layer_bits([]) == (0, 4)


@pytest.mark.parametrize("largest", [1.0, 1.5, 2.0, 3.7, 8.0, 200.0])
def test_exponent_bits_as_published_from_one_up(largest: float) -> None:
    published = math.ceil(math.log2(math.log2(largest) + 1) + 1)
    assert exponent_bits([-largest, 0.1]) == published


@hypothesis.given(st.floats(min_value=5e-324, max_value=1.0))
def test_exponent_bits_where_the_published_formula_breaks(largest: float) -> None:
    bits = exponent_bits([largest])
    assert 2 ** (bits - 1) >= abs(math.log2(largest)) + 1  # the exponent fits beside its sign
    assert exponent_bits([0.0]) == 1


@hypothesis.given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.integers(0, 23), st.sampled_from([1.0, 0.7])
)
def test_rounding_stays_within_the_round_off(weights: list[float], bits: int, scale: float) -> None:
    step = scale * 2.0**-bits
    error = np.abs(round_to_grid(weights, step) * step - np.asarray(weights))
    assert error.max() <= step / 2 * (1 + 1e-9)


@hypothesis.given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=20), st.integers(1, 32))
def test_stored_numbers_take_their_bits(weights: list[float], bits: int) -> None:
    """At most 2^(b-1) steps either way, and at least half as many: half the grid is never empty."""
    step = stored_step(weights, bits)
    largest = np.abs(round_to_grid(weights, step)).max()
    assert largest <= 2 ** (bits - 1)
    if np.abs(weights).max() > 0:
        assert np.abs(weights).max() / step >= 2 ** (bits - 2)
    assert np.log2(step) == np.rint(np.log2(step))


def test_estimated_code_bits_are_entropy_and_learning() -> None:
    symbols = np.repeat([0, 1, 2], [512, 256, 256])
    assert estimate_code_bits(symbols) == pytest.approx(1024 * 1.5 + 2 * 0.5 * 10)
    assert estimate_code_bits(np.zeros(9)) == estimate_code_bits([]) == 0.0


def test_rise_is_the_divergence_of_moved_normals() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    weights, spread = rng.normal(size=50), rng.uniform(0.01, 1.0, 50)
    rounded = round_to_grid(weights, 0.25) * 0.25
    p, q = (torch.distributions.Normal(torch.tensor(m), torch.tensor(spread).sqrt()) for m in (weights, rounded))
    assert measure_rise(weights, spread, 0.25) == pytest.approx(float(torch.distributions.kl_divergence(p, q).sum()))


def test_zero_weights_lose_nothing_and_certain_ones_everything() -> None:
    assert measure_rise([0.0, 0.5], [0.0, 0.0], 0.5) == 0.0
    assert measure_rise([0.3], [0.0], 0.5) == math.inf


@pytest.fixture(scope="module")
def layers() -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    rng = np.random.default_rng(3)
    weights = {name: rng.normal(0, s, n) for name, s, n in (("a", 0.2, 400), ("b", 1.0, 60), ("c", 0.05, 150))}
    return weights, {name: rng.uniform(1e-4, 3e-2, w.shape) for name, w in weights.items()}


WIDTHS = range(0, 10)


def every_choice(layers: tuple[dict, dict]) -> list[tuple[float, float]]:  # type: ignore[type-arg]
    weights, variances = layers
    table = [
        [(estimate_code_bits(round_to_grid(w, 2.0**-t)), measure_rise(w, variances[n], 2.0**-t)) for t in WIDTHS]
        for n, w in weights.items()
    ]
    return [tuple(np.sum(choice, axis=0)) for choice in itertools.product(*table)]


@pytest.mark.parametrize("limit", [3.0, 10.0, 40.0, 150.0, 600.0])
def test_widths_against_brute_force(layers: tuple[dict, dict], limit: float) -> None:  # type: ignore[type-arg]
    choices = every_choice(layers)
    best = min(rate for rate, rise in choices if rise <= limit)
    got = choose_widths(*layers, max_rise=limit, candidates=WIDTHS)
    assert got.rise <= limit
    assert best <= got.code_bits <= 1.15 * best  # short by less than one step of one tensor
    # What is reached is a point of the optimal frontier: nothing is both cheaper and better.
    assert not any(rate < got.code_bits - 1e-6 and rise < got.rise - 1e-6 for rate, rise in choices)
    weights, variances = layers
    steps = {name: 2.0**-t for name, t in got.widths.items()}
    assert got.rise == pytest.approx(sum(measure_rise(weights[n], variances[n], steps[n]) for n in weights))


def test_widths_within_a_number_of_bits(layers: tuple[dict, dict]) -> None:  # type: ignore[type-arg]
    choices = every_choice(layers)
    for limit in (500.0, 1500.0, 3000.0):
        got = choose_widths(*layers, max_bits=limit, candidates=WIDTHS)
        best = min(rise for rate, rise in choices if rate <= limit)
        assert got.code_bits <= limit
        assert best <= got.rise <= 3 * best


def test_more_certain_weights_get_more_bits() -> None:
    weights = np.random.default_rng(0).normal(size=500)
    spread = {"loose": np.full(500, 0.1), "tight": np.full(500, 1e-5)}
    got = choose_widths({name: weights for name in spread}, spread, max_rise=20.0)
    assert got.widths["tight"] >= got.widths["loose"] + 3


def test_refusals(layers: tuple[dict, dict]) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match="variances"):
        significand_bits([-1.0])
    with pytest.raises(DataError, match="variances"):
        significand_bits([math.nan])
    with pytest.raises(DataError, match="weights"):
        exponent_bits([math.inf])
    with pytest.raises(DataError, match="bits per number"):
        stored_step([1.0], 0)
    with pytest.raises(DataError, match="step of the grid"):
        round_to_grid([1.0], 0.0)
    with pytest.raises(DataError, match="shape"):
        measure_rise([1.0, 2.0], [1.0], 0.5)
    with pytest.raises(DataError, match="published rates"):
        published_rates([10], [5, 5], [8])
    with pytest.raises(BudgetError, match="one limit"):
        choose_widths(*layers)
    with pytest.raises(BudgetError, match="widen the limit"):
        choose_widths(*layers, max_rise=1e-12, candidates=[0, 1])
    with pytest.raises(BudgetError, match="widen the limit"):
        choose_widths(*layers, max_bits=-1.0)
    with pytest.raises(DataError, match="the same tensors"):
        choose_widths(layers[0], {}, max_rise=1.0)
