r"""The ``.rbc`` file: a compact network with its architecture, quantised, entropy coded, read back without pickle.

``pack`` writes it, ``unpack`` returns an ordinary module.  The same network and steps give the same bytes.  Nothing
in a file is code: layers come from a closed table, sizes are checked before memory is asked for, and every reader of
``B`` bytes refuses more than 4096 ``B`` numbers, so that a small file cannot claim a large network.  Decoding takes
at most the memory of the file and twice that of the network.

Bytes
-----
*Varint*: seven bits a byte, low bits first, high bit set on all bytes but the last.  *Signed*: 0, -1, 1, -2, ... as the
varints 0, 1, 2, 3, ...  Floats are IEEE, little endian.

=============  =====================================================================================================
0 to 2         ``RBC``
3              format version, 1
4 to 7         CRC-32 of all bytes from 8 on, little endian
8 on           the root *node*, then the *stream*, to the end of the file
=============  =====================================================================================================

**Node.**  One byte: 0, a ``Sequential`` with the names 0, 1, 2, ..., then a varint with the number of children and
the children; 128, one with other names: the number, then for each child its name (varint with its length, UTF-8) and
itself. Else a layer: its number in ``codec.layers.LAYERS``, plus 128 if settings differ from their defaults; required
settings; if 128 was added, a byte whose bit ``i`` says that optional setting ``i`` follows, and those.  Then the
headers of its tensors, in this order: the index of a ``SelectLinear``, ``num_batches_tracked`` as a varint, weight,
bias, running mean and variance.

**Tensor header.**  One byte: form 0 to 3, plus 16 (masked), 32 (by class), 64 (step is a float32), 128 (float16
numbers).

====  ======  ======================================================================================================
form          then
====  ======  ======================================================================================================
0     raw     all numbers as float32, in C order; nothing in the stream
1     one     one float32: the number that all are; nothing in the stream
2     grid    the step as signed ``t`` for :math:`2^{-t}`, or as float32; if masked, a varint ``width``; if by class, a
              varint with the largest class, else the smallest integer (signed) and the range (varint)
3     book    varint ``n``; ``n`` ascending numbers as float32, or float16; if masked, a varint ``width``
====  ======  ======================================================================================================

**Index header.**  Varint: the last index.  One byte, 0: a varint ``width``, and in the stream a mask of one row;
1: a varint with the largest class, and in the stream the gaps minus one, by class.

**Stream.**  The symbols of all tensors, in the order of their headers, as one sequence of the range coder of the
library ``constriction`` (``queue.RangeEncoder``; 32-bit words, most significant byte first, zero bytes at the end
left out), under the models of ``codec.streams``.  A tensor is a matrix, one row for each output (one row in all for
vectors), and its numbers are integers: multiples of the step, or positions in the book counted from that of zero, if
it has zero. *Masked*: the mask of what is not zero, then those integers; else all integers.  *Direct*: one adaptive
alphabet from the smallest integer to the largest, zero left out if masked.  *By class*: an adaptive alphabet of bit
lengths of ``|k|``; then for each length ``c`` from 1 up, uniform symbols of ``c`` bits: ``k`` without its top bit if
positive, ``|k|`` if negative.  Column positions for the mask's neighbours are the index of a ``SelectLinear`` and 0,
1, 2, ... elsewhere.

**Exactness.**  Without a step, every number is kept (negative zero becomes zero).  With step :math:`s`, a number
moves by at most :math:`s/2`: half of the unit round-off of :math:`t` significand bits, :math:`2^{-t}`, for :math:`s =
2^{-t}`.  Numbers of :math:`2^{20}` steps or more keep the whole tensor as it is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from pyrobc.checkpoint import write_atomically
from pyrobc.codec.format import damaged
from pyrobc.codec.nodes import GRIDDED, NodeReader, NodeWriter
from pyrobc.codec.tensors import MAX_EXPONENT
from pyrobc.errors import OutputError, suggest

__all__ = ["Packing", "decode", "encode", "pack", "unpack"]

MAGIC = b"RBC\x01"
NUMBERS_PER_BYTE = 4096
MAX_STEP_EXPONENT = 100


@dataclass(frozen=True)
class Packing:
    """What a file's bytes hold: bits by part (format, layers, headers, indices, masks, values, ...)."""

    num_bytes: int
    parts: Mapping[str, float]


def pack(
    net: nn.Module,
    path: str | Path,
    *,
    bits: int | Mapping[str, int] | None = None,
    steps: float | Mapping[str, float] | None = None,
) -> Packing:
    """Write ``net`` as an ``.rbc`` file, whole or not at all.

    Args:
        net: float32 network built of the layers of ``codec.layers.LAYERS``; it is not changed.
        path: the file.
        bits: fractional bits ``t``, a grid of step ``2^-t``: for the weights and biases of all linear and convolutional
            layers, or by name of the state dict.  Tensors without one keep every number.
        steps: the same as steps; names given in both take the step.

    Raises:
        OutputError: an architecture, a tensor or a name that the format does not hold, or an unwritable path.
    """
    data, packing = encode(net, bits=bits, steps=steps)
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(data))
    return packing


def unpack(path: str | Path) -> nn.Module:
    """The network of an ``.rbc`` file, in evaluation mode.

    Raises:
        OutputError: the file is missing, damaged, or of another format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise OutputError(
            f"network {path}", got=f"{type(error).__name__}: {error.strerror}", allowed="an .rbc file", fix="pack it"
        ) from error
    return decode(data)


def encode(
    net: nn.Module, *, bits: int | Mapping[str, int] | None = None, steps: float | Mapping[str, float] | None = None
) -> tuple[bytes, Packing]:
    """The bytes that ``pack`` writes, and what they hold."""
    grid = _find_steps(net, bits, is_step=False) | _find_steps(net, steps, is_step=True)
    writer = NodeWriter(grid)
    writer.put_node(net, "", 0)
    body = bytes(writer.header.content) + writer.stream.to_bytes()
    shortest = math.ceil(writer.numbers / NUMBERS_PER_BYTE) - len(MAGIC) - 4
    body += b"\0" * (shortest - len(body))
    data = MAGIC + zlib.crc32(body).to_bytes(4, "little") + body
    parts = {"format": 8.0 * (len(MAGIC) + 4), **writer.ledger}
    parts["end of stream"] = 8.0 * len(data) - sum(parts.values())
    return data, Packing(len(data), parts)


def decode(data: bytes) -> nn.Module:
    """The network that ``encode`` turned into ``data``, in evaluation mode.

    Raises:
        OutputError: damaged, or of another format.
    """
    start = len(MAGIC) + 4
    if data[: len(MAGIC) - 1] != MAGIC[:-1] or len(data) < start:
        raise damaged("something else")
    if data[len(MAGIC) - 1] != MAGIC[-1]:
        raise damaged(f"format version {data[len(MAGIC) - 1]}, where this release reads version {MAGIC[-1]}")
    body = memoryview(data)[start:]
    if zlib.crc32(body).to_bytes(4, "little") != data[len(MAGIC) : start]:
        raise damaged("a wrong check sum")
    reader = NodeReader(body, NUMBERS_PER_BYTE * len(data))
    net = reader.take_node(0)
    reader.fill()
    return net.eval()


def _find_steps(net: nn.Module, grid: float | Mapping[str, float] | None, *, is_step: bool) -> dict[str, float]:
    """Step by tensor, float32."""
    if grid is None:
        return {}
    known = [name for name, tensor in net.state_dict().items() if tensor.is_floating_point()]
    if not isinstance(grid, Mapping):
        layers = [name for name, module in net.named_modules() if isinstance(module, GRIDDED)]
        grid = {n: grid for n in known if n.rpartition(".")[0] in layers}
    found = {}
    for name, value in grid.items():
        what = f"{'step' if is_step else 'bits'} of {name!r}"
        if name not in known:
            raise OutputError(what, got="no such tensor", allowed="names of the state dict", fix=suggest(name, known))
        with np.errstate(over="ignore", under="ignore"):
            step = float(np.float32(value if is_step else 2.0 ** -max(min(value, 999), -999)))
        if not 2.0**-MAX_EXPONENT <= step <= 2.0**MAX_STEP_EXPONENT:
            raise OutputError(
                what, got=repr(value), allowed=f"steps of 2^-{MAX_EXPONENT} to 2^{MAX_STEP_EXPONENT}",
                fix="choose widths with bits.choose_widths",
            )  # fmt: skip
        found[name] = step
    return found
