"""The largest of very many numbers, in passes over chunks: nothing is sorted, copied or joined.

The bits of a float64, as an integer with the lower 63 flipped below zero, are ordered as the numbers are.  Counting the
numbers by the leading 16 bits tells in which interval the ``count``-th largest lies; counting those of the interval by
the next 16, and so on, gives it exactly after four passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["CHUNK", "find_above", "find_largest", "split_flat"]

CHUNK = 1 << 18  # what is made of so many at a time stays in a processor's cache
_DIGITS = (48, 32, 16, 0)


def split_flat(tensor: Tensor) -> tuple[Tensor, ...]:
    """Its elements, ``CHUNK`` at a time; views where it is contiguous."""
    chunks: tuple[Tensor, ...] = tensor.reshape(-1).split(CHUNK)
    return chunks


def find_above(score: Tensor, cut: float) -> Tensor:
    """Where the score is finite and above ``cut``."""
    above = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    for chunk, where in zip(split_flat(score), split_flat(above), strict=True):
        where.copy_((chunk > cut) & chunk.isfinite())  # of all at once, isfinite takes as much memory again
    return above


def find_largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Where the ``count`` largest finite scores are, or all if there are fewer; of equal ones the first."""
    total = sum(int(chunk.isfinite().sum()) for chunk in _all_chunks(scores))
    gone = {name: torch.zeros(score.shape, dtype=torch.bool, device=score.device) for name, score in scores.items()}
    left = min(count, total)
    if left == 0:
        return gone
    cut, left = _find_cut(scores, left)
    for name, score in scores.items():
        for chunk, where in zip(split_flat(score), split_flat(gone[name]), strict=True):
            key = _to_key(chunk)
            is_finite, is_equal = chunk.isfinite(), key == cut
            where |= is_finite & (key > cut)
            if left and bool(is_equal.any()):
                first = is_equal.nonzero().squeeze(1)[:left]
                where[first] = True
                left -= len(first)
    return gone


def _find_cut(scores: Mapping[str, Tensor], count: int) -> tuple[int, int]:
    """Key of the ``count``-th largest finite score, and how many of those equal to it are among the largest."""
    prefix, left = 0, count
    for number, shift in enumerate(_DIGITS):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for chunk in _all_chunks(scores):
            key = _to_key(chunk[chunk.isfinite()])
            if number:
                key = key[key >> (shift + 16) == prefix]
            digits = (key >> shift) + (1 << 15) if number == 0 else (key >> shift) & 0xFFFF
            counts += torch.bincount(digits, minlength=1 << 16).cpu()
        above = counts.flip(0).cumsum(0)
        position = int(torch.searchsorted(above, left))  # from the largest digit down
        left -= int(above[position - 1]) if position else 0
        digit = (1 << 16) - 1 - position
        prefix = digit - (1 << 15) if number == 0 else (prefix << 16) | digit
    return prefix, left


def _to_key(values: Tensor) -> Tensor:
    """Integers in the order of the numbers; the two zeros are one."""
    bits = (values.double() + 0.0).view(torch.int64)  # minus zero plus zero is zero
    return bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)


def _all_chunks(scores: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (chunk for score in scores.values() for chunk in split_flat(score))
