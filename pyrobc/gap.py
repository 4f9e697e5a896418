r"""A cut where scores part into two heaps: the widest gap, in place of a threshold read off a histogram by eye.

Let :math:`s_1 \le \dots \le s_n` be the finite scores of one block, :math:`R = s_n - s_1` their range and
:math:`d = s_{k+1} - s_k` the widest gap.  The cut is its middle, :math:`(s_k + s_{k+1})/2`, if all of these hold:

1. no other gap is as wide;
2. d is wider than the interquartile range of the scores below it, and of those above it: the heaps are further apart
   than either is wide.  Quartiles, because a heap has stragglers and may have a single member;
3. so wide a gap is no accident of few scores.  If :math:`n - 2` scores were thrown evenly between the ends, one of the
   :math:`n - 1` gaps would exceed a share :math:`x = d/R` of the range with a probability of at most

   .. math:: (n-1)(1-x)^{n-2},

   which is exact from :math:`x = 1/2` up; it must be below 0.05.  Three scores need :math:`x > 0.975`, ten
   :math:`x > 0.48`, a hundred :math:`x > 0.075`, and fewer than three never pass.

Otherwise there is no cut: one heap, or none that can be told from one.  The rule sees no order of the groups, and
shifting or stretching the scores shifts and stretches the cut.  It finds two heaps only: with three it cuts at the
wider gap, if the side that holds two of them passes the second condition.

References:
    Louizos, Ullrich, Welling (2017), Bayesian compression for deep learning: thresholds on scores "by inspection".
    David, Nagaraja (2003), Order statistics, section 6.4: spacings of uniform samples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Gap", "find_gap"]

LARGEST_CHANCE = 0.05
"""Probability, under evenly thrown scores, from which a gap may be an accident."""


class Gap(NamedTuple):
    """Where to cut and how wide the gap there is; NaN, NaN and the reason if there is no cut."""

    cut: float
    width: float
    reason: str = ""


def find_gap(scores: ArrayLike) -> Gap:
    """The cut between two heaps of scores, or why there is none; what is not finite is left aside.

    Example:
        >>> find_gap([0.0, 9.0, 1.0, 10.0, 0.5, 9.5, 0.0])
        Gap(cut=5.0, width=8.0, reason='')
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    values = np.sort(values[np.isfinite(values)])
    n = len(values)
    if n < 3:
        return _none(f"{n} finite score{'s' if n != 1 else ''}, and a gap is seen among three or more")
    with np.errstate(over="ignore"):
        gaps, spread = np.diff(values), values[-1] - values[0]
    if not 0 < spread < np.inf:
        return _none("all scores are equal" if spread == 0 else "the scores are too far apart to subtract")
    k = int(gaps.argmax())
    width, share = float(gaps[k]), float(gaps[k] / spread)
    if (gaps == gaps[k]).sum() > 1:
        return _none(f"several gaps are {width:.3g} wide")
    heaps = max(float(np.subtract(*np.percentile(side, [75, 25]))) for side in (values[: k + 1], values[k + 1 :]))
    if not width > heaps:
        return _none(f"the widest gap, {width:.3g}, is narrower than a heap beside it, {heaps:.3g}")
    chance = min(1.0, (n - 1) * (1.0 - share) ** (n - 2))
    if not chance < LARGEST_CHANCE:
        return _none(f"the widest gap, {width:.3g}, is no wider than {n} evenly thrown scores may leave")
    return Gap(float(values[k] + gaps[k] / 2), width)


def _none(reason: str) -> Gap:
    return Gap(np.nan, np.nan, f"no gap to cut at: {reason}")
