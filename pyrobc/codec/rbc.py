r"""The ``.rbc`` file: a compact network with its architecture, quantised, entropy coded, read back without pickle.

``pack`` writes it, ``unpack`` returns an ordinary module.  The same network and steps give the same bytes.  Nothing
in a file is code: layers come from a closed table, sizes are checked before memory is asked for, and every reader of
``B`` bytes refuses more than 4096 ``B`` numbers, so that a small file cannot claim a large network.  Decoding takes
at most the memory of the file and twice that of the network, and at most :math:`2^{20}` decisions one by one.

Bytes
-----
=============  =====================================================================================================
0              ``R``
1              format version, 2; plus 128 if there is a *bulk*
2 to 4         the low three bytes of the CRC-32 of all bytes from 5 on, little endian
5 on           the *code*; if there is a bulk, four bytes with the length of the code (little endian), the code, the
               bulk.  Zero bytes at the end may be missing from the code, and follow it if a file would be too small
               for its numbers.
=============  =====================================================================================================

**Code.**  Binary decisions by the arithmetic coder of ``codec.coder``: the root *node* with all headers below it, then
the numbers of all tensors in the order of their headers.  *Flags*, *bits*, *numbers*, *signed* and *floats* are fields
as ``codec.format`` describes them.

**Node.**  Its kind: a flag (probability 7/8), whether it is what usually follows the node before
(``codec.layers._USUAL``), else five bits.  0, a ``Sequential`` with the names 0, 1, 2, ...: the number of children and
the children.  31, one with other names: the number, then for each child its name (a number with its length, UTF-8) and
itself.  Else a layer of ``codec.layers.LAYERS``: its settings as described there, then the headers of its tensors, in
this order: the index of a ``SelectLinear``, ``num_batches_tracked`` as a number, weight, bias, running mean and
variance.

**Tensor header.**  Two bits, the form:

====  ======  ======================================================================================================
form          then
====  ======  ======================================================================================================
0     raw     up to 2048 numbers: floats; more: nothing here, float32 in the bulk, little endian
1     one     a flag, whether it is not zero; if so a float: the number that all are
2     sparse  a flag, whether a grid (else a book); a *step* or a *book* of ascending magnitudes; for weights of linear
              and convolutional layers a flag (probability 1/8), whether to leave out planes; four bits, the log odds to
              start from; for a grid four bits, the number of low bits
3     bulk    a flag, whether a grid; a step or a book of all numbers; for a grid a flag, whether by class: the largest
              class as a number, or the smallest integer (signed) and the range (a number)
====  ======  ======================================================================================================

A *step* is a flag, whether it is that of the last tensor of the same name; else a flag, whether it is a power of two:
signed ``t`` for :math:`2^{-t}`, or one float.  A *book* is the number of its floats, and they.

**Index header.**  The number of the last index; a flag, whether a mask; if so a number, the width of the image.

**Numbers.**  A tensor is a matrix, one row for each output (one row in all for vectors), of integers: multiples of the
step, or positions in the book: of a sparse one from 1 up with the sign of the number, of a bulk one from 0 up.
*Sparse*: the model of ``codec.sparse``, whose columns lie as ``codec.geometry`` finds.  An index mask is one row of
that model without signs and sizes, its log odds those of the count; gaps less one are numbers.

**Bulk.**  All large raw tensors, then the blocks of ``codec.streams`` for all tensors of form 3 as one sequence of the
range coder of the library ``constriction`` (``queue.RangeEncoder``; 32-bit words, most significant byte first, zero
bytes at the end left out).  *Direct*: one adaptive alphabet from the smallest integer to the largest.  *By class*: an
adaptive alphabet of bit lengths of ``|k|``; then for each length ``c`` from 1 up, uniform symbols of ``c`` bits: ``k``
without its top bit if positive, ``|k|`` if negative.

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

from torch import nn

from pyrobc.checkpoint import write_atomically
from pyrobc.codec.coder import damaged
from pyrobc.codec.nodes import NodeWriter
from pyrobc.codec.reader import NodeReader
from pyrobc.codec.steps import find_steps
from pyrobc.errors import OutputError

__all__ = ["Packing", "decode", "encode", "pack", "unpack"]

MAGIC, BULK_MAGIC = b"R\x02", b"R\x82"
_START = 5
NUMBERS_PER_BYTE = 4096


@dataclass(frozen=True)
class Packing:
    """What a file's bytes hold: bits by part (format, layers, headers, indices, masks, values, blocks, ...)."""

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
    writer = NodeWriter(find_steps(net, bits, steps))
    writer.put_node(net, "", 0)
    writer.put_numbers()
    body, magic = writer.coder.to_bytes(), MAGIC
    if writer.has_bulk:
        magic = BULK_MAGIC
        body = len(body).to_bytes(4, "little") + body + bytes(writer.bulk) + writer.stream.to_bytes()
    body += b"\0" * (math.ceil(writer.numbers / NUMBERS_PER_BYTE) - _START - len(body))
    data = magic + _check_sum(body) + body
    parts = {"format": 8.0 * _START, **writer.ledger}
    parts["end of stream"] = 8.0 * len(data) - sum(parts.values())
    return data, Packing(len(data), parts)


def decode(data: bytes) -> nn.Module:
    """The network that ``encode`` turned into ``data``, in evaluation mode.

    Raises:
        OutputError: damaged, or of another format.
    """
    if data[:4] == b"RBC\x01":
        raise damaged("format version 1, which no release wrote")
    if data[:1] != MAGIC[:1] or len(data) < _START:
        raise damaged("something else")
    if data[:2] not in (MAGIC, BULK_MAGIC):
        raise damaged(f"format version {data[1] & 0x7F}, where this release reads version {MAGIC[1]}")
    body = memoryview(data)[_START:]
    if _check_sum(body) != data[2:_START]:
        raise damaged("a wrong check sum")
    coded, bulk = body, body[:0]
    if data[:2] == BULK_MAGIC:
        size = int.from_bytes(body[:4], "little")
        if len(body) < 4 + size:
            raise damaged("an end in the middle of a field")
        coded, bulk = body[4 : 4 + size], body[4 + size :]
    reader = NodeReader(bytes(coded), bulk, NUMBERS_PER_BYTE * len(data))
    net = reader.take_node(0)
    reader.fill()
    return net.eval()


def _check_sum(body: bytes | memoryview) -> bytes:
    return zlib.crc32(body).to_bytes(4, "little")[:3]
