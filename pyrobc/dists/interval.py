r"""Log mass of an interval under any distribution with a distribution function.

``interval_log_mass(d, lower, upper)`` is :math:`\ln D(\text{lower} \le \theta \le \text{upper})`, in the units of the
distribution's *value*, in float64 and in log space where the distribution allows it: the tail masses of a normal at 1e4
standard deviations come out as numbers, not as -inf.  Another distribution joins by
``@interval_log_mass.register(ItsType)``.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Cauchy,
    Distribution,
    Exponential,
    Gamma,
    HalfCauchy,
    HalfNormal,
    Independent,
    InverseGamma,
    Laplace,
    LogNormal,
    Normal,
    Uniform,
)
from torch.nn.functional import logsigmoid

from pyrobc.dists.half_cauchy_product import HalfCauchyProduct
from pyrobc.dists.truncated_log_normal import TruncatedLogNormal
from pyrobc.dists.truncated_log_uniform import TruncatedLogUniform
from pyrobc.dists.truncation import log_mass_between
from pyrobc.errors import ReductionError

__all__ = ["interval_log_mass"]


@singledispatch
def interval_log_mass(dist: Distribution, lower: Tensor, upper: Tensor) -> Tensor:
    """Log mass ln D(lower <= theta <= upper), nats, float64, batch shape; refused without a distribution function."""
    try:
        return torch.log((dist.cdf(upper) - dist.cdf(lower)).double().clamp(min=0.0))
    except NotImplementedError as error:
        raise ReductionError(
            f"mass of an interval under {type(dist).__name__}",
            got="a distribution without cdf",
            allowed="a distribution with cdf, or a rule registered with interval_log_mass.register",
            fix=f"register one: @interval_log_mass.register({type(dist).__name__})",
        ) from error


def _log(bound: Tensor) -> Tensor:
    """Log of a bound, -inf at and below zero."""
    return torch.where(bound > 0, torch.log(torch.where(bound > 0, bound, torch.ones_like(bound))), -math.inf)


def _double(*values: Any) -> list[Tensor]:
    return [torch.as_tensor(v).double() for v in values]


@interval_log_mass.register
def _(dist: Normal, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, loc, scale = _double(lower, upper, dist.loc, dist.scale)
    return log_mass_between((low - loc) / scale, (up - loc) / scale)


@interval_log_mass.register
def _(dist: LogNormal, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, loc, scale = _double(lower, upper, dist.loc, dist.scale)
    return log_mass_between((_log(low) - loc) / scale, (_log(up) - loc) / scale)


@interval_log_mass.register
def _(dist: HalfNormal, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, scale = _double(lower, upper, dist.scale)
    return log_mass_between(low.clamp(min=0.0) / scale, up.clamp(min=0.0) / scale) + math.log(2.0)


@interval_log_mass.register
def _(dist: Bernoulli, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, logits = _double(lower, upper, dist.logits)
    none = logits.new_full((), -math.inf)
    zero = torch.where((low <= 0) & (up >= 0), logsigmoid(-logits), none)
    return torch.logaddexp(zero, torch.where((low <= 1) & (up >= 1), logsigmoid(logits), none))


@interval_log_mass.register(TruncatedLogNormal)
@interval_log_mass.register(TruncatedLogUniform)
def _(dist: TruncatedLogNormal | TruncatedLogUniform, lower: Tensor, upper: Tensor) -> Tensor:
    low, up = _double(lower, upper)
    return dist.log_mass(_log(low), _log(up))


@interval_log_mass.register
def _(dist: HalfCauchyProduct, lower: Tensor, upper: Tensor) -> Tensor:
    return dist.log_mass(lower, upper)


@interval_log_mass.register
def _(dist: Cauchy, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, loc, scale = _double(lower, upper, dist.loc, dist.scale)
    return torch.log(_arc((low - loc) / scale, (up - loc) / scale)) - math.log(math.pi)


@interval_log_mass.register
def _(dist: HalfCauchy, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, scale = _double(lower, upper, dist.scale)
    return torch.log(_arc(low.clamp(min=0.0) / scale, up.clamp(min=0.0) / scale)) - math.log(math.pi / 2.0)


def _arc(low: Tensor, up: Tensor) -> Tensor:
    """atan(up) - atan(low), low <= up, without the cancellation of two angles near each other or near pi/2."""
    is_bounded = torch.isfinite(low) & torch.isfinite(up)
    a, b = torch.where(is_bounded, low, torch.zeros_like(low)), torch.where(is_bounded, up, torch.zeros_like(up))
    # Scaled by 1/max(1, |a|, |b|) so that the product a b cannot overflow.
    size = torch.maximum(a.abs(), b.abs()).clamp(min=1.0)
    return torch.where(
        is_bounded, torch.atan2((b - a) / size, 1.0 / size + (a / size) * b), torch.atan(up) - torch.atan(low)
    )


@interval_log_mass.register
def _(dist: Laplace, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, loc, scale = _double(lower, upper, dist.loc, dist.scale)
    low, up = torch.broadcast_tensors((low - loc) / scale, (up - loc) / scale)
    # Mirror so that the interval lies on, or reaches further to, the right.
    low, up = torch.where(low + up < 0, -up, low), torch.where(low + up < 0, -low, up)
    is_apart = low > 0
    near = torch.where(is_apart, low, torch.zeros_like(low))
    apart = -near - math.log(2.0) + torch.log(-torch.expm1(near - up))
    span = torch.where(is_apart, torch.zeros_like(low), low)
    across = torch.log(-0.5 * (torch.expm1(span) + torch.expm1(-up)))
    return torch.where(is_apart, apart, across)


@interval_log_mass.register
def _(dist: Exponential, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, rate = _double(lower, upper, dist.rate)
    low, up = low.clamp(min=0.0), up.clamp(min=0.0)
    return -rate * low + torch.log(-torch.expm1(-rate * (up - low)))


@interval_log_mass.register
def _(dist: Uniform, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, start, end = _double(lower, upper, dist.low, dist.high)
    width = torch.minimum(up, end) - torch.maximum(low, start)
    return torch.log(width.clamp(min=0.0)) - torch.log(end - start)


def _gamma_log_mass(concentration: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """Log mass ln P(low <= g <= up), g ~ Gamma(concentration, 1): by the smaller of the two tails."""
    low, up = low.clamp(min=0.0), up.clamp(min=0.0)
    concentration, low, up = torch.broadcast_tensors(concentration, low, up)
    below = torch.special.gammainc(concentration, up) - torch.special.gammainc(concentration, low)
    above = torch.special.gammaincc(concentration, low) - torch.special.gammaincc(concentration, up)
    return torch.log(torch.where(low > concentration, above, below).clamp(min=0.0))


@interval_log_mass.register
def _(dist: Gamma, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, concentration, rate = _double(lower, upper, dist.concentration, dist.rate)
    return _gamma_log_mass(concentration, low * rate, up * rate)


@interval_log_mass.register
def _(dist: InverseGamma, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, concentration, rate = _double(lower, upper, dist.concentration, dist.rate)
    return _gamma_log_mass(concentration, rate / up.clamp(min=0.0), rate / low.clamp(min=0.0))


@interval_log_mass.register
def _(
    dist: Independent,  # type: ignore[type-arg]
    lower: Tensor,
    upper: Tensor,
) -> Tensor:
    mass = interval_log_mass(dist.base_dist, lower, upper)
    return mass.sum(tuple(range(-dist.reinterpreted_batch_ndims, 0)))
