r"""Fields of an ``.rbc`` file: numbers, floats and texts as fair bits, and reading that never trusts a size.

*Fair bits* are decisions of probability one half, most significant first, sixteen at a time at most.  *Flag*: one
decision, of probability one half unless said otherwise.  *Number*: its length in bits as five fair bits, then its bits
without the top one.  *Signed*: 0, -1, 1, -2, ... as the numbers 0, 1, 2, 3, ...  *Float*: a flag, whether it is a
float16, then its 16 or 32 bits.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from pyrobc.codec.coder import BitCoder, damaged

__all__ = ["EVEN", "MAX_NUMBER", "ByteReader", "FieldReader", "FieldWriter", "is_finite", "is_half"]

MAX_NUMBER = 2**31 - 1
EVEN = 1 << 15
"""The probability one half."""


def is_finite(values: NDArray[np.float32]) -> bool:
    """Whether all of at least one number are; takes no memory, and NaN makes every minimum NaN."""
    return bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def is_half(values: NDArray[np.float32]) -> bool:
    """Whether float16 holds all of them exactly."""
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16) == values).all())


class FieldWriter:
    """Writes fields through ``coder``."""

    def __init__(self, coder: BitCoder) -> None:
        self.coder = coder

    def put_flag(self, value: bool, one: int = EVEN) -> None:
        """A decision; ``one`` is the probability of true in 1/65536."""
        self.coder.code(int(value), one)

    def put_bits(self, value: int, count: int) -> None:
        """``count`` fair bits."""
        while count > 16:
            count -= 16
            self.coder.code_fair(value >> count & 0xFFFF, 16)
        self.coder.code_fair(value & (1 << count) - 1, count)

    def put_number(self, value: int) -> None:
        """From 0 to 2^31 - 1."""
        length = value.bit_length()
        self.put_bits(length, 5)
        if length > 1:
            self.put_bits(value, length - 1)

    def put_signed(self, value: int) -> None:
        """An integer of either sign."""
        self.put_number(2 * value if value >= 0 else -2 * value - 1)

    def put_double(self, value: float) -> None:
        """Sixty-four bits."""
        self.put_bits(int.from_bytes(struct.pack(">d", value), "big"), 64)

    def put_text(self, text: str) -> None:
        """Length in bytes, then UTF-8."""
        data = text.encode()
        self.put_number(len(data))
        for byte in data:
            self.put_bits(byte, 8)

    def put_floats(self, values: NDArray[np.float32]) -> None:
        """A flag, whether all are float16; then their bits."""
        half = is_half(values)
        self.put_flag(half)
        for number in values.astype(np.float16).view(np.uint16) if half else values.view(np.uint32):
            self.put_bits(int(number), 16 if half else 32)


class FieldReader:
    """Reads fields through ``coder``; what is out of range is an error."""

    def __init__(self, coder: BitCoder) -> None:
        self.coder = coder

    def take_flag(self, one: int = EVEN) -> bool:
        """What ``put_flag`` wrote."""
        return bool(self.coder.code(0, one))

    def take_bits(self, count: int) -> int:
        """What ``put_bits`` wrote."""
        value = 0
        while count > 16:
            count -= 16
            value = value << 16 | self.coder.code_fair(0, 16)
        return value << count | self.coder.code_fair(0, count)

    def take_number(self, minimum: int = 0, maximum: int = MAX_NUMBER) -> int:
        """What ``put_number`` wrote, within bounds."""
        length = self.take_bits(5)
        value = 1 << (length - 1) | self.take_bits(length - 1) if length > 1 else length
        if not minimum <= value <= maximum:
            raise damaged(f"a number that is not within {minimum} and {maximum}")
        return value

    def take_signed(self, minimum: int, maximum: int) -> int:
        """What ``put_signed`` wrote, within bounds."""
        code = self.take_number(maximum=2 * max(-minimum, maximum) + 1)
        value = code // 2 if code % 2 == 0 else -(code + 1) // 2
        if not minimum <= value <= maximum:
            raise damaged(f"a number that is not within {minimum} and {maximum}")
        return value

    def take_double(self) -> float:
        """A finite double."""
        value = float(struct.unpack(">d", self.take_bits(64).to_bytes(8, "big"))[0])
        if not np.isfinite(value):
            raise damaged("a setting that is not finite")
        return value

    def take_text(self, maximum: int) -> str:
        """A text of at most ``maximum`` bytes."""
        try:
            return bytes(self.take_bits(8) for _ in range(self.take_number(maximum=maximum))).decode()
        except UnicodeDecodeError as error:
            raise damaged("a name that is not UTF-8") from error

    def take_floats(self, count: int) -> NDArray[np.float32]:
        """``count`` finite numbers."""
        self.coder.claim(2 * count)
        half = self.take_flag()
        bits = np.fromiter((self.take_bits(16 if half else 32) for _ in range(count)), np.uint32, count)
        values = bits.astype(np.uint16).view(np.float16).astype(np.float32) if half else bits.view(np.float32)
        if not is_finite(values):
            raise damaged("weights that are not finite")
        return values


class ByteReader:
    """Reads ``content`` from the front; anything missing is an error."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.position = content, 0

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes."""
        end = self.position + count
        if end > len(self.content):
            raise damaged("an end in the middle of a field")
        data = self.content[self.position : end]
        self.position = end
        return data

    def take_array(self, count: int) -> NDArray[np.float32]:
        """``count`` finite float32, little endian."""
        values = np.frombuffer(self.take(4 * count), "<f4").astype(np.float32)
        if not is_finite(values):
            raise damaged("weights that are not finite")
        return values
