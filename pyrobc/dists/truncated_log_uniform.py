r"""The truncated log-uniform: the proper version of the scale-free prior :math:`p(\theta) \propto 1/\theta`.

.. math:: x = \ln\theta \sim U[\text{low}, \text{high}], \qquad p(\theta) = \frac{1}{\theta\,(\text{high} - \text{low})}

References:
    Neklyudov, Molchanov, Ashukha, Vetrov, Structured Bayesian Pruning via Log-Normal Multiplicative Noise (2017).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["TruncatedLogUniform"]


class TruncatedLogUniform(TorchDistribution):
    """exp of a uniform on ``[low, high]``.

    Args:
        low: lower end of ln theta, finite.
        high: upper end of ln theta, finite, above ``low``.

    Example:
        >>> import torch
        >>> round(float(TruncatedLogUniform().log_prob(torch.tensor(1.0))), 5)
        -2.99573
    """

    arg_constraints = {
        "low": constraints.dependent(is_discrete=False, event_dim=0),
        "high": constraints.dependent(is_discrete=False, event_dim=0),
    }
    has_rsample = True

    def __init__(
        self, low: Tensor | float = -20.0, high: Tensor | float = 0.0, validate_args: bool | None = None
    ) -> None:
        self.low, self.high = broadcast_all(low, high)
        super().__init__(self.low.shape, validate_args=validate_args)
        if self._validate_args and not bool((self.low < self.high).all()):
            raise ValueError("TruncatedLogUniform: got low >= high; allowed: low < high; fix: swap the two")

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedLogUniform:
        """The same law with a larger batch shape."""
        new: TruncatedLogUniform = self._get_checked_instance(TruncatedLogUniform, _instance)
        shape = torch.Size(batch_shape)
        new.low, new.high = self.low.expand(shape), self.high.expand(shape)
        super(TruncatedLogUniform, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """Theta between exp(low) and exp(high)."""
        return constraints.interval(self.low.exp(), self.high.exp())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of theta at ``value``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        x = torch.log(value.double())
        low, high = self.low.double(), self.high.double()
        slack = 4.0 * torch.finfo(value.dtype).eps * (1.0 + x.detach().abs().clamp(max=1e3))
        is_inside = (x >= low - slack) & (x <= high + slack)
        return torch.where(is_inside, -x - torch.log(high - low), -math.inf).to(self.low.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of theta."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.icdf(torch.rand(shape, dtype=self.low.dtype, device=self.low.device))

    def icdf(self, prob: Tensor) -> Tensor:
        """Quantile of theta."""
        value = torch.exp(self.low + prob * (self.high - self.low))
        return torch.maximum(torch.minimum(value, self.high.exp()), self.low.exp())

    def cdf(self, value: Tensor) -> Tensor:
        """P(theta <= value)."""
        return ((torch.log(value) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)

    def log_mass(self, lower: Tensor | float, upper: Tensor | float) -> Tensor:
        """Log mass ln P(lower <= ln theta <= upper), nats, float64; -inf for an empty interval."""
        low, high = self.low.double(), self.high.double()
        lo = torch.as_tensor(lower, dtype=torch.float64, device=low.device)
        up = torch.as_tensor(upper, dtype=torch.float64, device=low.device)
        width = torch.minimum(up, high) - torch.maximum(lo, low)
        return torch.log(width.clamp(min=0.0)) - torch.log(high - low)

    def log_moment(self, k: float) -> Tensor:
        """Log moment ln E[theta^k] = ln[(e^(k high) - e^(k low)) / (k (high - low))], k != 0, float64, batch shape."""
        low, high = self.low.double(), self.high.double()
        top = torch.maximum(k * low, k * high)
        width = abs(k) * (high - low)
        return top + torch.log(-torch.expm1(-width)) - torch.log(width)

    @property
    def mean(self) -> Tensor:
        """E[theta]."""
        return torch.exp(self.log_moment(1)).to(self.low.dtype)

    @property
    def variance(self) -> Tensor:
        """Var[theta]."""
        first = self.log_moment(1)
        return (torch.exp(2.0 * first) * torch.expm1(self.log_moment(2) - 2.0 * first)).to(self.low.dtype)

    def entropy(self) -> Tensor:
        """Differential entropy of theta, nats."""
        return torch.log(self.high - self.low) + 0.5 * (self.low + self.high)
