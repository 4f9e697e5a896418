"""One tensor of an ``.rbc`` file: which form is shortest, its header, its symbols, and back.

The forms and their bytes are described in ``pyrobc.codec``.  Grid and book share their coding: a tensor becomes
integers ``k`` with ``low <= k <= high`` where 0 stands for the number zero, and the integers are coded *joint* (zero
is a symbol) or *masked* (where, then which), each *direct* (one adaptive alphabet) or *by class* (adaptive bit length
of ``|k|``, then sign and low bits as they are).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pyrobc.bits import round_to_grid
from pyrobc.codec.format import MAX_VARINT, ByteReader, ByteWriter, damaged, is_finite
from pyrobc.codec.streams import (
    MAX_ALPHABET,
    MAX_CLASS,
    MAX_MASK,
    MAX_WIDTH,
    PIECE,
    SymbolReader,
    SymbolWriter,
    adaptive_cost,
    classes_cost,
    mask_cost,
)

__all__ = ["MAX_EXPONENT", "Form", "Ledger", "choose_form", "read_form", "take_tensor", "write_tensor"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Ledger = dict[str, float]

RAW, ONE, GRID, BOOK = range(4)
_MASKED, _BY_CLASS, _FLOAT_STEP, _HALF = 0x10, 0x20, 0x40, 0x80
MAX_EXPONENT = 140


@dataclass(frozen=True)
class Form:
    """How a tensor is stored.  ``levels`` are a book's numbers, ascending, or a single one; ``raw`` all of them."""

    kind: int
    step: float = 1.0
    levels: tuple[float, ...] = ()
    masked: bool = False
    by_class: bool = False
    width: int = 0
    low: int = 0
    high: int = 0
    raw: Floats | None = None

    @property
    def alphabet(self) -> int:
        """Symbols that the values take, without zero if a mask says where it is."""
        return self.high - self.low + 1 - (self.masked and self.low <= 0 <= self.high)

    def symbols(self, values: Ints) -> Ints:
        """0 to ``alphabet`` - 1, leaving no gap for a zero that the mask tells."""
        return values - self.low - ((values > 0) if self.masked and self.low <= 0 else 0)

    def values(self, symbols: NDArray[np.int32]) -> NDArray[np.int32]:
        """The inverse of ``symbols``, in their memory."""
        values = symbols
        values += np.int32(self.low)
        if self.masked and self.low <= 0 <= self.high:
            values[values >= 0] += 1
        return values

    def to_numbers(self, integers: NDArray[np.int32]) -> Floats:
        """Integers, shape ``(n,)``, back to numbers; a piece at a time, as a tensor may fill the memory."""
        numbers, levels = np.empty(len(integers), dtype=np.float32), np.array(self.levels, dtype=np.float32)
        for start in range(0, len(integers), PIECE):
            piece = integers[start : start + PIECE]
            numbers[start : start + PIECE] = piece * self.step if self.kind == GRID else levels[piece - self.low]
        return numbers


def choose_form(values: Floats, step: float | None, positions: Ints, width: int, room: int) -> Form:
    """The shortest form that loses nothing, or, with a ``step``, nothing beyond half a step.

    Args:
        values: finite, shape ``(rows, columns)``.
        step: of the grid, float32; None keeps every number.
        positions: of the columns, ascending: neighbours of kernels and images.
        width: of the kernel or image, 0 if there is none.
        room: largest mask.
    """
    raw = Form(RAW, raw=values)
    if step is not None and float(np.abs(values).max()) / step >= 2.0**MAX_CLASS:
        step = None  # finer than what is worth a grid
    if step is None:
        levels = np.unique(values + np.float32(0.0))  # no negative zero
        if len(levels) > MAX_ALPHABET:
            return raw
        zero = int(np.searchsorted(levels, 0.0)) if 0.0 in levels else 0
        form = Form(BOOK, levels=tuple(levels.tolist()), low=-zero, high=len(levels) - 1 - zero)
    else:
        integers = round_to_grid(values, step)
        form = Form(GRID, step=step, low=int(integers.min()), high=int(integers.max()))
        levels = np.array([integers.min(), integers.max()]) * step
    if form.low == form.high:
        return Form(ONE, levels=(float(np.float32(levels[0])),))
    integers = _to_integers(values, form)
    best, cost = raw, 32.0 * values.size
    for candidate in _candidates(form, values.size <= room, width):
        size = 8.0 * len(_header(candidate)) + _cost(integers, candidate, positions)
        if size < cost:
            best, cost = candidate, size
    return best


def write_tensor(
    values: Floats, form: Form, positions: Ints, header: ByteWriter, stream: SymbolWriter, ledger: Ledger
) -> None:
    """Append the header and the symbols of ``values``, shape ``(rows, columns)``; ``ledger`` counts bits by part."""
    data = _header(form)
    header.content += data
    if form.kind == RAW:
        ledger["raw numbers"] += 32 * values.size
        ledger["headers"] += 8 * len(data) - 32 * values.size
        return
    ledger["headers"] += 8 * len(data)
    if form.kind == ONE:
        return
    integers = _to_integers(values, form)
    if form.masked:
        mask = integers != 0
        ledger["masks"] += stream.put_mask(mask, positions, form.width)
        integers = integers[mask]
    flat = integers.ravel()
    if form.by_class:
        ledger["values"] += stream.put_classes(flat, form.high)
    else:
        ledger["values"] += stream.put_adaptive(form.symbols(flat), form.alphabet)


def read_form(reader: ByteReader, count: int) -> Form:
    """The header of a tensor of ``count`` numbers."""
    code = reader.take_byte()
    kind, flags = code & 0x0F, code & 0xF0
    masked, by_class = bool(flags & _MASKED), bool(flags & _BY_CLASS)
    if kind == RAW and not flags:
        return Form(RAW, raw=reader.take_array(count, "<f4"))
    if kind == ONE and not flags:
        return Form(ONE, levels=(float(reader.take_array(1, "<f4")[0]),))
    if kind == GRID and not flags & _HALF:
        step = _read_step(reader, bool(flags & _FLOAT_STEP))
        form = Form(GRID, step=step, masked=masked, by_class=by_class)
    elif kind == BOOK and not flags & (_FLOAT_STEP | _BY_CLASS):
        size = reader.take_varint(2, MAX_ALPHABET)
        levels = reader.take_array(size, "<f2" if flags & _HALF else "<f4")
        if not (np.diff(levels) > 0).all():
            raise damaged("a book whose numbers are not ascending")
        zero = int(np.searchsorted(levels, 0.0)) if 0.0 in levels else 0
        form = Form(BOOK, levels=tuple(levels.tolist()), masked=masked, low=-zero, high=size - 1 - zero)
    else:
        raise damaged("a tensor of an unknown form")
    if masked:
        if count > MAX_MASK:
            raise damaged(f"a mask of more than {MAX_MASK} entries")
        form = replace(form, width=reader.take_varint(maximum=MAX_WIDTH))
    if by_class:
        form = replace(form, low=-MAX_VARINT, high=reader.take_varint(1, MAX_CLASS))
    elif kind == GRID:
        limit = 2**MAX_CLASS
        low = reader.take_signed(-limit, limit)
        form = replace(form, low=low, high=low + reader.take_varint(1, MAX_ALPHABET - 1))
    return form


def take_tensor(form: Form, num_rows: int, positions: Ints, stream: SymbolReader) -> Floats:
    """The numbers, shape ``(rows, columns)``."""
    shape = (num_rows, len(positions))
    if form.raw is not None:
        return form.raw.reshape(shape)
    if form.kind == ONE:
        return np.full(shape, form.levels[0], dtype=np.float32)
    if form.masked:
        mask = stream.take_mask(num_rows, positions, form.width)
        integers = np.zeros(math.prod(shape), dtype=np.int32)
        integers[mask.ravel()] = _take_values(form, int(mask.sum()), stream)
    else:
        integers = _take_values(form, math.prod(shape), stream)
    with np.errstate(over="ignore"):
        numbers = form.to_numbers(integers)
    if not is_finite(numbers):
        raise damaged("weights that are not finite")
    return numbers.reshape(shape)


def _to_integers(values: Floats, form: Form) -> Ints:
    if form.kind == GRID:
        return round_to_grid(values, form.step)
    return np.searchsorted(np.array(form.levels, dtype=np.float32), values).astype(np.int64) + form.low


def _candidates(form: Form, has_room: bool, width: int) -> list[Form]:
    forms = [form] if form.alphabet <= MAX_ALPHABET else []
    if form.kind == GRID:
        largest = max(abs(form.low), abs(form.high)).bit_length()
        forms.append(replace(form, by_class=True, low=-MAX_VARINT, high=largest))
    if has_room and (form.kind == GRID or 0.0 in form.levels):
        forms += [replace(f, masked=True, width=w) for f in list(forms) for w in sorted({0, width})]
    return forms


def _cost(integers: Ints, form: Form, positions: Ints) -> float:
    if not form.masked:
        return _values_cost(integers.ravel(), form)
    mask = integers != 0
    return mask_cost(mask, positions, form.width) + _values_cost(integers[mask], form)


def _values_cost(values: Ints, form: Form) -> float:
    return classes_cost(values) if form.by_class else adaptive_cost(form.symbols(values), form.alphabet)


def _header(form: Form) -> bytes:
    out = ByteWriter()
    mantissa = math.frexp(form.step)[0]
    levels = np.array(form.levels, dtype=np.float32)
    with np.errstate(over="ignore"):
        is_half = form.kind == BOOK and bool((levels.astype(np.float16) == levels).all())
    is_float = form.kind == GRID and mantissa != 0.5
    flags = _MASKED * form.masked | _BY_CLASS * form.by_class | _FLOAT_STEP * is_float | _HALF * is_half
    out.put_byte(form.kind | flags)
    if form.kind == RAW:
        assert form.raw is not None
        out.put_array(form.raw, "<f4")
    elif form.kind == ONE:
        out.put_array(levels, "<f4")
    elif form.kind == BOOK:
        out.put_varint(len(levels))
        out.put_array(levels, "<f2" if is_half else "<f4")
    elif is_float:
        out.put_array(np.array(form.step), "<f4")
    else:
        out.put_signed(1 - math.frexp(form.step)[1])
    if form.masked:
        out.put_varint(form.width)
    if form.by_class:
        out.put_varint(form.high)
    elif form.kind == GRID:
        out.put_signed(form.low)
        out.put_varint(form.high - form.low)
    return bytes(out.content)


def _read_step(reader: ByteReader, is_float: bool) -> float:
    if not is_float:
        return 2.0 ** -reader.take_signed(-MAX_EXPONENT, MAX_EXPONENT)
    step = float(reader.take_array(1, "<f4")[0])
    if step <= 0.0:
        raise damaged("a grid whose step is not positive")
    return step


def _take_values(form: Form, count: int, stream: SymbolReader) -> NDArray[np.int32]:
    if form.by_class:
        return stream.take_classes(count, form.high)
    return form.values(stream.take_adaptive(count, form.alphabet))
