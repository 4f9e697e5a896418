r"""Symbols as a range-coded stream whose models are learned on the way, so that no table has to be stored.

Three models, each computed from what is already decoded with additions, products and quotients alone, which every
machine rounds alike:

* *adaptive*, symbols of a small alphabet: block ``k`` is coded with probabilities proportional to the counts of all
  earlier blocks plus one half (Krichevsky and Trofimov 1981).  A block holds an eighth of the symbols before it, at
  least one, so that whole blocks are coded at once and the cost of learning stays near :math:`\tfrac{A-1}{2}\log_2
  n`.
* *uniform*, for low-order bits.
* *mask*, which entries of a matrix are not zero.  With probabilities :math:`p_r, p_c, p_x` seen so far in the entry's
  row, its column, and after the same neighbours, and :math:`p` overall, the odds are multiplied as if row, column and
  neighbours were independent given the entry, :math:`o = o_r\, o_c\, o_x / o^2`.  Estimates are shrunk to :math:`p`:
  lines by three ones and as many zeros as go with them, neighbourhoods by two entries.  Neighbours of an entry lie in
  its row, at column positions less by 1, ``width + 1``, ``width`` and ``width - 1``: for input pixels, and kernels, of
  that width these are the four already seen among the eight around it.  There are none if ``width`` is 0.

The models are handed to the coder as explicit float tables (float32 for alphabets): integers plus one half, exact
below 2\ :sup:`23`, so that both sides see the same table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from pyrobc.codec.format import damaged

__all__ = [
    "MAX_ALPHABET", "MAX_CLASS", "MAX_MASK", "MAX_WIDTH", "PIECE", "SymbolReader", "SymbolWriter", "adaptive_cost",
    "classes_cost", "mask_cost",
]  # fmt: skip

Ints = NDArray[np.int64]
MAX_ALPHABET = 4096
PIECE = 2**16
"""Numbers worked on at once where all of a tensor at once would take more memory than the tensor."""
MAX_CLASS = 20
"""Bits of the largest integer."""
MAX_WIDTH = 64
"""Width of the widest kernel or image whose rows a mask is told of."""
MAX_MASK = 2**18
"""Entries of a mask that are coded one by one; larger tensors code zero as a symbol."""
MAX_STEPS = 2**20
"""Entries of all masks of a file: a second or two."""
_MAX_COUNT = 2**22
_LINE_ONES, _NEAR_ALL = 3.0, 2.0
_FLOOR = 2.0**-12

_model: Any = constriction.stream.model
_queue: Any = constriction.stream.queue


class _Counts:
    """Counts of an alphabet, and the table they stand for."""

    def __init__(self, alphabet: int) -> None:
        self.counts = np.zeros(alphabet, dtype=np.int64)

    def table(self) -> NDArray[np.float32]:
        return (self.counts + 0.5).astype(np.float32)

    def add(self, symbols: NDArray[Any]) -> None:
        self.counts += np.bincount(symbols, minlength=len(self.counts))
        if self.counts.sum() > _MAX_COUNT:
            self.counts = (self.counts + 1) // 2


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < count:
        stop = min(count, start + max(1, start // 8))
        yield start, stop
        start = stop


class _MaskModel:
    """Probability of the next entry of a matrix, row by row."""

    def __init__(self, positions: Ints, width: int) -> None:
        self.neighbours = _neighbours(positions, width) if width > 1 else None
        # Ones and all, as floats: overall, this row, each column, each of the sixteen neighbourhoods.
        self.ones, self.all = 0.5, 1.0
        self.row_ones = self.row_all = 0.0
        self.column_ones = [0.0] * len(positions)
        self.num_rows = 0
        self.near_ones, self.near_all = [0.0] * 16, [0.0] * 16
        self.row = [0] * (len(positions) + 1)  # the last entry stands for a neighbour that there is not

    def start_row(self) -> None:
        self.row_ones = self.row_all = 0.0

    def end_row(self) -> None:
        self.num_rows += 1

    def neighbourhood(self, column: int) -> int:
        if self.neighbours is None:
            return 0
        (a, b, c, d), row = self.neighbours[column], self.row
        return 8 * row[a] + 4 * row[b] + 2 * row[c] + row[d]

    def predict(self, column: int) -> float:
        overall = self.ones / self.all
        near = self.neighbourhood(column)
        row = (self.row_ones + _LINE_ONES) / (self.row_all + _LINE_ONES / overall)
        col = (self.column_ones[column] + _LINE_ONES) / (self.num_rows + _LINE_ONES / overall)
        ctx = (self.near_ones[near] + _NEAR_ALL * overall) / (self.near_all[near] + _NEAR_ALL)
        yes = row * col * ctx * (1.0 - overall) * (1.0 - overall)
        no = (1.0 - row) * (1.0 - col) * (1.0 - ctx) * overall * overall
        return min(max(yes / (yes + no), _FLOOR), 1.0 - _FLOOR)

    def see(self, column: int, bit: int) -> None:
        near = self.neighbourhood(column)
        self.row[column] = bit
        self.ones += bit
        self.all += 1.0
        self.row_ones += bit
        self.row_all += 1.0
        self.column_ones[column] += bit
        self.near_ones[near] += bit
        self.near_all[near] += 1.0


def _neighbours(positions: Ints, width: int) -> list[tuple[int, int, int, int]]:
    """Columns left of each column, and above it to the left, right above and to the right; -1 where there is none."""
    column = {int(position): j for j, position in enumerate(positions)}
    offsets = (1, width + 1, width, width - 1)
    return [tuple(column.get(int(p) - offset, -1) for offset in offsets) for p in positions]  # type: ignore[misc]


def _predict_mask(mask: NDArray[np.bool_], positions: Ints, width: int) -> NDArray[np.float64]:
    model = _MaskModel(positions, width)
    chances = []
    for row in mask.astype(int).tolist():
        model.start_row()
        for column, bit in enumerate(row):
            chances.append(model.predict(column))
            model.see(column, bit)
        model.end_row()
    return np.asarray(chances, dtype=np.float64)


def mask_cost(mask: NDArray[np.bool_], positions: Ints, width: int) -> float:
    """Bits that ``put_mask`` takes."""
    return _bits(mask, _predict_mask(mask, positions, width))


def _bits(mask: NDArray[np.bool_], chances: NDArray[np.float64]) -> float:
    return float(-np.log2(np.where(mask.ravel(), chances, 1.0 - chances)).sum())


def adaptive_cost(symbols: NDArray[Any], alphabet: int) -> float:
    """Bits that ``put_adaptive`` takes."""
    return sum(bits for *_, bits in _learn(symbols, alphabet))


def _learn(symbols: NDArray[Any], alphabet: int) -> Iterator[tuple[NDArray[Any], NDArray[np.float32], float]]:
    """Blocks of symbols, their tables, and their bits."""
    model = _Counts(alphabet)
    for start, stop in _blocks(len(symbols) if alphabet > 1 else 0):
        block, table = symbols[start:stop], model.table()
        yield (
            block,
            table,
            len(block) * math.log2(float(table.sum(dtype=np.float64))) - float(np.log2(table[block]).sum()),
        )
        model.add(block)


def classes_cost(values: Ints) -> float:
    """Bits that ``put_classes`` takes."""
    classes = _classes(values)
    return adaptive_cost(classes, int(classes.max(initial=0)) + 1) + float(classes.sum())


def _classes(values: Ints) -> Ints:
    return np.frexp(np.abs(values).astype(np.float64))[1].astype(np.int64)


class SymbolWriter:
    """Encodes, and says how many bits that took; the reader must ask for the same things in the same order."""

    def __init__(self) -> None:
        self._coder = _queue.RangeEncoder()
        self._steps = 0

    @property
    def room(self) -> int:
        """Entries that the next mask may have."""
        return min(MAX_MASK, MAX_STEPS - self._steps)

    def put_adaptive(self, symbols: NDArray[Any], alphabet: int) -> float:
        """Symbols 0 to ``alphabet`` - 1, shape ``(n,)``; nothing is written for an alphabet of one."""
        total = 0.0
        for block, table, bits in _learn(symbols, alphabet):
            self._coder.encode(block.astype(np.int32), _model.Categorical(table, perfect=False))
            total += bits
        return total

    def put_uniform(self, symbols: NDArray[Any], size: int) -> float:
        """Symbols 0 to ``size`` - 1, all equally probable; ``size`` up to 2^20."""
        if len(symbols) and size > 1:
            self._coder.encode(symbols.astype(np.int32), _model.Uniform(size))
        return len(symbols) * math.log2(size)

    def put_classes(self, values: Ints, largest: int) -> float:
        """Integers of up to ``largest`` bits: their bit lengths, then signs and low bits."""
        classes = _classes(values)
        total = self.put_adaptive(classes, largest + 1)
        for bits in range(1, largest + 1):
            chosen = values[classes == bits]
            half = 1 << (bits - 1)  # the top bit is known: the sign takes its place
            total += self.put_uniform(np.abs(chosen) - half + np.where(chosen < 0, half, 0), 1 << bits)
        return total

    def put_mask(self, mask: NDArray[np.bool_], positions: Ints, width: int) -> float:
        """A matrix of bits; ``positions`` of its columns are ascending."""
        if mask.size == 0:
            return 0.0
        self._steps += mask.size
        chances = _predict_mask(mask, positions, width)
        self._coder.encode(mask.ravel().astype(np.int32), _model.Bernoulli(perfect=False), chances)
        return _bits(mask, chances)

    def to_bytes(self) -> bytes:
        """32-bit words, most significant byte first, without the zero bytes at the end."""
        return bytes(self._coder.get_compressed().astype(">u4").tobytes().rstrip(b"\0"))


class SymbolReader:
    """Decodes what ``SymbolWriter`` wrote, or raises ``OutputError``."""

    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data + b"\0" * (-len(data) % 4), dtype=">u4").astype(np.uint32)
        self._coder = _queue.RangeDecoder(words)
        self._steps = 0

    def take_adaptive(self, count: int, alphabet: int) -> NDArray[np.int32]:
        """``count`` symbols."""
        symbols = np.zeros(count, dtype=np.int32)
        model = _Counts(alphabet)
        for start, stop in _blocks(count if alphabet > 1 else 0):
            symbols[start:stop] = self._decode(_model.Categorical(model.table(), perfect=False), stop - start)
            model.add(symbols[start:stop])
        return symbols

    def take_uniform(self, count: int, size: int) -> NDArray[np.int32]:
        """``count`` symbols."""
        if count == 0 or size == 1:
            return np.zeros(count, dtype=np.int32)
        return np.asarray(self._decode(_model.Uniform(size), count), dtype=np.int32)

    def take_classes(self, count: int, largest: int) -> NDArray[np.int32]:
        """``count`` integers."""
        classes = self.take_adaptive(count, largest + 1)
        values = np.zeros(count, dtype=np.int32)
        for bits, start in itertools.product(range(1, largest + 1), range(0, count, PIECE)):
            chosen, half = classes[start : start + PIECE] == bits, 1 << (bits - 1)
            code = self.take_uniform(int(chosen.sum()), 1 << bits)
            values[start : start + PIECE][chosen] = np.where(code >= half, -code, half + code)
        return values

    def take_mask(self, num_rows: int, positions: Ints, width: int) -> NDArray[np.bool_]:
        """A matrix of bits, shape ``(num_rows, len(positions))``."""
        self._steps += num_rows * len(positions)
        if self._steps > MAX_STEPS:
            raise damaged(f"masks of more than {MAX_STEPS} entries")
        model, rows = _MaskModel(positions, width), []
        for _ in range(num_rows):
            model.start_row()
            for column in range(len(positions)):
                model.see(column, int(self._decode(_model.Bernoulli(model.predict(column), perfect=False))))
            model.end_row()
            rows.append(np.array(model.row[:-1], dtype=np.bool_))
        return np.array(rows, dtype=np.bool_).reshape(num_rows, len(positions))

    def _decode(self, *args: Any) -> Any:
        try:
            return self._coder.decode(*args)
        except (AssertionError, ValueError) as error:
            raise damaged("a stream that no writer makes") from error
