"""The features that a layer of an ``.rbc`` file selects: ascending indices, as a mask or as gaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from pyrobc.codec.format import MAX_VARINT, ByteReader, ByteWriter, damaged
from pyrobc.codec.streams import MAX_CLASS, MAX_MASK, MAX_WIDTH, SymbolReader, SymbolWriter, classes_cost, mask_cost

__all__ = ["IndexForm", "read_index", "take_index", "write_index"]

Ints = NDArray[np.int64]
_MASK, _GAPS = 0, 1


def write_index(index: Ints, header: ByteWriter, stream: SymbolWriter, ledger: dict[str, float]) -> int:
    """Append ascending indices; returns the width of the image whose pixels they seem to be, 0 if none."""
    last = int(index[-1])
    positions, mask = np.arange(last + 1), np.zeros((1, last + 1), dtype=np.bool_)
    gaps = np.diff(index, prepend=-1) - 1
    cost, width = classes_cost(gaps), -1
    if last < stream.room:
        mask[0, index] = True
        for candidate in {0, _find_width(mask[0])}:
            bits = mask_cost(mask, positions, candidate)
            if bits < cost:
                cost, width = bits, candidate
    before = len(header.content)
    header.put_varint(last)
    header.put_byte(_GAPS if width < 0 else _MASK)
    if width < 0:
        classes = max(1, int(gaps.max()).bit_length())
        header.put_varint(classes)
        cost = stream.put_classes(gaps, classes)
    else:
        header.put_varint(width)
        cost = stream.put_mask(mask, positions, width)
    ledger["indices"] += cost + 8 * (len(header.content) - before)
    return max(width, 0)


@dataclass(frozen=True)
class IndexForm:
    """How indices are stored: the last one, gaps or a mask, and the largest class or the width of the image."""

    last: int
    mode: int
    setting: int


def read_index(reader: ByteReader, count: int) -> IndexForm:
    """The header of ``count`` indices."""
    last = reader.take_varint(minimum=count - 1, maximum=MAX_VARINT - 1)
    mode = reader.take_byte()
    if mode not in (_MASK, _GAPS) or (mode == _MASK and last >= MAX_MASK):
        raise damaged("indices of an unknown form")
    setting = reader.take_varint(1, MAX_CLASS) if mode == _GAPS else reader.take_varint(maximum=MAX_WIDTH)
    return IndexForm(last, mode, setting)


def take_index(form: IndexForm, count: int, stream: SymbolReader) -> Ints:
    """Ascending indices, the last one as announced."""
    if form.mode == _MASK:
        index = np.flatnonzero(stream.take_mask(1, np.arange(form.last + 1), form.setting))
    else:
        gaps = stream.take_classes(count, form.setting)
        if (gaps < 0).any():
            raise damaged("indices that descend")
        index = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if len(index) != count or index[-1] != form.last:
        raise damaged("indices that do not fit the layer")
    return index


def _find_width(mask: NDArray[np.bool_]) -> int:
    """The image width under which the pixel above and the one to the left predict best, 0 for short masks.

    For each width, ones among ``n`` entries of a neighbourhood are Beta(1/2, 1/2)-binomial: the shortest code wins.
    """
    widths = range(2, min(MAX_WIDTH, len(mask) // 4) + 1)
    bits, start = mask.astype(np.int64), widths.stop - 1  # the same entries for every width

    def cost(width: int) -> float:
        near = 2 * bits[start - 1 : -1] + bits[start - width : -width]
        ones = np.bincount(near, weights=bits[start:], minlength=4)
        zeros = np.bincount(near, minlength=4) - ones
        return float((gammaln(ones + zeros + 1.0) - gammaln(ones + 0.5) - gammaln(zeros + 0.5)).sum())

    return min(widths, key=cost) if widths else 0
