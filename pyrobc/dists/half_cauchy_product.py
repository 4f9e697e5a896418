r"""The product of two half-Cauchy scales: what a local times a global horseshoe scale does to a group.

.. math::
    w = s z, \quad s \sim C^+(k),\; z \sim C^+(1), \qquad
    p(w) = \frac{4}{\pi^2 k}\,\frac{\ln y}{y^2 - 1} = \frac{2}{\pi^2 w}\,\frac{v}{\sinh v},
    \qquad y = w/k,\; v = \ln y

ln w is symmetric about ln k, and the density is infinite at zero.  The distribution function is a dilogarithm.  With
Legendre's chi function :math:`\chi_2(r) = \sum_{j\ge0} r^{2j+1}/(2j+1)^2`,

.. math::
    P(w \le k y) = \frac{4}{\pi^2}\left[\chi_2(y) - \ln y \operatorname{artanh} y\right] \;(y < 1)
        = \frac12 + \frac{4}{\pi^2}\chi_2\!\left(\frac{y-1}{y+1}\right)

by :math:`\chi_2(\frac{1-y}{1+y}) + \chi_2(y) = \pi^2/8 + \ln y \operatorname{artanh} y`; whichever argument is below
:math:`\sqrt2 - 1` is used, so 24 terms of the series are exact, and tails keep their relative precision.

References:
    Carvalho, Polson, Scott, The horseshoe estimator for sparse signals (2010).
    Lewin, Polylogarithms and Associated Functions (1981), sections 1.8 and 1.11.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

__all__ = ["HalfCauchyProduct"]

_TERMS = 24
_SPLIT = math.sqrt(2.0) - 1.0
_UNIT = 4.0 / math.pi**2


def _legendre_chi(r: Tensor) -> Tensor:
    """chi_2(r) for |r| <= sqrt(2) - 1, by Horner's scheme."""
    square = r.square()
    total = torch.full_like(r, 1.0 / (2 * _TERMS + 1) ** 2)
    for j in range(_TERMS - 1, -1, -1):
        total = total * square + 1.0 / (2 * j + 1) ** 2
    return r * total


def _lower_tail(y: Tensor) -> Tensor:
    """P(w <= k y) for 0 <= y <= sqrt(2) - 1."""
    log_y = torch.log(y.clamp(min=torch.finfo(y.dtype).tiny))
    return _UNIT * (_legendre_chi(y) - log_y * torch.atanh(y))


class HalfCauchyProduct(TorchDistribution):
    """Law of s * z with s ~ HalfCauchy(scale) and z ~ HalfCauchy(1).

    Args:
        scale: median of the product, positive; any shape.

    Example:
        >>> import torch
        >>> float(HalfCauchyProduct(torch.tensor(2.0)).cdf(torch.tensor(2.0)))
        0.5
    """

    arg_constraints = {"scale": constraints.positive}
    support = constraints.nonnegative
    has_rsample = True

    def __init__(self, scale: Tensor | float, validate_args: bool | None = None) -> None:
        self.scale = torch.as_tensor(scale)
        super().__init__(self.scale.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HalfCauchyProduct:
        """The same law with a larger batch shape."""
        new: HalfCauchyProduct = self._get_checked_instance(HalfCauchyProduct, _instance)
        shape = torch.Size(batch_shape)
        new.scale = self.scale.expand(shape)
        super(HalfCauchyProduct, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``value``, nats; +inf at zero."""
        if self._validate_args:
            self._validate_sample(value)
        v = torch.log(value.double()) - torch.log(self.scale.double())
        is_small = v.abs() < 0.02
        near = torch.where(is_small, v, torch.zeros_like(v)).square()
        far = torch.where(is_small, torch.ones_like(v), v).abs().clamp(max=1e4)
        log_ratio = torch.where(
            is_small,
            near * (-1.0 / 6.0 + near * (1.0 / 180.0 - near / 2835.0)),
            torch.log(2.0 * far) - far - torch.log(-torch.expm1(-2.0 * far)),
        )
        log_prob = math.log(2.0 / math.pi**2) - torch.log(value.double()) + log_ratio
        return torch.where(value == 0, math.inf, log_prob).to(self.scale.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of s * z."""
        shape = self._extended_shape(torch.Size(sample_shape))
        quarter = torch.rand((2, *shape), dtype=self.scale.dtype, device=self.scale.device) * (0.5 * math.pi)
        return self.scale * torch.tan(quarter).abs().prod(0)

    def cdf(self, value: Tensor) -> Tensor:
        """P(w <= value)."""
        return torch.exp(self.log_mass(0.0, value)).to(self.scale.dtype)

    def log_mass(self, lower: Tensor | float, upper: Tensor | float) -> Tensor:
        """Log mass ln P(lower <= w <= upper), nats, float64; -inf for an empty interval."""
        low, up = (torch.as_tensor(b).to(self.scale.device, torch.float64) for b in (lower, upper))
        scale = self.scale.double()
        low, up = torch.broadcast_tensors((low / scale).clamp(min=0.0), (up / scale).clamp(min=0.0))
        # An interval above the median is mirrored below it (ln w is symmetric), where small masses keep their digits.
        is_high = low > 1.0
        first = torch.where(is_high, 1.0 / up.clamp(min=torch.finfo(up.dtype).tiny), low)
        second = torch.where(is_high, 1.0 / torch.where(is_high, low, torch.ones_like(low)), up)
        return torch.log((_cdf(second) - _cdf(first)).clamp(min=0.0))


def _cdf(y: Tensor) -> Tensor:
    is_low, is_high = y < _SPLIT, y > 1.0 / _SPLIT
    is_middle = ~(is_low | is_high)
    half = torch.full_like(y, 0.25)
    middle = torch.where(is_middle, y, torch.ones_like(y))
    centre = 0.5 + _UNIT * _legendre_chi((middle - 1.0) / (middle + 1.0))
    lower = _lower_tail(torch.where(is_low, y, half))
    upper = 1.0 - _lower_tail(1.0 / torch.where(is_high, y, 1.0 / half))
    return torch.where(is_low, lower, torch.where(is_high, upper, centre))
