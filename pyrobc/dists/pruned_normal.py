r"""Independent Normals of which some are points at zero: what is left of a Normal posterior after exact deletion.

Bayesian model reduction replaces the prior of a pruned weight by :math:`\delta_0`, and so its posterior: both are the
same point, their divergence is zero.  For the others nothing changes,

.. math::
    q_i = N(m_i, s_i^2) \text{ if kept}, \quad \delta_0 \text{ if not}; \qquad
    KL(q\,\|\,p) = \sum_{i\text{ kept}} KL\big(N(m_i, s_i^2)\,\|\,N(\mu_i, S_i^2)\big) \quad\text{nats},

where the prior is named as it was, one Normal (or Laplace) law for each entry, and the reduction is read off the
posterior.  ``loc``,
``scale``, draws and moments of pruned entries are exactly zero; the density with respect to the point is one there.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Laplace, Normal, constraints, kl_divergence, register_kl

__all__ = ["PrunedNormal"]

_NO_SHAPE = torch.Size()


class PrunedNormal(TorchDistribution):
    """Independent Normals; entries not ``kept`` are zero.

    Args:
        loc: means, any shape.
        scale: standard deviations, same shape, positive where kept.
        kept: which entries are left, boolean, same shape.
        validate_args: as for every distribution.
        index: positions of kept entries in the flattened tensor, if known.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.nonnegative}
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        kept: Tensor,
        validate_args: bool | None = None,
        index: Tensor | None = None,
    ) -> None:
        self.kept, self._index = kept, index
        self.loc, self.scale = loc * kept, scale * kept
        super().__init__(loc.shape, validate_args=validate_args)

    @property
    def index(self) -> Tensor:
        """Positions of kept entries in the flattened tensor."""
        return self.kept.reshape(-1).nonzero().squeeze(1) if self._index is None else self._index

    @property
    def mean(self) -> Tensor:
        """Zero where pruned."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Zero where pruned."""
        return self.scale.square()

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrunedNormal:
        """The same law over a larger batch."""
        loc, scale, kept = (part.expand(torch.Size(batch_shape)) for part in (self.loc, self.scale, self.kept))
        return PrunedNormal(loc, scale, kept, validate_args=False)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Reparameterised draws, zero where pruned."""
        shape = self._extended_shape(sample_shape)
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of kept entries; 0 for a pruned entry at zero, minus infinity elsewhere."""
        scale = torch.where(self.kept, self.scale, torch.ones_like(self.scale))
        inside = Normal(self.loc, scale, validate_args=False).log_prob(value)
        point = torch.where(value == 0, torch.zeros_like(inside), torch.full_like(inside, -torch.inf))
        return torch.where(self.kept, inside, point)


def _kl_of_kept(p: PrunedNormal, q: Normal | Laplace) -> Tensor:
    scale = torch.where(p.kept, p.scale, torch.ones_like(p.scale))
    value = kl_divergence(Normal(p.loc, scale, validate_args=False), q)
    return torch.where(p.kept, value, torch.zeros_like(value))


register_kl(PrunedNormal, Normal)(_kl_of_kept)
register_kl(PrunedNormal, Laplace)(_kl_of_kept)
