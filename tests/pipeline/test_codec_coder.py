"""The arithmetic coder, and the tables that every machine must have alike."""

import math
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pyrobc.codec.coder import BitMeter, BitReader, BitWriter
from pyrobc.codec.logistic import LN_TABLE, ONES, ln, ln_array, squash

DECISIONS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([1, 2, 300, 32768, 65000, 65535])), max_size=300)
FAIR = st.lists(st.integers(1, 16).flatmap(lambda n: st.tuples(st.integers(0, 2**n - 1), st.just(n))), max_size=30)


@hypothesis.given(DECISIONS, FAIR, DECISIONS)
def test_decisions_come_back_at_their_price(
    first: list[tuple[int, int]], fair: list[tuple[int, int]], last: list[tuple[int, int]]
) -> None:
    writer, meter = BitWriter(), BitMeter()
    for coder in (writer, meter):
        for bit, one in first:
            coder.code(bit, one)
        for value, count in fair:
            coder.code_fair(value, count)
        for bit, one in last:
            coder.code(bit, one)
    data = writer.to_bytes()
    assert writer.bits == meter.bits
    assert 8 * len(data) <= writer.bits * (1 + 1e-6) + 16
    reader = BitReader(data)
    assert [reader.code(0, one) for _, one in first] == [bit for bit, _ in first]
    assert [reader.code_fair(0, count) for _, count in fair] == [value for value, _ in fair]
    assert [reader.code(0, one) for _, one in last] == [bit for bit, _ in last]


def test_long_runs_of_carries_come_back() -> None:
    bits = [0] * 4000 + [1] + [0] * 4000
    writer = BitWriter()
    for bit in bits:
        writer.code(bit, 1)
    reader = BitReader(writer.to_bytes())
    assert [reader.code(0, 1) for _ in bits] == bits


def test_tables_are_close_and_the_same_everywhere() -> None:
    x = np.exp(np.random.default_rng(0).normal(0, 5, 2000))
    assert [ln(float(v)) for v in x] == ln_array(x).tolist()
    assert max(abs(ln(float(v)) - math.log(v)) for v in x) < 2.5e-4
    assert all(squash(v) / 65536 == pytest.approx(1 / (1 + math.exp(-v)), abs=1.1e-3) for v in np.linspace(-10.9, 10.9))
    assert (squash(-99.0), squash(99.0)) == (1, 65535)
    assert zlib.crc32(np.array(ONES, "<i4").tobytes() + np.array(LN_TABLE, "<f8").tobytes()) == CHECK
    assert (len(ONES), len(LN_TABLE), min(ONES), max(ONES)) == (2816, 2048, 1, 65535)


CHECK = 321160636
