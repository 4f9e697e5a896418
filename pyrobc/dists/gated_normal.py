r"""Normal weights that are read only where their group's gate is on, and that keep their prior where it is off.

Guide, with the gate's probability :math:`\gamma`:

.. math::
    q(w \mid z = 1) = N(m, s^2), \qquad q(w \mid z = 0) = p(w) = N(0, S^2), \qquad
    E_{q(z)}\,KL\big(q(w|z)\,\|\,p(w)\big) = \gamma\,KL\big(N(m, s^2)\,\|\,N(0, S^2)\big).

A weight behind a closed gate changes no output, so it costs nothing to leave it at its prior: this is the best guide
for it, and the reason why closing a gate saves the whole divergence of its weights.  For the same reason draws need not
know the gate: wherever the weight is read, its law is :math:`N(m, s^2)`, which is what this object draws from and
computes densities of.  Only the divergence has the factor :math:`\gamma`; ``given`` is the law for a drawn gate.

References:
    Jantre, Bhattacharya, Maiti, A comprehensive study of spike and slab shrinkage priors for structurally sparse
    Bayesian neural networks (2023).
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Normal as PyroNormal
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal, constraints, register_kl

__all__ = ["GatedNormal", "kl_gated_normal"]


class GatedNormal(TorchDistribution):
    """Independent Normals, each behind a gate.

    Args:
        loc: means, any shape.
        scale: standard deviations, same shape.
        log_odds: log odds of each gate, of a shape that broadcasts.
        prior_scale: standard deviation of the prior around zero, which a weight keeps behind a closed gate.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, log_odds: Tensor, prior_scale: float, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale, self.log_odds, self.prior_scale = loc, scale, log_odds, prior_scale
        super().__init__(loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Of the weight where it is read."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Of the weight where it is read."""
        return self.scale.square()

    def expand(self, batch_shape: Any, _instance: Any = None) -> GatedNormal:
        """The same law over a larger batch."""
        loc, scale, log_odds = (p.expand(torch.Size(batch_shape)) for p in (self.loc, self.scale, self.log_odds))
        return GatedNormal(loc, scale, log_odds, self.prior_scale, validate_args=self._validate_args)

    def given(self, gate: Tensor) -> PyroNormal:
        """The law for drawn gates, zero or one, of a shape that broadcasts."""
        return PyroNormal(gate * self.loc, gate * self.scale + (1 - gate) * self.prior_scale, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of weights where they are read."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density where the weight is read, nats."""
        log_prob: Tensor = Normal(self.loc, self.scale, validate_args=False).log_prob(value)
        return log_prob


@register_kl(GatedNormal, Normal)  # type: ignore[untyped-decorator]
def kl_gated_normal(q: GatedNormal, p: Normal) -> Tensor:
    """Divergence of weight given gate, averaged over the gate, nats, elementwise."""
    ratio = (q.scale / p.scale).square()
    each = 0.5 * (ratio + ((q.loc - p.loc) / p.scale).square() - 1.0 - ratio.log())
    return torch.sigmoid(q.log_odds) * each
