r"""Truncated log-normal posterior under a log-uniform prior: the two BMRS reductions and the spike limit.

In :math:`x = \ln\theta` with prior :math:`U[a, b]` and posterior :math:`N(\mu, \sigma^2)` truncated to ``[a, b]``:

* reduced prior :math:`N(\tilde\mu, \tilde\sigma^2)` truncated to ``[a, b]`` (BMRS_N): the product of two normals is a
  normal times :math:`N(\mu; \tilde\mu, v)`, :math:`v = \sigma^2 + \tilde\sigma^2`, so

  .. math:: \Delta F = \ln(b-a) + \ln Z_{\tilde q} - \ln Z_q - \ln Z_{\tilde p} - \tfrac12\ln(2\pi v)
            - \frac{(\mu-\tilde\mu)^2}{2v}

* reduced prior log-uniform on :math:`[a', b'] \subseteq [a, b]` (BMRS_U):

  .. math:: \Delta F = \ln\frac{b-a}{b'-a'} + \ln Q(a' \le x \le b')

* a truncated log-normal prior (``reduce_from_log_normal``): the scalar Normal form, and four normalisers;

* spike at the low end (:math:`\tilde\mu = a, \tilde\sigma \to 0`; Savage-Dickey):
  :math:`\Delta F = \ln(b-a) + \ln q_x(a)`.

Each normaliser and exponent is taken relative to the peak of its own density inside ``[a, b]``: written directly the
first form subtracts terms of size 1e14, and one location outside the support turns it into +inf.

References:
    Wright, Igel, Selvan, BMRS: Bayesian Model Reduction for Structured Pruning (2024); released code leaves out the
    :math:`2\pi`, so its values are larger by :math:`\tfrac12\ln 2\pi`.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyrobc.bmr.chunks import compact, score_in_chunks
from pyrobc.bmr.reduction import Reduction
from pyrobc.bmr.registry import register_reduction
from pyrobc.dists import TruncatedLogNormal, TruncatedLogUniform
from pyrobc.dists.truncation import locate_peak, log_peak_mass
from pyrobc.errors import ReductionError

__all__ = ["reduce_from_log_normal", "reduce_to_log_normal", "reduce_to_log_uniform", "reduce_to_spike"]

_OUTSIDE = "the reduced prior reaches beyond the support of the full prior"


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(x, high), low)


def _same_support(q: TruncatedLogNormal, p: TruncatedLogUniform | TruncatedLogNormal) -> Tensor:
    low, high = compact(p.low), compact(p.high)
    slack = 1e-6 * (high - low)
    return ((compact(q.low) - low).abs() <= slack) & ((compact(q.high) - high).abs() <= slack)


def _mask(delta_f: Tensor, is_defined: Tensor, why: str) -> tuple[Tensor, str]:
    if bool(is_defined.all()):
        return delta_f, ""
    return torch.where(is_defined, delta_f, math.nan), why


@register_reduction(TruncatedLogNormal, TruncatedLogUniform, TruncatedLogNormal)
def reduce_to_log_normal(q: TruncatedLogNormal, p: TruncatedLogUniform, reduced: TruncatedLogNormal) -> Reduction:
    """BMRS_N, elementwise."""
    low, high = compact(p.low), compact(p.high)
    delta_f = score_in_chunks(_score_normal, q.loc, q.scale, low, high, compact(reduced.loc), compact(reduced.scale))
    delta_f, reason = _mask(delta_f, _same_support(q, p) & _same_support(reduced, p), _OUTSIDE)

    def make_posterior() -> TruncatedLogNormal:
        scale, near_peak, near = _multiply(q.loc, q.scale, low, high, reduced.loc, reduced.scale)[:3]
        return TruncatedLogNormal(near_peak + near, scale, low, high, validate_args=False)

    return Reduction(delta_f, make_posterior, reason=reason)


def _multiply(
    loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, loc_r: Tensor, scale_r: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale of the product of two normals, its location as a peak and a distance from it, and what its peak lacks."""
    variance = scale.square() + scale_r.square()
    gap = loc_r - loc
    # The location of the product, seen from the peak of q and from the peak of the reduced prior.
    (peak_q, excess_q), (peak_r, excess_r) = locate_peak(loc, low, high), locate_peak(loc_r, low, high)
    from_q = excess_q + gap * (scale.square() / variance)
    from_r = excess_r - gap * (scale_r.square() / variance)
    energy = _energy(from_q, excess_q, low - peak_q, high - peak_q, scale)
    energy = energy + _energy(from_r, excess_r, low - peak_r, high - peak_r, scale_r)
    is_nearer_q = scale < scale_r
    near_peak, near = torch.where(is_nearer_q, peak_q, peak_r), torch.where(is_nearer_q, from_q, from_r)
    return scale * scale_r * variance.rsqrt(), near_peak, near, energy


def _score_normal(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, loc_r: Tensor, scale_r: Tensor) -> Tensor:
    product, near_peak, near, energy = _multiply(loc, scale, low, high, loc_r, scale_r)
    mass = log_peak_mass((low - near_peak - near) / product, (high - near_peak - near) / product)
    mass_q = log_peak_mass((low - loc) / scale, (high - loc) / scale)
    mass_r = log_peak_mass((low - loc_r) / scale_r, (high - loc_r) / scale_r)
    # product / (scale scale_r) = 1 / sqrt(v)
    return torch.log((high - low) * product / (scale * scale_r)) + mass - mass_q - mass_r - energy


def _energy(move: Tensor, excess: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> Tensor:
    """Exponent at the peak of the product, below that at the own peak: both measured from the own peak."""
    step = _clamp(move, low, high)
    return 0.5 * (step / scale) * ((step - 2.0 * excess) / scale)


@register_reduction(TruncatedLogNormal, TruncatedLogNormal, TruncatedLogUniform)
@register_reduction(TruncatedLogNormal, TruncatedLogNormal, TruncatedLogNormal)
def reduce_from_log_normal(
    q: TruncatedLogNormal, p: TruncatedLogNormal, reduced: TruncatedLogNormal | TruncatedLogUniform
) -> Reduction:
    """Truncated log-normal prior, elementwise; undefined where the reduced posterior would have no positive precision.

    The product of the three densities is a normal around its own location, cut to the reduced support; its exponent is
    summed at its peak, each factor measured from its own.
    """
    low, high = reduced.low, reduced.high
    signed: list[tuple[TruncatedLogNormal, float]] = [(q, 1.0), (p, -1.0)]
    if isinstance(reduced, TruncatedLogNormal):
        signed.append((reduced, 1.0))
    precision = sum((sign / law.scale.square() for law, sign in signed), torch.zeros_like(low))
    is_defined = precision > 0
    precision = torch.where(is_defined, precision, torch.ones_like(precision))
    # The location is found from q's: the precision-weighted pulls of the other two.
    pulls = (sign * (law.loc - q.loc) / law.scale.square() for law, sign in signed[1:])
    loc, scale = q.loc + sum(pulls, torch.zeros_like(low)) / precision, precision.rsqrt()
    peak = _clamp(loc, low, high)
    delta_f = log_peak_mass((low - loc) / scale, (high - loc) / scale) + torch.log(scale)
    for law, sign in signed:
        own, excess = locate_peak(law.loc, law.low, law.high)
        step = peak - own
        energy = 0.5 * (step / law.scale) * ((step - 2.0 * excess) / law.scale)
        mass = log_peak_mass((law.low - law.loc) / law.scale, (law.high - law.loc) / law.scale) + torch.log(law.scale)
        delta_f = delta_f - sign * (energy + mass)
    if isinstance(reduced, TruncatedLogUniform):
        delta_f = delta_f - torch.log(high - low)
    is_nested = (low >= p.low - 1e-6 * (p.high - p.low)) & (high <= p.high + 1e-6 * (p.high - p.low))
    why = _OUTSIDE if bool(is_defined.all()) else "the reduced posterior has no positive precision"
    delta_f, reason = _mask(delta_f, is_defined & is_nested & _same_support(q, p), why)
    return Reduction(delta_f, TruncatedLogNormal(loc, scale, low, high, validate_args=False), reason=reason)


@register_reduction(TruncatedLogNormal, TruncatedLogUniform, TruncatedLogUniform)
def reduce_to_log_uniform(q: TruncatedLogNormal, p: TruncatedLogUniform, reduced: TruncatedLogUniform) -> Reduction:
    """BMRS_U, elementwise; undefined where the reduced interval is not inside the full one."""
    low, high = compact(reduced.low), compact(reduced.high)
    slack = 1e-6 * (compact(p.high) - compact(p.low))
    is_nested = (low >= compact(p.low) - slack) & (high <= compact(p.high) + slack)
    width = compact(p.high) - compact(p.low)
    prior_mass = torch.log(torch.minimum(high, compact(p.high)) - torch.maximum(low, compact(p.low))) - torch.log(width)
    delta_f = score_in_chunks(_score_uniform, *_parameters(q), low, high, prior_mass)
    delta_f, reason = _mask(delta_f, _same_support(q, p) & is_nested, _OUTSIDE)
    posterior = TruncatedLogNormal(q.loc, q.scale, reduced.low, reduced.high, validate_args=False)
    return Reduction(delta_f, posterior, reason=reason)


def _parameters(q: TruncatedLogNormal) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.loc, q.scale, compact(q.low), compact(q.high)


def _score_uniform(
    loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, low_r: Tensor, high_r: Tensor, prior_mass: Tensor
) -> Tensor:
    return TruncatedLogNormal(loc, scale, low, high, validate_args=False).log_mass(low_r, high_r) - prior_mass


@register_reduction(TruncatedLogNormal, TruncatedLogUniform, Delta)
def reduce_to_spike(q: TruncatedLogNormal, p: TruncatedLogUniform, reduced: Delta) -> Reduction:
    """Exact deletion, the gate held at ``reduced.v``: ``Delta(exp(low))`` is the spike limit of BMRS_N."""
    x, low, high = torch.log(reduced.v), compact(p.low), compact(p.high)
    slack = 1e-6 * (high - low)
    if not bool(((x >= low - slack) & (x <= high + slack)).all()):
        raise ReductionError(
            "reduced prior Delta under TruncatedLogUniform",
            got="a point outside the support (zero has no density here)",
            allowed="exp(low) to exp(high)",
            fix="Delta(exp(low)) is the spike; Restricted(p, exp(low), epsilon) is the region of equivalence (ROPE)",
        )
    # A point given in single precision misses the end by a rounding error that a narrow posterior would notice.
    x = torch.where((x - low).abs() <= slack, low, torch.where((x - high).abs() <= slack, high, x))
    delta_f = score_in_chunks(_score_spike, *_parameters(q), x)
    delta_f, reason = _mask(delta_f, _same_support(q, p), _OUTSIDE)
    return Reduction(delta_f, reduced, reason=reason)


def _score_spike(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor, x: Tensor) -> Tensor:
    law = TruncatedLogNormal(loc, scale, low, high, validate_args=False)
    return law.log_density_log(x) + torch.log(high - low)
