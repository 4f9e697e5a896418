r"""Binary arithmetic coding: one decision at a time, each at the cost :math:`-\log_2 p` of its probability.

The coder narrows an interval ``[low, low + range)`` of integers.  A decision of probability :math:`p = q/2^{16}`
splits off the first ``(range >> 16) * q`` numbers for a one and leaves the others for a zero; ``b`` fair bits split the
interval into :math:`2^b` equal parts.  Whenever the range falls below :math:`2^{40}`, the top byte of 48 is settled, up
to a carry that later additions may send into it.  As 24 bits of range remain above the probability's 16, rounding
costs less than :math:`2^{-23}` of each decision.  The end is the number of the interval with the most zero bytes at its
end, and those are left out: a reader goes on with zeros.

``BitWriter``, ``BitReader`` and ``BitMeter`` have the same interface and return the decision, so that a model is
written once for coding, decoding and pricing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from pyrobc.errors import OutputError

__all__ = ["MAX_STEPS", "BitCoder", "BitMeter", "BitReader", "BitWriter", "damaged"]

MAX_STEPS = 2**20
"""Decisions of a file: some seconds."""
_TOP, _LEAST, _MASK = 48, 1 << 40, (1 << 40) - 1
ONE = 1 << 16
"""Probabilities are multiples of its inverse, zero and one excluded."""
COSTS = [16.0, *(16.0 - math.log2(q) for q in range(1, ONE)), 0.0]
"""Bits of a decision of probability ``q / ONE``."""


def damaged(reason: str) -> OutputError:
    """The one error for content that the format does not allow."""
    return OutputError(".rbc file", got=reason, allowed="a file as codec.pack wrote it", fix="pack the network again")


class BitCoder(ABC):
    """Codes decisions; ``bits`` is what they cost so far, ``steps`` how many there were."""

    def __init__(self) -> None:
        self.bits, self.steps = 0.0, 0

    @abstractmethod
    def code(self, bit: int, one: int) -> int:
        """A decision that is 1 with probability ``one / 65536``; returns it."""

    @abstractmethod
    def code_fair(self, value: int, count: int) -> int:
        """``count`` fair bits, up to 16, as a number; returns it."""

    def claim(self, steps: int) -> None:
        """Account for decisions to come, and refuse what would take too long."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise damaged(f"more than {MAX_STEPS} decisions")


class BitMeter(BitCoder):
    """Only counts."""

    def code(self, bit: int, one: int) -> int:
        """Add what the decision costs."""
        self.bits += COSTS[one] if bit else COSTS[ONE - one]
        return bit

    def code_fair(self, value: int, count: int) -> int:
        """Add ``count``."""
        self.bits += count
        return value


class BitWriter(BitMeter):
    """Encodes."""

    def __init__(self) -> None:
        super().__init__()
        self._low, self._range, self._out = 0, 1 << _TOP, bytearray()

    def code(self, bit: int, one: int) -> int:
        """Encode a decision."""
        bound = (self._range >> 16) * one
        if bit:
            self._range = bound
            self.bits += COSTS[one]
        else:
            self._low += bound
            self._range -= bound
            self.bits += COSTS[ONE - one]
        if self._range < _LEAST:
            self._settle()
        return bit

    def code_fair(self, value: int, count: int) -> int:
        """Encode a number of ``count`` bits."""
        self._range >>= count
        self._low += value * self._range
        self.bits += count
        self._settle()
        return value

    def to_bytes(self) -> bytes:
        """All that was encoded, without the zero bytes at the end."""
        out, low, top = bytearray(self._out), self._low, self._low + self._range - 1
        for shift in range(_TOP, -1, -8):
            end = top >> shift << shift
            if end >= low:
                break
        if end >> _TOP:
            _carry(out)
        out += (end & (1 << _TOP) - 1).to_bytes(_TOP // 8, "big")
        return bytes(out.rstrip(b"\0"))

    def _settle(self) -> None:
        while self._range < _LEAST:
            if self._low >> _TOP:
                _carry(self._out)
                self._low &= (1 << _TOP) - 1
            self._out.append(self._low >> 40)
            self._low = (self._low & _MASK) << 8
            self._range <<= 8


def _carry(out: bytearray) -> None:
    at = len(out) - 1
    while out[at] == 255:
        out[at] = 0
        at -= 1
    out[at] += 1


class BitReader(BitCoder):
    """Decodes ``data``; beyond its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data, self._at = data, _TOP // 8
        self._code = int.from_bytes(data[: self._at].ljust(self._at, b"\0"), "big")
        self._range = 1 << _TOP

    def code(self, bit: int, one: int) -> int:
        """Decode a decision; ``bit`` is ignored."""
        bound = (self._range >> 16) * one
        if self._code < bound:
            self._range, bit = bound, 1
        else:
            self._code -= bound
            self._range -= bound
            bit = 0
        if self._range < _LEAST:
            self._settle()
        return bit

    def code_fair(self, value: int, count: int) -> int:
        """Decode a number of ``count`` bits; ``value`` is ignored."""
        self._range >>= count
        value = self._code // self._range
        if value >> count:
            raise damaged("a stream that no writer makes")
        self._code -= value * self._range
        self._settle()
        return value

    def _settle(self) -> None:
        while self._range < _LEAST:
            byte = self._data[self._at] if self._at < len(self._data) else 0
            self._code = self._code << 8 | byte
            self._range <<= 8
            self._at += 1
