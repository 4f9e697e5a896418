r"""Weights of which few are active, active ones beside each other: prior, posterior, and the KL of the two.

The prior of a weight tensor has three layers, a chain of supports along each scan (``dists.binary_chain``,
``dists.scan``), a precision, and the weight (``dists.gamma_pair``):

.. math:: p(w) = \sum_s p(s)\prod_n\int p(\rho_n|s_n)\,N(w_n; 0, 1/\rho_n)\,d\rho_n
    = \prod_n \frac{g_0(w_n^2/2)}{\sqrt{2\pi}}\cdot Z(\ell), \qquad \ell_n = \ln\frac{g_1(w_n^2/2)}{g_0(w_n^2/2)},

so supports and precisions sum out: ``log_prob`` is one pass of messages, and ``w`` is continuous.  The posterior
:math:`q(w)\,q(\rho, s)` has Normal weights.  Against the prior of all three layers, with :math:`h_n =
\tfrac12(\mu_n^2 + v_n)`, ``L`` of ``dists.gamma_pair`` and a chain ``q(s)`` of marginals :math:`\gamma_n`,

.. math::
    KL(q(w)q(\rho,s)\,\|\,p) = -\tfrac12\sum_n(1 + \ln v_n) - \sum_n L(\gamma_n, h_n) + KL(q(s)\,\|\,p(s))
    \;\ge\; KL(q(w)\,\|\,p(w)) \quad\text{(nats)}.

In the joint block its minimum over ``q(s)`` is the chain with evidence :math:`\ell_n = \ln g_1(h_n)/g_0(h_n)`, where

.. math:: KL = -\tfrac12\sum_n(1 + \ln v_n) - \sum_n\ln g_0(h_n) - \ln Z(\ell).

:math:`\ln Z` is convex in :math:`\ell` with gradient :math:`\gamma`: the first form, with ``q(s)`` held where messages
last put it, is the tangent of the second, never below it, and equal there in value and, by the envelope theorem, in
gradient, :math:`\partial KL/\partial\mu_n = E[\rho_n]\mu_n`, :math:`\partial KL/\partial v_n = \tfrac12(E[\rho_n] -
1/v_n)`.  So gradient steps on ``w`` between passes, and passes between steps, are coordinate ascent on one ELBO.

Deleted weights are points at zero, whose support is zero for certain.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.torch import Independent
from torch import Tensor
from torch.distributions import Distribution, register_kl

from pyrobc.dists.binary_chain import BinaryChain, Rates
from pyrobc.dists.gamma_pair import GammaPair
from pyrobc.dists.pruned_normal import PrunedNormal
from pyrobc.dists.scan import Walk, from_chains, to_chains

__all__ = ["ChainedStudentT", "SupportedNormal"]

_NO_SHAPE = torch.Size()


class ChainedStudentT(TorchDistribution):
    """The prior of a weight tensor, supports and precisions summed out.

    Args:
        shape: of the tensor.
        pair: the laws of the precision.
        rates: of the chains.
        walk: along which axis of a convolution's weight chains run.
        validate_args: as for every distribution.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        shape: torch.Size,
        pair: GammaPair,
        rates: Rates,
        walk: Walk = "kernel",
        validate_args: bool | None = None,
    ) -> None:
        self.pair, self.rates, self.walk = pair, rates, walk
        super().__init__(_NO_SHAPE, torch.Size(shape), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ChainedStudentT:
        """The same law with a batch shape."""
        new: ChainedStudentT = self._get_checked_instance(ChainedStudentT, _instance)
        new.pair, new.rates, new.walk = self.pair, self.rates, self.walk
        super(ChainedStudentT, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    @constraints.dependent_property
    def support(self) -> Any:
        """All real tensors."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def chains(self, log_odds: Tensor) -> BinaryChain:
        """The supports, given evidence for each weight, ``[..., *shape]``."""
        return BinaryChain(self.rates, to_chains(log_odds, self.event_shape, self.walk), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a tensor, nats, by one pass of messages."""
        on, off = self.pair.log_evidence(0.5 * value.square())
        first = value.dim() - len(self.event_shape)
        supports = self.chains(on - off).log_partition.flatten(first).sum(-1)
        return (off - 0.5 * math.log(2 * math.pi)).flatten(first).sum(-1) + supports

    @torch.no_grad()
    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Draws: supports, then precisions, then weights."""
        none = self.rates.start.new_zeros(()).expand(self._extended_shape(torch.Size(sample_shape)))
        active = from_chains(self.chains(none).sample(), self.event_shape, self.walk)
        return torch.randn_like(active) * self.pair.sample(active).rsqrt()


class SupportedNormal(Independent):
    """Normal weights together with their supports and precisions; draws, density and moments are those of the weights.

    Transitions of the prior are learned, and the chain that learned them holds them: the prior is named as it was, and
    they are read off here, as for ``PrunedNormal``.

    Args:
        base: independent Normals, some of them deleted or none.
        pair: the block of precisions.
        supports: the chain as messages last left it.
        walk: of the chain.
    """

    def __init__(self, base: Distribution, pair: GammaPair, supports: BinaryChain, walk: Walk) -> None:
        super().__init__(base, len(base.batch_shape), validate_args=False)
        self.pair, self.supports, self.walk = pair, supports, walk

    def expand(self, batch_shape: Any, _instance: Any = None) -> Independent:
        """The weights alone, with a batch shape."""
        alone: Independent = Independent(self.base_dist, self.reinterpreted_batch_ndims).expand(batch_shape)
        return alone

    @property
    def active(self) -> Tensor:
        """Probability of each weight's support, as messages last left it."""
        return from_chains(self.supports.mean, self.event_shape, self.walk)

    def refreshed(self) -> BinaryChain:
        """The supports given the weights as they are now: one pass of messages, differentiable in them."""
        base: Any = self.base_dist
        log_odds = self.pair.log_odds(self.active, 0.5 * (base.loc.square() + base.scale.square()))
        if isinstance(base, PrunedNormal):
            log_odds = log_odds.masked_fill(~base.kept, -torch.inf)
        return self.supports.given(to_chains(log_odds, self.event_shape, self.walk))


def _kl_of_all_layers(q: SupportedNormal, p: ChainedStudentT) -> Tensor:
    """Of weights, precisions and supports: an upper bound for the weights alone."""
    base: Any = q.base_dist
    loc, scale, active = base.loc, base.scale, q.active
    if isinstance(base, PrunedNormal):
        loc, scale, active = (part.reshape(-1)[base.index] for part in (loc, scale, active))
    h = 0.5 * (loc.square() + scale.square())
    weights = -0.5 * scale.numel() - scale.log().sum() - q.pair.bound(active, h).sum()
    total: Tensor = weights + q.supports.kl_from_prior.sum()
    return total


register_kl(SupportedNormal, ChainedStudentT)(_kl_of_all_layers)
