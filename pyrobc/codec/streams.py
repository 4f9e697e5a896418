r"""Large tensors as a range-coded stream of whole blocks, whose models are learned on the way.

Two models, each computed from what is already decoded with additions, products and quotients alone, which every
machine rounds alike:

* *adaptive*, symbols of a small alphabet: block ``k`` is coded with probabilities proportional to the counts of all
  earlier blocks plus one half (Krichevsky and Trofimov 1981).  A block holds an eighth of the symbols before it, at
  least one, so that whole blocks are coded at once and the cost of learning stays near :math:`\tfrac{A-1}{2}\log_2
  n`.
* *uniform*, for low-order bits.

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

from pyrobc.codec.coder import damaged

__all__ = ["MAX_ALPHABET", "MAX_CLASS", "PIECE", "SymbolReader", "SymbolWriter", "adaptive_cost", "classes_cost"]

Ints = NDArray[np.int64]
MAX_ALPHABET = 4096
PIECE = 2**16
"""Numbers worked on at once where all of a tensor at once would take more memory than the tensor."""
MAX_CLASS = 20
"""Bits of the largest integer."""
_MAX_COUNT = 2**22

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

    def to_bytes(self) -> bytes:
        """32-bit words, most significant byte first, without the zero bytes at the end."""
        return bytes(self._coder.get_compressed().astype(">u4").tobytes().rstrip(b"\0"))


class SymbolReader:
    """Decodes what ``SymbolWriter`` wrote, or raises ``OutputError``."""

    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data + b"\0" * (-len(data) % 4), dtype=">u4").astype(np.uint32)
        self._coder = _queue.RangeDecoder(words)

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

    def _decode(self, *args: Any) -> Any:
        try:
            return self._coder.decode(*args)
        except (AssertionError, ValueError) as error:
            raise damaged("a stream that no writer makes") from error
