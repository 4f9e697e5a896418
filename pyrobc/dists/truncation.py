r"""A standard normal restricted to an interval, in logarithms: the numerics under the truncated log-normal.

Everything is measured from the *peak*, the point of ``[lower, upper]`` nearest to zero.  With
:math:`\xi = \max(\text{lower}, -\text{upper}, 0)` the distance of the interval from zero and :math:`w` its width,

.. math::
    Z = \Phi(u) - \Phi(l) = \frac{e^{-\xi^2/2}}{\sqrt{2\pi}}\,J, \qquad
    J = \begin{cases}
        \sqrt{2\pi}\,\tfrac12[\operatorname{erf}(u/\sqrt2) + \operatorname{erf}(-l/\sqrt2)] & l \le 0 \le u \\
        \int_0^w e^{-\xi t - t^2/2}\,dt = M(\xi) - e^{-\xi w - w^2/2} M(\xi + w) & \text{otherwise}
    \end{cases}

where :math:`M(x) = \sqrt{\pi/2}\,\operatorname{erfcx}(x/\sqrt2)` is Mills' ratio.  The factor :math:`e^{-\xi^2/2}`,
which underflows and whose logarithm (up to 1e18 for a narrow normal beside its interval) would swamp everything else,
never enters a difference.  The inner case adds positive terms only, so no digits cancel in either.

Moments of the distance t from the end of a half-line, :math:`p(t) \propto e^{-\xi t - t^2/2}`, follow from Laplace's
continued fraction :math:`1/M(x) = x + \tfrac{1}{x+}\tfrac{2}{x+}\tfrac{3}{x+}\cdots`:

.. math::
    E[t] = \delta(x) = \frac1{M(x)} - x = \tfrac{1}{x+}\tfrac{2}{x+}\tfrac{3}{x+}\cdots, \qquad
    E[t^2] = 1 - x\,\delta = \delta\rho, \qquad \rho(x) = \tfrac{2}{x+}\tfrac{3}{x+}\cdots

The subtractions lose all digits for large x, the fractions none.

References:
    Laplace's continued fraction: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.2.14.
    Gautschi, Efficient Computation of the Complex Error Function (1970).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "TruncatedMoments",
    "locate_peak",
    "log_mass_between",
    "log_mills",
    "log_peak_mass",
    "mills_moments",
    "standard_quantile",
    "truncated_moments",
]

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_SQRT2 = math.sqrt(2.0)
_LOG_HALF_ROOT_TAU = math.log(0.5 * math.sqrt(2.0 * math.pi))
# Beyond 1e18 standard deviations a bound is infinite for every purpose, and its square still fits into float32.
_FAR = 1e18
# The fraction of 60 terms is exact to 1e-15 from here on; the direct form loses at most 5^2 units in the last place.
_FRACTION_FROM = 5.0
_FRACTION_DEPTH = 60
# Below this width (times the slope) the midpoint series is exact to 1e-15, the difference of two Mills ratios is not.
_NARROW = 0.03


def locate_peak(loc: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Point of [low, high] nearest to ``loc``, and ``loc`` less that point; a location on an end counts as inside.

    Gradients follow the same branch in both, which the two halves of a clamp would not where ``loc`` equals an end.
    """
    peak = torch.where(loc > high, high, torch.where(loc < low, low, loc))
    return peak, loc - peak


class TruncatedMoments(NamedTuple):
    """A standard normal truncated to an interval, all measured from the peak (see the module's docstring).

    Attributes:
        log_peak: ln J.
        offset: E[z] - peak, in standard deviations.
        variance: Var[z], in variances.
        energy: E[z^2 - peak^2] / 2, nats.
    """

    log_peak: Tensor
    offset: Tensor
    variance: Tensor
    energy: Tensor


class _LogMills(torch.autograd.Function):
    """ln M(x), x >= 0, whose derivative -delta(x) is taken from the continued fraction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.log(torch.special.erfcx(x / _SQRT2) * math.sqrt(math.pi / 2.0))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -grad_outputs[0] * mills_moments(x)[0]


def log_mills(x: Tensor) -> Tensor:
    """Log of Mills' ratio (1 - Phi(x)) / phi(x) for x >= 0, elementwise, with an accurate gradient at any x."""
    return _LogMills.apply(x)  # type: ignore[no-any-return]


def mills_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moment of p(t) ~ exp(-x t - t^2/2), t >= 0, for x >= 0, elementwise."""
    is_far = x > _FRACTION_FROM
    near = torch.where(is_far, torch.ones_like(x), x)
    near_mean = torch.reciprocal(torch.special.erfcx(near / _SQRT2) * math.sqrt(math.pi / 2.0)) - near
    near_square = 1.0 - near * near_mean
    if not bool(is_far.any()):
        return near_mean, near_square
    far = torch.where(is_far, x, torch.full_like(x, 2.0 * _FRACTION_FROM))
    tail = far
    for k in range(_FRACTION_DEPTH, 2, -1):
        tail = far + k / tail
    rho = 2.0 / tail
    far_mean = 1.0 / (far + rho)
    return torch.where(is_far, far_mean, near_mean), torch.where(is_far, far_mean * rho, near_square)


def log_peak_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """Peak mass ln J of [lower, upper], elementwise: the log mass without its factor exp(-xi^2/2)/sqrt(2 pi)."""
    lower, upper = torch.broadcast_tensors(lower.clamp(-_FAR, _FAR), upper.clamp(-_FAR, _FAR))
    is_outside = (lower > 0) | (upper < 0)
    inner = _log_inner(lower, upper, is_outside)
    if not bool(is_outside.any()):
        return inner
    xi, width = _outer_geometry(lower, upper, is_outside)
    return inner.masked_scatter(is_outside, _log_outer(xi, width))


def _outer_geometry(lower: Tensor, upper: Tensor, is_outside: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from zero and width of the intervals that leave zero out, as a list of those alone."""
    low, high = lower[is_outside], upper[is_outside]
    return torch.maximum(low, -high), high - low


def _log_inner(lower: Tensor, upper: Tensor, unused: Tensor) -> Tensor:
    """Peak mass ln J for lower <= 0 <= upper; unused entries get a harmless interval, so that gradients stay finite."""
    lower = torch.where(unused, -torch.ones_like(lower), lower)
    upper = torch.where(unused, torch.ones_like(upper), upper)
    return torch.log(torch.erf(upper / _SQRT2) - torch.erf(lower / _SQRT2)) + _LOG_HALF_ROOT_TAU


def _log_outer(xi: Tensor, width: Tensor) -> Tensor:
    """Log of int_0^w exp(-xi t - t^2/2) dt, xi >= 0."""
    is_narrow = width * xi.clamp(min=1.0) < _NARROW
    safe_width = torch.where(is_narrow, 1.0, width)
    gap = xi * safe_width + 0.5 * safe_width.square()
    first = log_mills(xi)
    wide = first + torch.log(-torch.expm1(log_mills(xi + safe_width) - first - gap))
    if not bool(is_narrow.any()):
        return wide
    return wide.masked_scatter(is_narrow, _log_narrow(xi[is_narrow], width[is_narrow]))


def _log_narrow(xi: Tensor, width: Tensor) -> Tensor:
    """The same by expansion about the middle m, where the even derivatives of exp(-z^2/2) are Hermite polynomials."""
    square = (xi + 0.5 * width).square()
    step = width.square()
    curve = step * (square - 1.0) / 24.0 + step.square() * (square.square() - 6.0 * square + 3.0) / 1920.0
    return torch.log(width) - 0.5 * width * (xi + 0.25 * width) + torch.log1p(curve)


def log_mass_between(lower: Tensor, upper: Tensor) -> Tensor:
    """ln[Phi(upper) - Phi(lower)] in nats, elementwise; infinite bounds allowed; -inf for an empty interval."""
    xi = torch.maximum(torch.maximum(lower, -upper), torch.zeros_like(lower))
    return log_peak_mass(lower, upper) - 0.5 * xi.square() - HALF_LOG_2PI


def truncated_moments(lower: Tensor, upper: Tensor) -> TruncatedMoments:
    """Peak mass, mean, variance and energy of a standard normal truncated to [lower, upper], seen from the peak."""
    lower, upper = torch.broadcast_tensors(lower.clamp(-_FAR, _FAR), upper.clamp(-_FAR, _FAR))
    is_outside = (lower > 0) | (upper < 0)
    log_peak = log_peak_mass(lower, upper)
    inner = _inner_moments(lower, upper, is_outside)
    if not bool(is_outside.any()):
        return TruncatedMoments(log_peak, *inner)
    xi, width = _outer_geometry(lower, upper, is_outside)
    outer = _outer_moments(xi, width, lower[is_outside] > 0)
    merged = (i.masked_scatter(is_outside, o) for i, o in zip(inner, outer, strict=True))
    return TruncatedMoments(log_peak, *merged)


def _inner_moments(lower: Tensor, upper: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lower = torch.where(unused, -torch.ones_like(lower), lower)
    upper = torch.where(unused, torch.ones_like(upper), upper)
    log_peak = _log_inner(lower, upper, unused)
    low_density = torch.exp(-0.5 * lower.square() - log_peak)
    high_density = torch.exp(-0.5 * upper.square() - log_peak)
    offset = low_density - high_density
    square = 1.0 + lower * low_density - upper * high_density
    return offset, square - offset.square(), 0.5 * square


def _outer_moments(xi: Tensor, width: Tensor, is_low_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the distance from the near end: of the half-line, less those of the half-line beyond the far end."""
    first = log_mills(xi)
    # share = mass of the half-line that lies beyond the far end
    share = torch.exp(log_mills(xi + width) - first - xi * width - 0.5 * width.square())
    # Past 1e3 standard deviations the share is exactly zero; the cut keeps 0 * width^2 and its gradient small.
    far = width.clamp(max=1e3)
    near_mean, near_square = mills_moments(xi)
    far_mean, far_square = mills_moments(xi + far)
    kept = -torch.expm1(torch.log(share.clamp(min=torch.finfo(share.dtype).tiny)))
    mean = (near_mean - share * (far_mean + far)) / kept
    square = (near_square - share * (far_square + 2.0 * far * far_mean + far.square())) / kept
    return torch.where(is_low_end, mean, -mean), square - mean.square(), 0.5 * square + xi * mean


def standard_quantile(prob: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    r"""Quantile of a truncated standard normal, from its peak, elementwise and differentiable once.

    Inside (:math:`l \le 0 \le u`) the smaller of :math:`\Phi(l) + pZ` and :math:`\Phi(-u) + (1-p)Z`, both sums of
    positive terms, is inverted.  Outside, the distance t from the near end solves

    .. math::
        f(t) = \xi t + t^2/2 - \ln M(\xi + t) + \ln M(\xi) - E = 0, \qquad
        E = -\ln\!\left[v + (1 - v)\,e^{-\xi w - w^2/2} M(\xi + w)/M(\xi)\right]

    with v the mass beyond t.  f is convex with slope 1/M, and :math:`\min(E\,M(\xi), 2E/(\xi+\sqrt{\xi^2+2E}))` is
    above the root, so Newton's method descends to it; its last step carries the gradient (implicit differentiation).
    """
    prob, lower, upper = torch.broadcast_tensors(prob, lower.clamp(-_FAR, _FAR), upper.clamp(-_FAR, _FAR))
    is_outside = (lower > 0) | (upper < 0)
    inner = _inner_quantile(prob, lower, upper, is_outside)
    if not bool(is_outside.any()):
        return inner
    xi, width = _outer_geometry(lower, upper, is_outside)
    outer = _outer_quantile(prob[is_outside], xi, width, lower[is_outside] > 0)
    return inner.masked_scatter(is_outside, outer)


def _inner_quantile(prob: Tensor, lower: Tensor, upper: Tensor, unused: Tensor) -> Tensor:
    lower = torch.where(unused, -torch.ones_like(lower), lower)
    upper = torch.where(unused, torch.ones_like(upper), upper)
    below, above = 0.5 * torch.special.erfc(-lower / _SQRT2), 0.5 * torch.special.erfc(upper / _SQRT2)
    mass = 0.5 * (torch.erf(upper / _SQRT2) - torch.erf(lower / _SQRT2))
    left, right = below + prob * mass, above + (1.0 - prob) * mass
    is_left = left < right
    z = torch.special.ndtri(torch.where(is_left, left, right).clamp(min=torch.finfo(left.dtype).tiny))
    return torch.maximum(torch.minimum(torch.where(is_left, z, -z), upper), lower)


def _outer_quantile(prob: Tensor, xi: Tensor, width: Tensor, is_low_end: Tensor) -> Tensor:
    beyond = torch.where(is_low_end, 1.0 - prob, prob)
    first = log_mills(xi)
    share = torch.exp(log_mills(xi + width) - first - xi * width - 0.5 * width.square())
    energy = -torch.log(beyond + (1.0 - beyond) * share)

    def miss(t: Tensor) -> Tensor:
        return xi * t + 0.5 * t.square() - log_mills(xi + t) + first - energy

    with torch.no_grad():
        t = torch.minimum(energy * first.exp(), 2.0 * energy / (xi + torch.sqrt(xi.square() + 2.0 * energy)))
        for _ in range(6):
            t = (t - miss(t) * log_mills(xi + t).exp()).clamp(min=0.0)
        slope = log_mills(xi + t).exp()
    t = torch.minimum((t - miss(t) * slope).clamp(min=0.0), width)
    return torch.where(is_low_end, t, -t)
