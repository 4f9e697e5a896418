r"""Bits per weight: from posterior variance, as published rates count them, and as a rate--distortion choice.

**Significands from variance** (Louizos, Ullrich and Welling 2017).  A number with :math:`t` significand bits is known
up to its unit round-off :math:`u(t) = \tfrac12 2^{1-t} = 2^{-t}`; bits below the posterior's own uncertainty carry
nothing. Twice the variance is compared with the round-off,

.. math:: t = \#\{k \in 1..23 : 2\,\mathrm{Var}[w] < 2^{-k}\},

a layer takes the ceiling of the mean of :math:`t` over its surviving weights (``"mean"``; from the mean variance:
``"variance"``), and a weight costs one sign bit, :math:`e` exponent bits and :math:`t` significand bits with :math:`e
= \lceil \log_2(\log_2 \max|w| + 1) + 1 \rceil`.  That formula has no value for :math:`\max|w| \le 1/2`, and is zero
or negative below 0.708.  Here :math:`|\log_2 \max|w||` stands in place of :math:`\log_2 \max|w|`: the same number for
:math:`\max|w| \ge 1`, and as many bits for :math:`2^{-a}` as for :math:`2^a` below.  Weights are rounded to the
absolute grid of step :math:`2^{-t}`, so no weight moves by more than :math:`2^{-t-1} \le u(t)`.

**Published rates.** With :math:`N_l` weights in dense layer ``l``, :math:`n_l` in the smaller dense layer that
survives, and :math:`b_l` bits each: density :math:`\sum n_l/\sum N_l`, *pruning* :math:`\sum N_l/\sum n_l`, *fast
prediction* :math:`32\sum N_l/\sum n_l b_l`, and *maximum*, which must be decoded before use: 32 bits for each
distinct value and the empirical entropy for each weight.  Weights only; biases, widths and headers are not counted.
They are estimates: the size of a file is what ``codec.pack`` writes.

**Rate and distortion.** Moving the mean of :math:`q = \prod N(m_i, s_i^2)` by :math:`\delta` costs :math:`\mathrm{KL}
= \tfrac12 \sum \delta_i^2/s_i^2` nats, which is also the second-order rise of the expected negative log likelihood
where the posterior's precision is the curvature.  Per tensor and width ``t`` let :math:`D(t)` be that rise for
:math:`\delta = \mathrm{round}(w2^t)2^{-t} - w` and :math:`R(t)` the empirical code length of the integers plus the
price of learning their frequencies.  On the lower convex hull of each tensor's points :math:`(R, D)`, taking the
steepest step :math:`-\Delta D/\Delta R` of any tensor first visits exactly the minima of :math:`\sum D + \lambda \sum
R`: optimal for every rate it stops at, and short of the optimum by less than one step in between (Shoham and Gersho
1988).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyrobc.errors import BudgetError, DataError

__all__ = [
    "PublishedRates", "WidthChoice", "choose_widths", "count_layer_weights", "estimate_code_bits", "exponent_bits",
    "layer_bits", "measure_rise", "published_rates", "round_to_grid", "significand_bits", "stored_step",
]  # fmt: skip

Array = NDArray[np.float64]
MAX_SIGNIFICAND = 23
"""Significand bits of float32."""


def significand_bits(variance: ArrayLike) -> NDArray[np.int64]:
    r"""Significand bits :math:`t` per weight, shape as given; 0 for what is not known to within one half.

    With :math:`\mathrm{Var} = f 2^e, f \in [\tfrac12, 1)`, exactly :math:`k < -e` have :math:`2\mathrm{Var} < 2^{-k}`.

    Raises:
        DataError: a variance is negative or NaN.
    """
    values = _as_reals(variance, "variances", minimum=0.0)
    bits = np.clip(-1 - np.frexp(values)[1].astype(np.int64), 0, MAX_SIGNIFICAND)
    return np.where(values == 0.0, MAX_SIGNIFICAND, np.where(np.isinf(values), 0, bits))


def exponent_bits(weights: ArrayLike) -> int:
    """Exponent bits (its sign included) that reach the largest absolute weight; 1 where all are zero."""
    values = np.abs(_as_reals(weights, "weights", finite=True))
    largest = float(values.max(initial=0.0))
    return 1 if largest == 0.0 else math.ceil(math.log2(abs(math.log2(largest)) + 1.0) + 1.0)


def layer_bits(variance: ArrayLike, *, exponent: int = 3, of: Literal["mean", "variance"] = "mean") -> tuple[int, int]:
    """Significand bits and total bits, 1 + ``exponent`` + significand, of a layer's surviving weights.

    Args:
        variance: posterior variances of the surviving weights, any shape.
        exponent: exponent bits, 3 as in the publication or ``exponent_bits(weights)``.
        of: average the significand bits of the weights, or take those of the average variance.
    """
    values = _as_reals(variance, "variances", minimum=0.0)
    if values.size == 0:
        return 0, 1 + exponent
    if of == "mean":
        significand = math.ceil(float(significand_bits(values).mean()))
    else:
        significand = int(significand_bits(values.mean()))
    return significand, 1 + exponent + significand


def round_to_grid(weights: ArrayLike, step: float) -> NDArray[np.int64]:
    """Integers ``k`` with ``|w - k step| <= step / 2``; a tie goes to the even one."""
    if not (math.isfinite(step) and step > 0.0):
        raise DataError("step of the grid", got=repr(step), allowed="a positive number", fix="pass 2.0 ** -bits")
    scaled = _as_reals(weights, "weights", finite=True) / step
    if float(np.abs(scaled).max(initial=0.0)) > 2.0**52:
        raise DataError("step of the grid", got=f"{step:g}", allowed="at least max|w| / 2^52", fix="use a coarser step")
    return np.rint(scaled).astype(np.int64)


def stored_step(weights: ArrayLike, bits: int) -> float:
    r"""Step of the grid on which numbers take ``bits`` bits each, one of them the sign.

    With :math:`\max|w| < 2^E` the step is :math:`2^{E - (b - 1)}`, so that every number is one of the :math:`2^b + 1`
    multiples up to :math:`2^{b-1}` steps; 1 where all are zero.
    """
    largest = float(np.abs(_as_reals(weights, "weights", finite=True)).max(initial=0.0))
    if bits < 1:
        raise DataError("bits per number", got=repr(bits), allowed="1 or more", fix="32 keeps the numbers as they are")
    return math.ldexp(1.0, math.frexp(largest)[1] - (bits - 1)) if largest else 1.0


@dataclass(frozen=True)
class PublishedRates:
    """The columns of the published tables, full precision; the publication prints whole numbers, cut off."""

    density: float
    pruning: float
    fast: float
    maximum: float | None = None


def published_rates(
    dense: Sequence[int], kept: Sequence[int], bits: Sequence[int], values: Sequence[ArrayLike] | None = None
) -> PublishedRates:
    """Estimated compression rates, all ratios of bits before to bits after.

    Args:
        dense: weights per layer before.
        kept: weights per layer of the smaller dense network; ``count_layer_weights`` gives both.
        bits: bits per weight, by layer.
        values: the rounded weights by layer, ``kept[l]`` each; gives the *maximum* column.

    Example:
        >>> lenet = published_rates([235200, 30000, 1000], count_layer_weights([278, 98, 13, 10]), [8, 9, 14])
        >>> round(lenet.pruning, 2), round(lenet.fast, 2)
        (9.29, 36.84)
    """
    lengths = {len(dense), len(kept), len(bits)} | ({len(values)} if values is not None else set())
    if len(lengths) != 1 or not dense or min(kept) < 0 or min(bits) < 0 or min(dense) < 1 or sum(kept) < 1:
        raise DataError(
            "published rates",
            got=f"dense {list(dense)}, kept {list(kept)}, bits {list(bits)}",
            allowed="one dense size, one surviving size and one width for each layer, some weight surviving",
            fix="count weights with count_layer_weights",
        )
    before, after = sum(dense), sum(kept)
    stored = sum(n * b for n, b in zip(kept, bits, strict=True))
    maximum = None
    if values is not None:
        coded = sum(_codebook_bits(np.asarray(layer)) for layer in values)
        maximum = 32 * before / coded if coded else math.inf
    return PublishedRates(after / before, before / after, 32 * before / stored if stored else math.inf, maximum)


def count_layer_weights(widths: Sequence[int], areas: Sequence[int] | None = None) -> list[int]:
    """Weights per layer of a chain, ``widths[l] * widths[l + 1] * areas[l]``; areas of kernels are 1 by default."""
    kernel = [1] * (len(widths) - 1) if areas is None else list(areas)
    return [a * b * k for a, b, k in zip(widths[:-1], widths[1:], kernel, strict=True)]


def estimate_code_bits(symbols: ArrayLike) -> float:
    """Code length in bits of integers whose frequencies the decoder has to learn.

    The empirical entropy, ``n H``, plus half of ``log2 n`` for each distinct value but one (Rissanen 1984).
    """
    _, counts = np.unique(np.asarray(symbols), return_counts=True)
    if counts.size <= 1:
        return 0.0
    return _entropy_bits(counts) + 0.5 * (counts.size - 1) * math.log2(counts.sum())


def measure_rise(weights: ArrayLike, variance: ArrayLike, step: float) -> float:
    r"""Nats lost by rounding to the grid of ``step``: :math:`\tfrac12 \sum (w - w_q)^2/\mathrm{Var}`.

    Weights that are exactly zero are on every grid and lose nothing, whatever their variance.
    """
    values = _as_reals(weights, "weights", finite=True)
    spread = _as_reals(variance, "variances", minimum=0.0)
    if spread.shape != values.shape:
        raise DataError(
            "variances", got=f"shape {spread.shape}", allowed=f"the shape of the weights, {values.shape}",
            fix="pass the posterior variance of each weight",
        )  # fmt: skip
    error = values - round_to_grid(values, step) * step
    moved = error != 0.0
    with np.errstate(divide="ignore", over="ignore"):
        return float(0.5 * np.sum(error[moved] ** 2 / spread[moved]))


@dataclass(frozen=True)
class WidthChoice:
    """Fractional bits ``t`` per tensor (step ``2^-t``), and what they cost: code bits, and nats of expected NLL."""

    widths: dict[str, int]
    code_bits: float
    rise: float


def choose_widths(
    weights: Mapping[str, ArrayLike],
    variances: Mapping[str, ArrayLike],
    *,
    max_rise: float | None = None,
    max_bits: float | None = None,
    candidates: Sequence[int] = range(0, 17),
) -> WidthChoice:
    """Widths of least code length with a rise up to ``max_rise`` nats, or of least rise within ``max_bits`` bits.

    Args:
        weights: posterior means by tensor, zeros where pruned.
        variances: posterior variances, same names and shapes.
        max_rise: largest rise of the expected negative log likelihood, nats summed over the data.
        max_bits: largest code length; exactly one of the two limits is given.
        candidates: widths to choose from.

    Raises:
        BudgetError: no candidates meet the limit, or not exactly one limit is given.
        DataError: names, shapes or values do not fit.
    """
    if (max_rise is None) == (max_bits is None):
        raise BudgetError("widths", got="both or neither limit", allowed="one limit", fix="pass max_rise or max_bits")
    if set(weights) != set(variances) or not weights or len(candidates) == 0:
        raise DataError(
            "widths",
            got=f"weights of {sorted(weights)}, variances of {sorted(variances)}, {len(candidates)} candidates",
            allowed="the same tensors, at least one, and at least one candidate", fix="pass one variance per weight",
        )  # fmt: skip
    hulls = {name: _trade_off(weights[name], variances[name], sorted(set(candidates))) for name in weights}
    at = dict.fromkeys(hulls, 0)  # from the cheapest point of each hull
    steps = [(_slope(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        rate, rise = _total(hulls, at)
        if max_rise is not None and rise <= max_rise:
            break
        name = heapq.heappop(steps)[1]
        gain = hulls[name][at[name] + 1][0] - hulls[name][at[name]][0]
        if max_bits is not None and rate + gain > max_bits:
            continue  # too dear, as is all that follows in this tensor; another one may have a small step left
        at[name] += 1
        if at[name] + 1 < len(hulls[name]):
            heapq.heappush(steps, (_slope(hulls[name], at[name]), name))
    rate, rise = _total(hulls, at)
    if (max_rise is not None and not rise <= max_rise) or (max_bits is not None and rate > max_bits):
        raise BudgetError(
            "widths", got=f"{rate:.0f} bits and a rise of {rise:.4g} nats at the nearest choice",
            allowed=f"{max_rise:g} nats" if max_rise is not None else f"{max_bits:g} bits",
            fix="widen the limit or the candidates",
        )  # fmt: skip
    return WidthChoice({name: hulls[name][at[name]][2] for name in hulls}, rate, rise)


Point = tuple[float, float, int]  # code bits, rise, width


def _trade_off(weights: ArrayLike, variance: ArrayLike, candidates: Sequence[int]) -> list[Point]:
    """Lower convex hull of a tensor's (rate, rise), from its cheapest to its most exact width."""
    points = [
        (estimate_code_bits(round_to_grid(weights, 2.0**-t)), measure_rise(weights, variance, 2.0**-t), t)
        for t in candidates
    ]
    hull: list[Point] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue  # dearer and no better
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) >= _slope([hull[-1], point], 0):
            hull.pop()
        if hull and point[0] == hull[-1][0]:
            hull.pop()
        hull.append(point)
    return hull


def _slope(hull: Sequence[Point], at: int) -> float:
    """Rise per bit of the step after ``at``; negative, and more so for a better step."""
    (r0, d0, _), (r1, d1, _) = hull[at], hull[at + 1]
    return -math.inf if math.isinf(d0) or r1 == r0 else (d1 - d0) / (r1 - r0)


def _total(hulls: Mapping[str, Sequence[Point]], at: Mapping[str, int]) -> tuple[float, float]:
    return sum(hulls[n][at[n]][0] for n in hulls), sum(hulls[n][at[n]][1] for n in hulls)


def _codebook_bits(values: NDArray[Any]) -> float:
    _, counts = np.unique(values, return_counts=True)
    return _entropy_bits(counts) + 32.0 * counts.size


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    total = counts.sum()
    return float(np.sum(counts * np.log2(total / counts))) if total else 0.0


def _as_reals(values: ArrayLike, what: str, *, minimum: float = -math.inf, finite: bool = False) -> Array:
    reals = np.asarray(values, dtype=np.float64)
    if np.isnan(reals).any() or (reals < minimum).any() or (finite and not np.isfinite(reals).all()):
        allowed = "finite numbers" if finite else f"numbers from {minimum:g} up"
        raise DataError(what, got="NaN, infinite or negative values", allowed=allowed, fix="check the posterior")
    return reals
