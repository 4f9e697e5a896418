r"""A Normal whose standard deviation is uniform: what a free scale with a flat, proper prior leaves of a Normal.

.. math::
    \theta = t\,\varepsilon, \quad t \sim U(0, T), \quad \varepsilon \sim N(0, 1), \qquad
    p(\theta) = \frac{E_1(\theta^2/2T^2)}{2T\sqrt{2\pi}}, \qquad
    P(|\theta| \le x) = \text{erf}\frac{x}{T\sqrt2} + \frac{x}{T\sqrt{2\pi}}\,E_1\Big(\frac{x^2}{2T^2}\Big),

with the exponential integral :math:`E_1`; the density is infinite at zero, as the logarithm is.

References:
    NIST Digital Library of Mathematical Functions (2010), chapter 6: exponential integrals.
"""

from __future__ import annotations

import math
from typing import Any

import scipy.special
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyrobc.dists.interval import interval_log_mass

__all__ = ["UniformScaleNormal"]


class UniformScaleNormal(TorchDistribution):
    """Law of ``t * e`` with t ~ Uniform(0, largest) and e ~ Normal(0, 1); no gradients.

    Args:
        largest: T, positive; any shape.
    """

    arg_constraints = {"largest": constraints.positive}
    support = constraints.real

    def __init__(self, largest: Tensor, validate_args: bool | None = None) -> None:
        self.largest = largest
        super().__init__(largest.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformScaleNormal:
        """The same law with a larger batch shape."""
        return UniformScaleNormal(self.largest.expand(torch.Size(batch_shape)), validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``value``, nats; +inf at zero."""
        log_integral = _integral(value / self.largest).log()
        return log_integral.to(value.dtype) - torch.log(2.0 * math.sqrt(2.0 * math.pi) * self.largest)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        like = self.largest.expand(self._extended_shape(torch.Size(sample_shape)))
        return like * torch.rand_like(like) * torch.randn_like(like)

    def cdf(self, value: Tensor) -> Tensor:
        """P(theta <= value)."""
        return (0.5 + 0.5 * value.sign() * self.mass_within(value.abs())).to(value.dtype)

    def mass_within(self, size: Tensor) -> Tensor:
        """P(|theta| <= size), float64."""
        ratio = size.double() / self.largest.double()
        inner = torch.where(ratio > 0, ratio, torch.ones_like(ratio)).clamp(max=40.0)  # E1 is zero long before
        near = inner * _integral(inner) / math.sqrt(2.0 * math.pi)
        return torch.erf(ratio * math.sqrt(0.5)) + torch.where(ratio > 0, near, torch.zeros_like(near))


def _integral(ratio: Tensor) -> Tensor:
    """E1(ratio^2 / 2), float64."""
    argument = 0.5 * ratio.detach().double().square()
    return torch.as_tensor(scipy.special.exp1(argument.cpu().numpy()), device=ratio.device)


@interval_log_mass.register
def _(dist: UniformScaleNormal, lower: Tensor, upper: Tensor) -> Tensor:
    low, up = torch.broadcast_tensors(lower.double(), upper.double())
    return torch.log(0.5 * (up.sign() * dist.mass_within(up.abs()) - low.sign() * dist.mass_within(low.abs())))
