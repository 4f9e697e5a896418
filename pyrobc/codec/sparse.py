r"""A sparse matrix of integers, entry by entry: whether it is zero, its sign, its size.

**Zero or not.**  A logistic model :math:`P(k_{rc} \ne 0) = \sigma(w \cdot x_{rc})` whose features are computed from
what is already decoded, row by row.  With :math:`\ell_0` the log odds over all, let :math:`\ell(n, m) = \ln\frac{n +
s}{m - n + s(1/p_0 - 1)} - \ell_0` say how much denser ``m`` entries with ``n`` ones are, shrunk towards all by ``s =
3`` ones.  The features are 1 and

* fixed for a row: :math:`\ell_0`; :math:`\ell` of the column's earlier rows and of the row before; whether the column
  has no one yet, and that times the share of rows that are done (a column without any would have been cut away);
  log of the number of weights of the unit that the column comes from, relative to their mean; height on the plane;
* changing: :math:`\ell` of this row, of the row's part in this block (``s = 2 p_0``) and of the neighbourhood on the
  plane under the kernel of ``codec.geometry`` (``s = 32 p_0``); whether the row has no one yet; the ten nearest
  entries; the absolute sum of the four nearest signs.

The weights start as in ``codec.priors`` and move along the gradient of the code length, :math:`w \mathrel{+}= \eta
\sum_c ([k_{rc} \ne 0] - P_{rc}) x_{rc}`, after each row.

**Sign.** The same kind of model of :math:`P(k > 0)`, which moves after each sign.  Features: 1; the sums of signs in
the row over the root of their number, in the column over their number plus two, on the plane under the kernel, and in
the row's part of the block; the four nearest signs.

**Size.** :math:`|k| - 1 = 2^b u + v`, with ``v`` as ``b`` fair bits and ``u`` in unary.  Whether :math:`u > j` has the
log odds of how often that was so, shrunk towards those of :math:`u > j - 1` by two cases, times a weight, plus learned
multiples of the logarithms of the mean :math:`u + 1` of the row, the column and the neighbourhood relative to that of
all.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyrobc.codec.coder import BitCoder, damaged
from pyrobc.codec.geometry import Geometry, make_plane
from pyrobc.codec.logistic import CELLS, LIMIT, LN2, LN_TABLE, ONES, ln, ln_array, squash
from pyrobc.codec.priors import LEVELS, MASK_WEIGHTS, SIGN_WEIGHTS, SIZE_WEIGHTS

__all__ = ["MAX_COLUMNS", "MAX_LOW_BITS", "SparseCoder", "count_steps"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
MAX_COLUMNS = 2**14
"""Wider matrices would take too much memory."""
MAX_UNARY = 24
"""A unary code that is longer is followed by a number of 16 bits."""
MAX_LOW_BITS = 12
_SLOW, _ONES, _STRENGTH = 8, 3.0, 8.0
_FIELD, _BITS = 4096, 12
_RATE, _SIGN_RATE, _SIZE_RATE = 0.005, 0.02, 0.03
_LEAST_SHARE = 1e-4
_NONE: list[int] = []
_ROW_STEPS = 16  # what a row costs besides its entries, in decisions


def count_steps(values: Ints, largest: int | None) -> int:
    """Decisions that ``SparseCoder`` may take at most for a matrix."""
    limit = MAX_UNARY if largest is None else min(largest, MAX_UNARY)
    return values.size + len(values) * _ROW_STEPS + int(np.count_nonzero(values)) * (limit + 2)


class SparseCoder:
    """Codes a matrix through ``coder``, in either direction.

    Args:
        coder: writes, reads or counts.
        geometry: of the columns.
        num_rows: how many rows.
        level: index of the log odds in ``LEVELS`` to start from.
        low_bits: ``b``.
        largest: of ``u``; None if any size may be.
        only_mask: all that is not zero is one.
    """

    def __init__(
        self,
        coder: BitCoder,
        geometry: Geometry,
        num_rows: int,
        level: int,
        low_bits: int = 0,
        largest: int | None = 0,
        only_mask: bool = False,
    ) -> None:
        self.coder, self.num_rows, self.low_bits, self.only_mask = coder, num_rows, low_bits, only_mask
        self.num_done, self.value_bits = 0, 0.0
        self.largest = MAX_UNARY if largest is None else min(largest, MAX_UNARY)
        self.is_open = largest is None or largest > MAX_UNARY
        self.plane = make_plane(geometry)
        count = len(geometry.positions)
        self.mask_weights = _pad(MASK_WEIGHTS[geometry.kind], _SLOW + 15)
        self.sign_weights = _pad(SIGN_WEIGHTS[geometry.kind], 9)
        self.size_weights = _pad(SIZE_WEIGHTS[geometry.kind], 4)
        self.rate = min(_RATE, 0.6 / count)
        chance = ONES[int((LEVELS[level] + LIMIT) * CELLS)] / 65536.0
        self.ones, self.all = _STRENGTH, _STRENGTH / chance
        self.column_ones, self.column_signs = np.zeros(count, dtype=np.int64), [0] * count
        self.column_sizes = [0] * count
        self.last_ones = 0
        self.fixed = _fixed_features(geometry)
        # How often u went on after j, and how often it got there; sizes u + 1 of all, and how many.
        self.more, self.there = [0.0] * MAX_UNARY, [0.0] * MAX_UNARY
        self.total_size, self.total = 1.5, 1.0

    def code_row(self, row: list[int] | None, prices: list[tuple[float, float]] | None = None) -> list[int]:
        """Code one row, or decode it if ``row`` is None; ``prices`` gets bits spent, and bits of a zero, by entry."""
        coder, plane, weights = self.coder, self.plane, self.mask_weights
        count = len(self.column_signs)
        coder.claim(count + _ROW_STEPS)
        odds = self.ones / (self.all - self.ones)  # a one against a zero, over all
        base, features = self._slow_features(odds)
        log_odds = ln(odds)
        shrink = _ONES / odds
        chance = self.ones / self.all
        w_row, w_near, w_block, w_empty = weights[_SLOW : _SLOW + 4]
        w_bits, w_signs = weights[_SLOW + 4 : _SLOW + 14], weights[_SLOW + 14]
        g_row = g_near = g_block = g_empty = g_signs = 0.0
        g_bits = [0.0] * len(w_bits)
        errors, out = [], [0] * count
        ones, x_near, x_block = 0, 0.0, 0.0
        near_ones = 32.0 * chance
        near_zeros = 32.0 - near_ones
        block, block_ones, block_all = -1, 0, 0
        state = _RowState(plane.num_cells if plane else 0)
        canvas, signs = state.canvas, state.signs
        has_blocks = plane is not None and plane.blocks[-1] > 0
        for c in range(count):
            mantissa, exponent = math.frexp((ones + _ONES) / (c - ones + shrink))
            x_row = LN_TABLE[int(mantissa * 4096.0) - 2048] + exponent * LN2 - log_odds
            x = base[c] + w_row * x_row
            touched = _NONE
            around = 0
            if not ones:
                x += w_empty
            if plane is not None:
                cell = plane.cells[c]
                seen = canvas[cell] % _FIELD
                mantissa, exponent = math.frexp((seen + near_ones) / (plane.full[c] - seen + near_zeros))
                x_near = LN_TABLE[int(mantissa * 4096.0) - 2048] + exponent * LN2 - log_odds
                x += w_near * x_near
                if seen:
                    touched = [j for j, offset in enumerate(plane.near) if signs[cell + offset]]
                    for j in touched:
                        x += w_bits[j]
                    n = plane.near
                    around = abs(signs[cell + n[0]] + signs[cell + n[1]] + signs[cell + n[2]] + signs[cell + n[3]])
                    x += w_signs * around
                if has_blocks:
                    if plane.blocks[c] != block:
                        block, block_ones, block_all = plane.blocks[c], 0, 0
                        state.block_sign = 0
                    x_block = ln((block_ones + 2.0 * chance) / (block_all - block_ones + 2.0 - 2.0 * chance)) - log_odds
                    x += w_block * x_block
                    block_all += 1
            one = ONES[int(((x if x < 10.99 else 10.99) if x > -10.99 else -10.99) * CELLS + LIMIT * CELLS)]
            before = coder.bits
            bit = coder.code(1 if row is not None and row[c] else 0, one)
            error = bit - one / 65536.0
            errors.append(error)
            g_row += error * x_row
            if not ones:
                g_empty += error
            if plane is not None:
                g_near += error * x_near
                g_block += error * x_block
                for j in touched:
                    g_bits[j] += error
                g_signs += error * around
            if bit:
                ones += 1
                block_ones += 1
                spent = coder.bits
                out[c] = self._code_value(c, row[c] if row is not None else 0, state)
                self.value_bits += coder.bits - spent
            if prices is not None:
                prices.append((coder.bits - before, one / 65536.0))
        self._learn_mask(errors, features, [g_row, g_near, g_block, g_empty, *g_bits, g_signs])
        self.ones += ones
        self.all += count
        self.last_ones = ones
        self.num_done += 1
        self.column_ones += np.array(out) != 0
        return out

    def _slow_features(self, odds: float) -> tuple[list[float], list[Floats]]:
        """What the features that are fixed for a row add to the log odds of each column, and those features."""
        log_odds, shrink = ln(odds), _ONES / odds
        count, r = len(self.column_signs), self.num_done
        column = ln_array((self.column_ones + _ONES) / (r - self.column_ones + shrink)) - log_odds
        last = ln((self.last_ones + _ONES) / (count - self.last_ones + shrink)) - log_odds if r else 0.0
        empty = (self.column_ones == 0).astype(np.float64)
        one = np.ones(count)
        features = [one, one * log_odds, column, one * last, empty, empty * (r / self.num_rows), *self.fixed]
        base = np.zeros(count)
        for weight, feature in zip(self.mask_weights, features, strict=False):
            base = base + weight * feature
        return base.tolist(), features

    def _learn_mask(self, errors: list[float], features: list[Floats], gradient: list[float]) -> None:
        error = np.array(errors)
        slow = [float(np.add.accumulate(error * feature)[-1]) for feature in features]  # in order, unlike a sum
        for i, slope in enumerate([*slow, *gradient]):
            self.mask_weights[i] += self.rate * slope

    def _code_value(self, c: int, value: int, state: _RowState) -> int:
        """Sign and size of an entry that is not zero."""
        if self.only_mask:
            self._mark(c, 1, 1, 1, state)
            return 1
        coder, plane, canvas = self.coder, self.plane, state.canvas
        coder.claim(self.largest + 2)
        x = [1.0, state.sign / _ROOTS[min(state.count, 255)], self.column_signs[c] / (self.column_ones[c] + 2.0)]
        seen = plus = heavy = 0
        if plane is not None:
            cell = plane.cells[c]
            packed = canvas[cell]
            seen, plus, heavy = packed % _FIELD, (packed >> _BITS) % _FIELD, packed >> 2 * _BITS
            x.append((2 * plus - seen) / (seen + 10.0))
            x += [state.signs[cell + offset] for offset in plane.near[:4]]
            x.append(state.block_sign / 3.0)
        weights = self.sign_weights
        total = 0.0
        for w, v in zip(weights, x, strict=False):
            total += w * v
        one = squash(total)
        is_plus = coder.code(int(value > 0), one)
        error = _SIGN_RATE * (is_plus - one / 65536.0)
        for i, v in enumerate(x):
            weights[i] += error * v
        size = self._code_size(c, abs(value) - 1, state, seen, heavy)
        sign = 1 if is_plus else -1
        self._mark(c, sign, is_plus, min(size >> self.low_bits, 14) + 1, state)
        return sign * (size + 1)

    def _mark(self, c: int, sign: int, is_plus: int, unary: int, state: _RowState) -> None:
        """Let sums and the canvas know of an entry."""
        plane, canvas = self.plane, state.canvas
        state.sign += sign
        state.block_sign += sign
        state.count += 1
        state.size += unary
        self.column_signs[c] += sign
        self.column_sizes[c] += unary
        self.total_size += unary
        self.total += 1.0
        if plane is not None:
            cell = plane.cells[c]
            state.signs[cell] = sign
            packed = 1 + (is_plus << _BITS) + (unary << 2 * _BITS)
            for offset, weight in plane.kernel:
                canvas[cell + offset] += weight * packed

    def _code_size(self, c: int, size: int, state: _RowState, seen: int, heavy: int) -> int:
        """``|k| - 1``."""
        coder, low, unary = self.coder, 0, 0
        if self.low_bits:
            low = coder.code_fair(size & (1 << self.low_bits) - 1, self.low_bits)
        if self.largest:
            goal = size >> self.low_bits
            mean = self.total_size / self.total
            x = [
                ln((state.size + mean) / (state.count + 1.0) / mean),
                ln((self.column_sizes[c] + mean) / (self.column_ones[c] + 1.0) / mean),
                ln((heavy + 16.0 * mean) / (seen + 16.0) / mean),
            ]
            weights, share = self.size_weights, 0.5
            while unary < self.largest:
                share = (self.more[unary] + 2.0 * share) / (self.there[unary] + 2.0)
                share = min(max(share, _LEAST_SHARE), 1.0 - _LEAST_SHARE)
                logit = ln(share / (1.0 - share))
                one = squash(weights[0] * logit + weights[1] * x[0] + weights[2] * x[1] + weights[3] * x[2])
                goes_on = coder.code(int(goal > unary), one)
                error = _SIZE_RATE * (goes_on - one / 65536.0)
                for i in range(3):
                    weights[i + 1] += error * x[i]
                self.there[unary] += 1.0
                self.more[unary] += goes_on
                if not goes_on:
                    break
                unary += 1
            if unary == MAX_UNARY and self.is_open:
                unary += coder.code_fair(goal - unary, 16)
        size = (unary << self.low_bits) + low
        if size >> 20:
            raise damaged("a number of too many steps")
        return size


class _RowState:
    """What the row has had so far: the canvas, signs on the plane, and sums over the row."""

    def __init__(self, num_cells: int) -> None:
        self.canvas, self.signs = [0] * num_cells, [0] * num_cells
        self.sign = self.size = self.count = self.block_sign = 0


_ROOTS = [math.sqrt(n + 1) for n in range(256)]  # correctly rounded everywhere


def _fixed_features(geometry: Geometry) -> list[Floats]:
    """Log of what each column's unit has, relative to the mean of the columns; height on the plane, -1 to 1."""
    positions = geometry.positions
    supply, height = np.zeros(len(positions)), np.zeros(len(positions))
    if geometry.supply is not None:
        counts = geometry.supply[positions // max(geometry.size, 1)]
        supply = ln_array((counts + 1.0) * len(counts) / (int(counts.sum()) + len(counts)))
    if geometry.kind in ("image", "pixels"):
        rows = positions // max(geometry.width, 1)
        height = 2.0 * rows / max(int(rows[-1]), 1) - 1.0
    return [supply, height]


def _pad(weights: list[float], count: int) -> list[float]:
    return weights + [0.0] * (count - len(weights))
