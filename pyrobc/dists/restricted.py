r"""A distribution restricted to an interval: the reduced prior of a region of practical equivalence (ROPE).

.. math:: \tilde p(\theta) = p(\theta)\,\mathbf 1[l \le \theta \le u] \,/\, P(l \le \theta \le u)

References:
    Kruschke, Bayesian Estimation Supersedes the t Test (2013).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.dists.interval import interval_log_mass

__all__ = ["Restricted"]


class Restricted(TorchDistribution):
    """``base`` given that its value lies in ``[lower, upper]`` (every element of an event does).

    Args:
        base: any distribution whose interval masses are known (see ``interval_log_mass``).
        lower: lower end, in units of the value; may be -inf.
        upper: upper end, above ``lower``; may be inf.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> rope = Restricted(dist.Normal(0.0, 1.0), -0.1, 0.1)
        >>> round(float(rope.log_prob(torch.tensor(0.0))), 4)
        1.6111
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        base: Distribution,
        lower: Tensor | float,
        upper: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self.base = base
        self.lower, self.upper = _as_bound(lower), _as_bound(upper)
        event_dim = len(base.event_shape)
        bounds = torch.broadcast_shapes(self.lower.shape, self.upper.shape)
        bounds = bounds[: len(bounds) - event_dim] if event_dim else bounds
        batch_shape = torch.broadcast_shapes(base.batch_shape, bounds)
        super().__init__(batch_shape, base.event_shape, validate_args=validate_args)
        if self._validate_args and not bool((self.lower < self.upper).all()):
            raise ValueError("Restricted: got lower >= upper; allowed: lower < upper; fix: swap the two")

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Draws are quantiles, differentiable where the base's quantile function is."""
        return True

    def expand(self, batch_shape: Any, _instance: Any = None) -> Restricted:
        """The same law with a larger batch shape."""
        new: Restricted = self._get_checked_instance(Restricted, _instance)
        shape = torch.Size(batch_shape)
        new.base, new.lower, new.upper = self.base.expand(shape), self.lower, self.upper
        super(Restricted, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        """The interval."""
        inside = constraints.interval(self.lower, self.upper)
        return constraints.independent(inside, len(self.event_shape)) if self.event_shape else inside

    @property
    def log_normalizer(self) -> Tensor:
        """Log of the base's mass on the interval, nats, float64."""
        return interval_log_mass(self.base, self.lower, self.upper)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``value``, nats; -inf outside the interval."""
        is_inside = (value >= self.lower) & (value <= self.upper)
        if self.event_shape:
            is_inside = is_inside.flatten(-len(self.event_shape)).all(-1)
        log_prob = self.base.log_prob(value)
        return torch.where(is_inside, log_prob - self.log_normalizer.to(log_prob.dtype), -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        """Mass below ``value``."""
        point = torch.maximum(torch.minimum(value, self.upper), self.lower)
        return torch.exp(interval_log_mass(self.base, self.lower, point) - self.log_normalizer).to(value.dtype)

    def icdf(self, prob: Tensor) -> Tensor:
        """Quantile, through the base's quantile function."""
        low, high = self.base.cdf(self.lower), self.base.cdf(self.upper)
        value = self.base.icdf(low + prob * (high - low))
        return torch.maximum(torch.minimum(value, self.upper), self.lower)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, by inversion."""
        shape = self._extended_shape(torch.Size(sample_shape))
        kind = self.base.sample(torch.Size([0]))
        return self.icdf(torch.rand(shape, dtype=kind.dtype, device=kind.device)).to(kind.dtype)


def _as_bound(bound: Tensor | float) -> Tensor:
    """A number keeps its digits; as a tensor without dimensions it leaves the dtype of values alone."""
    return bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=torch.float64)


@interval_log_mass.register
def _(dist: Restricted, lower: Tensor, upper: Tensor) -> Tensor:
    low, up = (
        torch.maximum(torch.minimum(end.double(), dist.upper.double()), dist.lower.double()) for end in (lower, upper)
    )
    return interval_log_mass(dist.base, low, up) - dist.log_normalizer
