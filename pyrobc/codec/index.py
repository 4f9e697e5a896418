"""The features that a layer of an ``.rbc`` file selects: ascending indices, as a mask or as gaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from pyrobc.codec.coder import MAX_STEPS, BitCoder, BitMeter, damaged
from pyrobc.codec.format import MAX_NUMBER, FieldReader, FieldWriter
from pyrobc.codec.geometry import Geometry
from pyrobc.codec.priors import find_level
from pyrobc.codec.sparse import MAX_COLUMNS, SparseCoder

__all__ = ["MAX_WIDTH", "IndexForm", "code_index", "plan_index", "read_index", "write_index"]

Ints = NDArray[np.int64]
MAX_WIDTH = 64
"""Width of the widest image whose rows a mask is told of."""


@dataclass(frozen=True)
class IndexForm:
    """How many indices there are, the last one, and the width of the image whose pixels they are; -1: as gaps."""

    count: int
    last: int
    width: int

    @property
    def steps(self) -> int:
        """Decisions that the indices take at most."""
        return 3 * self.count if self.width < 0 else 2 * (self.last + 1)


def plan_index(index: Ints, weights: NDArray[np.float32]) -> IndexForm:
    """The shorter form of ascending indices; ``weights`` are those of their columns, and show an image's width."""
    count, last = len(index), int(index[-1])
    gaps = IndexForm(count, last, -1)
    if last >= MAX_COLUMNS:
        return gaps
    return min(gaps, IndexForm(count, last, _find_width(index, weights)), key=lambda form: _cost(form, index))


def write_index(form: IndexForm, out: FieldWriter) -> None:
    """The header: the last index, a flag (mask or gaps), and for a mask the width."""
    out.put_number(form.last)
    out.put_flag(form.width >= 0)
    if form.width >= 0:
        out.put_number(form.width)


def read_index(reader: FieldReader, count: int) -> IndexForm:
    """The header of ``count`` indices."""
    last = reader.take_number(minimum=count - 1, maximum=MAX_NUMBER - 1)
    width = reader.take_number(maximum=MAX_WIDTH) if reader.take_flag() else -1
    form = IndexForm(count, last, width)
    if width >= 0 and last >= MAX_COLUMNS or form.steps > MAX_STEPS:
        raise damaged("indices of an unknown form")
    return form


def code_index(coder: BitCoder, form: IndexForm, index: Ints | None) -> Ints:
    """Code ascending indices, or decode them if ``index`` is None."""
    if form.width < 0:
        return _code_gaps(coder, form, index)
    mask = None
    if index is not None:
        chosen = np.zeros(form.last + 1, dtype=np.int64)
        chosen[index] = 1
        mask = chosen.tolist()
    geometry = Geometry("pixels" if form.width else "vector", np.arange(form.last + 1), form.last + 1, form.width)
    level = find_level(form.count, form.last + 1)
    found = np.flatnonzero(SparseCoder(coder, geometry, 1, level, only_mask=True).code_row(mask))
    if len(found) != form.count or found[-1] != form.last:
        raise damaged("indices that do not fit the layer")
    return found


def _code_gaps(coder: BitCoder, form: IndexForm, index: Ints | None) -> Ints:
    """Gaps minus one, as numbers."""
    coder.claim(form.steps)
    if index is not None:
        out = FieldWriter(coder)
        for gap in np.diff(index, prepend=-1).tolist():
            out.put_number(gap - 1)
        return index
    reader = FieldReader(coder)
    found = np.cumsum([reader.take_number() + 1 for _ in range(form.count)]) - 1
    if found[-1] != form.last:
        raise damaged("indices that do not fit the layer")
    return found


def _cost(form: IndexForm, index: Ints) -> float:
    meter = BitMeter()
    code_index(meter, form, index)
    return meter.bits


def _find_width(index: Ints, weights: NDArray[np.float32]) -> int:
    """The image width under which the weight above and the one to the left predict signs best, 0 if neither does.

    For each width, the signs of the weights after the same two signs are Dirichlet(1/2)-multinomial.  The shortest code
    is off by one where strokes are slanted, so that the model itself chooses among its neighbours and a common width.
    """
    rows = _SAMPLE // (int(index[-1]) + 1) + 1
    signs = np.ones((min(len(weights), rows), int(index[-1]) + 1), dtype=np.int64)  # 0, 1, 2: minus, none, plus
    signs[:, index] += np.sign(weights[:rows]).astype(np.int64)
    widths = range(2, min(MAX_WIDTH, signs.shape[1] // 4) + 1)
    start = widths.stop - 1  # the same entries for every width

    def cost(width: int) -> float:
        near = 3 * signs[:, start - 1 : -1] + signs[:, start - width : -width] if width else 0 * signs[:, start:]
        counts = np.bincount((3 * near + signs[:, start:]).ravel(), minlength=27).reshape(9, 3)
        return float((gammaln(counts.sum(1) + 1.5) - gammaln(counts + 0.5).sum(1)).sum())

    found = min((0, *widths), key=cost) if widths else 0
    if not found:
        return 0
    sample = signs[: _FEW // len(index) + 1, index] - 1
    level = find_level(int(np.count_nonzero(sample)), sample.size)

    def exact(width: int) -> float:
        meter = BitMeter()
        coder = SparseCoder(meter, Geometry("image", index, int(index[-1]) + 1, width), len(sample), level)
        for row in sample.tolist():
            coder.code_row(row)
        return meter.bits

    return min({found - 1, found, found + 1, _COMMON} & set(widths), key=exact)


_SAMPLE, _FEW = 2**16, 2**13  # entries that are looked at
_COMMON = 28
