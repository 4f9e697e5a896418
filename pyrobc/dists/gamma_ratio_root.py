r"""The square root of a ratio of two Gammas: a group-lasso scale whose penalty has a Gamma hyperprior.

.. math::
    \tau = \sqrt{\kappa/\varsigma^2}, \quad \kappa \sim G(A, \text{rate } \tfrac12),\;
    \varsigma^2 \sim G(c, \text{rate } d), \qquad y = \frac{\tau^2}{\tau^2 + 2d} \sim \text{Beta}(A, c),

and for a whole number c the distribution function is a short sum, exact in its lower tail in log space:

.. math:: P(\tau \le t) = y^A \sum_{k<c} \binom{A + k - 1}{k} (1 - y)^k, \qquad
    p(\tau) = \frac{2\,y^A (1-y)^c}{\tau\,B(A, c)}.

References:
    NIST Digital Library of Mathematical Functions (2010), section 8.17: incomplete beta functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Gamma

from pyrobc.dists.interval import interval_log_mass

__all__ = ["GammaRatioRoot"]


class GammaRatioRoot(TorchDistribution):
    """Law of ``sqrt(kappa / rate)``: kappa ~ Gamma(concentration, 1/2), rate ~ Gamma(rate_shape, rate_rate).

    Args:
        concentration: A, positive.
        rate_shape: c, a whole number.
        rate_rate: d, positive.
    """

    arg_constraints = {"concentration": constraints.positive}
    support = constraints.nonnegative

    def __init__(
        self, concentration: Tensor, rate_shape: int, rate_rate: float, validate_args: bool | None = None
    ) -> None:
        self.concentration, self.rate_shape, self.rate_rate = concentration, rate_shape, rate_rate
        super().__init__(concentration.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GammaRatioRoot:
        """The same law with a larger batch shape."""
        concentration = self.concentration.expand(torch.Size(batch_shape))
        return GammaRatioRoot(concentration, self.rate_shape, self.rate_rate, validate_args=self._validate_args)

    def _log_shares(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Logs of y and of 1 - y."""
        size = 2.0 * value.log() - math.log(2.0 * self.rate_rate)
        return torch.nn.functional.logsigmoid(size), torch.nn.functional.logsigmoid(-size)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``value``, nats."""
        a, c = self.concentration, float(self.rate_shape)
        log_beta = torch.lgamma(a) + math.lgamma(c) - torch.lgamma(a + c)
        log_y, log_rest = self._log_shares(value)
        return math.log(2.0) + a * log_y + c * log_rest - value.log() - log_beta

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the root."""
        shape, a = torch.Size(sample_shape), self.concentration
        rate = Gamma(torch.full_like(a, float(self.rate_shape)), torch.full_like(a, self.rate_rate))
        ratio: Tensor = Gamma(a, torch.full_like(a, 0.5)).sample(shape) / rate.sample(shape)
        return ratio.sqrt()

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log of P(tau <= value), nats, float64; -inf at and below zero."""
        a = self.concentration.double()
        log_y, log_rest = self._log_shares(value.double().clamp(min=0.0))
        terms = [
            torch.lgamma(a + k) - torch.lgamma(a) - math.lgamma(k + 1) + (k * log_rest if k else 0.0)
            for k in range(self.rate_shape)
        ]
        return (a * log_y + torch.logsumexp(torch.stack(torch.broadcast_tensors(*terms, log_y)[:-1]), 0)).clamp(max=0.0)

    def cdf(self, value: Tensor) -> Tensor:
        """P(tau <= value)."""
        return self.log_cdf(value).exp().to(value.dtype)


@interval_log_mass.register
def _(dist: GammaRatioRoot, lower: Tensor, upper: Tensor) -> Tensor:
    low, up = dist.log_cdf(lower), dist.log_cdf(upper)
    share = torch.where(torch.isneginf(low), -math.inf, (low - up).clamp(max=0.0))
    return up + torch.log1p(-share.exp())
