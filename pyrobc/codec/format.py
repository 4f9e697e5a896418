"""Bytes of an ``.rbc`` file below the level of networks: varints, floats, and reading that never trusts a size."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from pyrobc.errors import OutputError

__all__ = ["MAX_VARINT", "ByteReader", "ByteWriter", "damaged", "is_finite"]

MAX_VARINT = 2**31 - 1


def damaged(reason: str) -> OutputError:
    """The one error for content that the format does not allow."""
    return OutputError(".rbc file", got=reason, allowed="a file as codec.pack wrote it", fix="pack the network again")


def is_finite(values: NDArray[np.float32]) -> bool:
    """Whether all of at least one number are; takes no memory, and NaN makes every minimum NaN."""
    return bool(np.isfinite(values.min()) and np.isfinite(values.max()))


class ByteWriter:
    """Appends to ``content``."""

    def __init__(self) -> None:
        self.content = bytearray()

    def put_byte(self, value: int) -> None:
        """One byte."""
        self.content.append(value)

    def put_varint(self, value: int) -> None:
        """Seven bits a byte, low bits first, the high bit set on all bytes but the last."""
        while value >= 0x80:
            self.content.append(value & 0x7F | 0x80)
            value >>= 7
        self.content.append(value)

    def put_signed(self, value: int) -> None:
        """0, -1, 1, -2, ... as the varints 0, 1, 2, 3, ..."""
        self.put_varint(2 * value if value >= 0 else -2 * value - 1)

    def put_double(self, value: float) -> None:
        """Eight bytes, little endian."""
        self.content += struct.pack("<d", value)

    def put_text(self, text: str) -> None:
        """Length in bytes as a varint, then UTF-8."""
        data = text.encode()
        self.put_varint(len(data))
        self.content += data

    def put_array(self, values: NDArray[np.generic], dtype: str) -> None:
        """Numbers of a little-endian ``dtype`` in C order, no length."""
        self.content += values.astype(dtype).tobytes()


class ByteReader:
    """Reads ``content`` from the front; anything missing or out of range is an error."""

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

    def take_byte(self) -> int:
        """One byte."""
        return self.take(1)[0]

    def take_varint(self, minimum: int = 0, maximum: int = MAX_VARINT) -> int:
        """What ``put_varint`` wrote, in its shortest form and within bounds."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take_byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if (byte == 0 and shift) or not minimum <= value <= maximum:
                    break
                return value
        raise damaged(f"a number that is not within {minimum} and {maximum}")

    def take_signed(self, minimum: int, maximum: int) -> int:
        """What ``put_signed`` wrote, within bounds."""
        code = self.take_varint(maximum=2 * max(-minimum, maximum) + 1)
        value = code // 2 if code % 2 == 0 else -(code + 1) // 2
        if not minimum <= value <= maximum:
            raise damaged(f"a number that is not within {minimum} and {maximum}")
        return value

    def take_double(self) -> float:
        """A finite double."""
        value = float(struct.unpack("<d", self.take(8))[0])
        if not np.isfinite(value):
            raise damaged("a setting that is not finite")
        return value

    def take_text(self, maximum: int) -> str:
        """A text of at most ``maximum`` bytes."""
        try:
            return bytes(self.take(self.take_varint(maximum=maximum))).decode()
        except UnicodeDecodeError as error:
            raise damaged("a name that is not UTF-8") from error

    def take_array(self, count: int, dtype: str) -> NDArray[np.float32]:
        """``count`` finite numbers of a little-endian ``dtype``, as float32."""
        data = self.take(count * np.dtype(dtype).itemsize)
        values = np.frombuffer(data, dtype).astype(np.float32)
        if not is_finite(values):
            raise damaged("weights that are not finite")
        return values
