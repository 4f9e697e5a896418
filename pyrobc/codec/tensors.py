"""One tensor of an ``.rbc`` file: which form is shortest, its header, its numbers, and back.

The forms and their fields are described in ``pyrobc.codec.rbc``.  Grid and book turn a tensor into integers, 0 for the
number zero.  *Sparse* integers are coded one by one by ``codec.sparse``; *bulk* ones in blocks by ``codec.streams``,
either *direct* (one adaptive alphabet) or *by class* (adaptive bit length of ``|k|``, then sign and low bits as they
are).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pyrobc.bits import round_to_grid
from pyrobc.codec.coder import BitCoder, BitMeter, damaged
from pyrobc.codec.format import FieldReader, FieldWriter, is_finite
from pyrobc.codec.geometry import PLANES, Geometry
from pyrobc.codec.priors import find_level
from pyrobc.codec.sparse import MAX_COLUMNS, MAX_LOW_BITS, SparseCoder, count_steps
from pyrobc.codec.streams import (
    MAX_ALPHABET,
    MAX_CLASS,
    PIECE,
    SymbolReader,
    SymbolWriter,
    adaptive_cost,
    classes_cost,
)

__all__ = [
    "BULK", "FEW", "MAX_EXPONENT", "ONE", "RAW", "SPARSE", "Form", "check_numbers", "choose_form", "code_sparse",
    "put_bulk", "read_form", "take_bulk", "to_integers", "write_form",
]  # fmt: skip

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

RAW, ONE, SPARSE, BULK = range(4)
_RARE = 8192  # 1/8
FEW = 2048
"""Raw numbers up to which they are fields; more are bytes."""
MAX_EXPONENT = 140


@dataclass(frozen=True)
class Form:
    """How a tensor is stored.

    Attributes:
        kind: raw, one, sparse or bulk.
        step: of the grid; 0 for a book.
        levels: of a book, ascending: of a sparse one the magnitudes, of a bulk one all; the number of form one.
        level: log odds that a sparse form starts from.
        low_bits: of a sparse form.
        is_flat: whether a sparse form does without the planes that its columns lie on.
        by_class: whether a bulk grid is.
        low: smallest integer.
        high: largest integer, or the largest class.
        raw: all numbers, if they are few or being written.
    """

    kind: int
    step: float = 0.0
    levels: tuple[float, ...] = ()
    level: int = 0
    low_bits: int = 0
    is_flat: bool = False
    by_class: bool = False
    low: int = 0
    high: int = 0
    raw: Floats | None = None

    @property
    def largest(self) -> int | None:
        """Largest unary part of a sparse form's sizes."""
        return None if self.step else len(self.levels) - 1

    def to_numbers(self, integers: NDArray[np.int32]) -> Floats:
        """Integers, shape ``(n,)``, back to numbers; a piece at a time, as a tensor may fill the memory."""
        numbers, levels = np.empty(len(integers), dtype=np.float32), np.array(self.levels, dtype=np.float32)
        low = self.low
        if self.kind == SPARSE and not self.step:
            levels, low = np.concatenate([-levels[::-1], np.zeros(1, dtype=np.float32), levels]), -len(levels)
        for start in range(0, len(integers), PIECE):
            piece = integers[start : start + PIECE]
            numbers[start : start + PIECE] = piece * self.step if self.step else levels[piece - low]
        return numbers


def choose_form(values: Floats, step: float | None, geometry: Geometry, last_step: float, room: int) -> Form:
    """The shortest form that loses nothing, or, with a ``step``, nothing beyond half a step.

    Args:
        values: finite, shape ``(rows, columns)``.
        step: of the grid, float32; None keeps every number.
        geometry: of the columns.
        last_step: of the tensor of this role before, which costs less to say.
        room: decisions left.
    """
    raw = Form(RAW, raw=values.ravel())
    if step is not None and float(np.abs(values).max()) / step >= 2.0**MAX_CLASS:
        step = None  # finer than what is worth a grid
    forms = [] if step is None else [Form(SPARSE, step=step)]
    if step is None:
        levels = np.unique(values + np.float32(0.0))  # no negative zero
        if len(levels) == 1:
            return Form(ONE, levels=(float(levels[0]),))
        if len(levels) > MAX_ALPHABET:
            return raw
        magnitudes = np.unique(np.abs(levels[levels != 0]))
        found = _find_step(magnitudes)
        forms = [Form(SPARSE, levels=tuple(magnitudes.tolist()))] + ([Form(SPARSE, step=found)] if found else [])
        forms.append(Form(BULK, levels=tuple(levels.tolist()), high=len(levels) - 1))
    best, cost = raw, 32.0 * values.size
    for form in forms:
        integers = to_integers(values, form)
        if integers.min() == integers.max():
            return Form(ONE, levels=(float(form.to_numbers(integers.ravel()[:1].astype(np.int32))[0]),))
        for candidate in _candidates(form, integers, room, geometry):
            bits = _cost(integers, candidate, geometry, last_step)
            if bits < cost:
                best, cost = candidate, bits
    return best


def write_form(form: Form, out: FieldWriter, last_step: float, is_weight: bool) -> None:
    """The header; ``is_weight`` of a linear or convolutional layer, whose columns may lie on planes."""
    out.put_bits(form.kind, 2)
    if form.kind == RAW:
        assert form.raw is not None
        if len(form.raw) <= FEW:
            out.put_floats(form.raw)
    elif form.kind == ONE:
        out.put_flag(form.levels[0] != 0.0)
        if form.levels[0] != 0.0:
            out.put_floats(np.array(form.levels, dtype=np.float32))
    else:
        out.put_flag(form.step > 0.0)
        if form.step:
            _put_step(form.step, out, last_step)
        else:
            out.put_number(len(form.levels))
            out.put_floats(np.array(form.levels, dtype=np.float32))
        if form.kind == SPARSE:
            if is_weight:
                out.put_flag(form.is_flat, _RARE)
            out.put_bits(form.level, 4)
            if form.step:
                out.put_bits(form.low_bits, 4)
        elif form.step:
            out.put_flag(form.by_class)
            if not form.by_class:
                out.put_signed(form.low)
            out.put_number(form.high if form.by_class else form.high - form.low)


def read_form(reader: FieldReader, count: int, num_columns: int, last_step: float, is_weight: bool) -> Form:
    """The header of a tensor of ``count`` numbers."""
    kind = reader.take_bits(2)
    if kind == RAW:
        return Form(RAW, raw=reader.take_floats(count) if count <= FEW else None)
    if kind == ONE:
        return Form(ONE, levels=(float(reader.take_floats(1)[0]) if reader.take_flag() else 0.0,))
    form = Form(kind)
    if reader.take_flag():
        form = replace(form, step=_take_step(reader, last_step))
    else:
        levels = reader.take_floats(reader.take_number(1, MAX_ALPHABET))
        if not (np.diff(levels) > 0).all() or (kind == SPARSE and levels[0] <= 0):
            raise damaged("a book whose numbers are not ascending")
        form = replace(form, levels=tuple(levels.tolist()), high=len(levels) - 1)
    if kind == SPARSE:
        if num_columns > MAX_COLUMNS:
            raise damaged(f"a sparse tensor of more than {MAX_COLUMNS} columns")
        is_flat = is_weight and reader.take_flag(_RARE)
        level = reader.take_bits(4)
        low_bits = reader.take_bits(4) if form.step else 0
        if low_bits > MAX_LOW_BITS:
            raise damaged("a tensor of an unknown form")
        return replace(form, level=level, low_bits=low_bits, is_flat=is_flat)
    if form.step:
        by_class = reader.take_flag()
        limit = 2**MAX_CLASS
        low = 0 if by_class else reader.take_signed(-limit, limit)
        high = reader.take_number(1, MAX_CLASS) if by_class else low + reader.take_number(1, MAX_ALPHABET - 1)
        form = replace(form, by_class=by_class, low=low, high=high)
    return form


def code_sparse(
    coder: BitCoder,
    form: Form,
    geometry: Geometry,
    values: Ints | None,
    num_rows: int,
    prices: list[tuple[float, float]] | None = None,
) -> tuple[NDArray[np.int32], float]:
    """Code a matrix of integers, or decode it if ``values`` is None; returns it, and the bits of signs and sizes."""
    result = np.zeros((num_rows, len(geometry.positions)), dtype=np.int32)
    geometry = geometry.flatten() if form.is_flat else geometry
    sparse = SparseCoder(coder, geometry, num_rows, form.level, form.low_bits, form.largest)
    for r in range(num_rows):
        result[r] = sparse.code_row(None if values is None else values[r].tolist(), prices)
    return result, sparse.value_bits


def put_bulk(form: Form, integers: Ints, stream: SymbolWriter) -> float:
    """Append integers; returns their bits."""
    if form.by_class:
        return stream.put_classes(integers.ravel(), form.high)
    return stream.put_adaptive(integers.ravel() - form.low, form.high - form.low + 1)


def take_bulk(form: Form, count: int, stream: SymbolReader) -> NDArray[np.int32]:
    """``count`` integers."""
    if form.by_class:
        return stream.take_classes(count, form.high)
    values = stream.take_adaptive(count, form.high - form.low + 1)
    values += np.int32(form.low)
    return values


def to_integers(values: Floats, form: Form) -> Ints:
    """Steps of the grid, or positions in the book."""
    if form.step:
        return round_to_grid(values, form.step)
    levels = np.array(form.levels, dtype=np.float32)
    if form.kind == BULK:
        return np.searchsorted(levels, values).astype(np.int64)
    return np.where(values == 0, 0, np.sign(values) * (np.searchsorted(levels, np.abs(values)) + 1)).astype(np.int64)


def check_numbers(numbers: Floats) -> Floats:
    """Finite numbers, or an error."""
    if not is_finite(numbers):
        raise damaged("weights that are not finite")
    return numbers


def _find_step(magnitudes: Floats) -> float | None:
    """A float32 of which all magnitudes are multiples, rounded to float32."""
    for parts in range(1, 9):
        step = float(np.float32(magnitudes[0] / np.float32(parts)))
        if not 2.0**-MAX_EXPONENT <= step or float(magnitudes[-1]) / step >= MAX_ALPHABET:
            continue
        if ((np.rint(magnitudes.astype(np.float64) / step) * step).astype(np.float32) == magnitudes).all():
            return step
    return None


def _candidates(form: Form, integers: Ints, room: int, geometry: Geometry) -> list[Form]:
    low, high = int(integers.min()), int(integers.max())
    ones, forms = int(np.count_nonzero(integers)), []
    if form.kind == BULK:
        return [form]
    if integers.shape[1] <= MAX_COLUMNS and count_steps(integers, form.largest) <= room:
        low_bits = _find_low_bits(integers) if form.step else 0
        if form.largest is not None or max(-low, high) >> low_bits < 2**16:
            forms.append(replace(form, level=find_level(ones, integers.size), low_bits=low_bits))
            if geometry.kind in PLANES:
                forms.append(replace(forms[-1], is_flat=True))
    if form.step:
        if high - low < MAX_ALPHABET:
            forms.append(replace(form, kind=BULK, low=low, high=high))
        forms.append(replace(form, kind=BULK, by_class=True, high=max(-low, high).bit_length()))
    return forms


def _find_low_bits(integers: Ints) -> int:
    """Fair bits of a size under which fair bits and unary parts of known frequencies are shortest."""
    sizes = np.abs(integers[integers != 0]) - 1

    def cost(low_bits: int) -> float:
        unary = sizes >> low_bits
        return low_bits * len(sizes) + adaptive_cost(np.minimum(unary, 63), 64) + 16.0 * int((unary > 24).sum())

    return min(range(MAX_LOW_BITS + 1), key=cost) if len(sizes) and sizes.max() else 0


def _cost(integers: Ints, form: Form, geometry: Geometry, last_step: float) -> float:
    meter = BitMeter()
    write_form(form, FieldWriter(meter), last_step, geometry.kind != "vector")
    if form.kind == SPARSE:
        code_sparse(meter, form, geometry, integers, len(integers))
        return meter.bits
    if form.by_class:
        return meter.bits + classes_cost(integers.ravel()) + 64.0
    return meter.bits + adaptive_cost(integers.ravel() - form.low, form.high - form.low + 1) + 64.0


def _put_step(step: float, out: FieldWriter, last_step: float) -> None:
    """A flag, whether it is the last one; if not, a flag, whether it is a power of two; its exponent or a float."""
    out.put_flag(step == last_step)
    if step != last_step:
        mantissa, exponent = math.frexp(step)
        out.put_flag(mantissa == 0.5)
        if mantissa == 0.5:
            out.put_signed(1 - exponent)
        else:
            out.put_floats(np.array([step], dtype=np.float32))


def _take_step(reader: FieldReader, last_step: float) -> float:
    if reader.take_flag():
        step = last_step
    elif reader.take_flag():
        step = 2.0 ** -reader.take_signed(-MAX_EXPONENT, MAX_EXPONENT)
    else:
        step = float(reader.take_floats(1)[0])
    if step <= 0.0:
        raise damaged("a grid whose step is not positive")
    return step
