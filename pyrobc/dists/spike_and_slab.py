r"""A multiplier that is exactly zero with some probability, and otherwise follows a positive law (the slab).

.. math:: t = z\,\tau, \quad z \sim \text{Bernoulli}(\gamma), \quad \tau \sim \text{slab}, \qquad
    P(t \le x) = (1-\gamma) + \gamma\,F_\tau(x) \ (x \ge 0).

Densities are with respect to Lebesgue measure plus a unit mass at zero, so that a ratio of densities at zero is the
ratio of the two probabilities of a closed gate.  An interval's mass is :math:`F(u) - F(l)`: its upper end belongs to
it, its lower end does not, and :math:`(-1, 0]` is the event that the gate is closed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

from pyrobc.dists.interval import interval_log_mass

__all__ = ["SpikeAndSlab"]


class SpikeAndSlab(TorchDistribution):
    """Zero unless the gate is open.

    Args:
        log_odds: log odds of an open gate.
        slab: continuous law on the positive numbers, of the same batch shape.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.nonnegative

    def __init__(self, log_odds: Tensor, slab: Distribution, validate_args: bool | None = None) -> None:
        self.log_odds, self.slab = log_odds, slab
        super().__init__(slab.batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpikeAndSlab:
        """The same law with a larger batch shape."""
        shape = torch.Size(batch_shape)
        return SpikeAndSlab(self.log_odds.expand(shape), self.slab.expand(shape), validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        """Probability of an open gate times the slab's mean."""
        return torch.sigmoid(self.log_odds) * self.slab.mean

    @property
    def variance(self) -> Tensor:
        """Slab's second moment times that probability, less the squared mean."""
        second = self.slab.variance + self.slab.mean.square()
        return torch.sigmoid(self.log_odds) * second - self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability at zero, log density elsewhere, nats."""
        is_zero = value == 0
        inside = self.slab.log_prob(torch.where(is_zero, torch.ones_like(value), value))
        return torch.where(is_zero, logsigmoid(-self.log_odds), logsigmoid(self.log_odds) + inside)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, zeros among them."""
        with torch.no_grad():
            value = self.slab.sample(torch.Size(sample_shape))
            return value * torch.bernoulli(torch.sigmoid(self.log_odds).expand(value.shape))

    def cdf(self, value: Tensor) -> Tensor:
        """P(t <= value)."""
        return torch.exp(interval_log_mass(self, torch.full_like(value, -math.inf), value)).to(value.dtype)


@interval_log_mass.register
def _(dist: SpikeAndSlab, lower: Tensor, upper: Tensor) -> Tensor:
    low, up, log_odds = torch.broadcast_tensors(lower.double(), upper.double(), dist.log_odds.double())
    is_inside = (low < 0) & (up >= 0)
    closed = torch.where(is_inside, logsigmoid(-log_odds), -math.inf)
    low, is_empty = low.clamp(min=0.0), up <= low.clamp(min=0.0)
    mass = interval_log_mass(dist.slab, low, torch.where(is_empty, low + 1.0, up))
    return torch.logaddexp(closed, torch.where(is_empty, -math.inf, logsigmoid(log_odds) + mass))
