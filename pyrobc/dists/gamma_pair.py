r"""Two Gamma laws of a Normal's precision, chosen by a support: what is closed when both are integrated out.

.. math::
    w \sim N(0, 1/\rho), \qquad \rho\,|\,s{=}1 \sim \text{Gamma}(a, b), \quad
    \rho\,|\,s{=}0 \sim \text{Gamma}(\bar a, \bar b) \quad\text{(rates } b, \bar b\text{)},

so that :math:`w\,|\,s{=}1` is Student's t with 2a degrees of freedom and scale :math:`\sqrt{b/a}`.  With
:math:`q(w) = N(\mu, v)`, :math:`h = \tfrac12 E_q w^2 = \tfrac12(\mu^2 + v)` and :math:`\gamma = q(s{=}1)`, let

.. math::
    L(\gamma, h) = \max_{q(\rho|\cdot)} E_q\Big[\tfrac12\ln\rho - \rho h + \ln\frac{p(\rho|s)}{q(\rho|\cdot)}\Big]
    \quad\text{(nats)},

the part of the ELBO that is about this precision, without :math:`-\tfrac12\ln 2\pi`.  The *joint* block
:math:`q(s)\,q(\rho|s)` has

.. math::
    L = \gamma\ln g_1(h) + (1-\gamma)\ln g_0(h), \qquad
    \ln g_1(h) = a\ln b - \ln\Gamma(a) + \ln\Gamma(a+\tfrac12) - (a+\tfrac12)\ln(b+h),

:math:`q(\rho|s{=}1) = \text{Gamma}(a+\tfrac12, b+h)` and the same with bars; at :math:`h = w^2/2` these are the
marginal densities themselves.  The *factorised* block :math:`q(s)\,q(\rho)` has

.. math::
    L = \gamma k_1 + (1-\gamma)k_0 + \ln\Gamma(\tilde a) - \tilde a\ln\tilde b, \quad
    k_1 = a\ln b - \ln\Gamma(a), \quad \tilde a = \gamma a + (1-\gamma)\bar a + \tfrac12, \quad
    \tilde b = \gamma b + (1-\gamma)\bar b + h,

with :math:`q(\rho) = \text{Gamma}(\tilde a, \tilde b)`; it is smaller, and has two optima in :math:`\gamma`.  In both
the evidence for the support and the mean precision are derivatives,

.. math:: \ell = \partial L/\partial\gamma, \qquad E_q\rho = -\partial L/\partial h.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lgamma, log

import torch
from torch import Tensor

__all__ = ["FactorisedPair", "GammaPair"]


@dataclass(frozen=True)
class GammaPair:
    """Shapes and rates of the precision of active and of inactive weights; the joint block.

    Args:
        shape: ``a``.
        rate: ``b``.
        idle_shape: of inactive weights.
        idle_rate: of inactive weights; small, so that their precision is large.
    """

    shape: float = 1.0
    rate: float = 1.0
    idle_shape: float = 1.0
    idle_rate: float = 1e-5

    def log_evidence(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Log of g of an active and of an inactive weight."""
        return _log_evidence(h, self.shape, self.rate), _log_evidence(h, self.idle_shape, self.idle_rate)

    def bound(self, active: Tensor, h: Tensor) -> Tensor:
        """``L``, elementwise."""
        on, off = self.log_evidence(h)
        return off + active * (on - off)

    def log_odds(self, active: Tensor, h: Tensor) -> Tensor:
        """Evidence for the support, elementwise; ``active`` changes nothing here."""
        on, off = self.log_evidence(h)
        return on - off

    def mean_precision(self, active: Tensor, h: Tensor) -> Tensor:
        """Mean of the precision, elementwise."""
        on, off = (self.shape + 0.5) / (self.rate + h), (self.idle_shape + 0.5) / (self.idle_rate + h)
        return off + active * (on - off)

    def sample(self, active: Tensor) -> Tensor:
        """Precisions given supports of zeros and ones."""
        shape, rate = self._mix(active)
        return torch.distributions.Gamma(shape, rate, validate_args=False).sample()

    def _mix(self, active: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.idle_shape + active * (self.shape - self.idle_shape)
        return shape, self.idle_rate + active * (self.rate - self.idle_rate)


class FactorisedPair(GammaPair):
    """The factorised block; supports start at 0.05 or below, or from the joint block's evidence, never at one half."""

    def bound(self, active: Tensor, h: Tensor) -> Tensor:
        """``L``, elementwise."""
        shape, rate = self._posterior(active, h)
        off = _log_scale(self.idle_shape, self.idle_rate)
        prior = off + active * (_log_scale(self.shape, self.rate) - off)
        return prior + torch.lgamma(shape) - shape * rate.log()

    def log_odds(self, active: Tensor, h: Tensor) -> Tensor:
        """Evidence for the support at ``active``, elementwise."""
        shape, rate = self._posterior(active, h)
        scale = _log_scale(self.shape, self.rate) - _log_scale(self.idle_shape, self.idle_rate)
        log_precision = torch.digamma(shape) - rate.log()
        return scale + (self.shape - self.idle_shape) * log_precision - (self.rate - self.idle_rate) * shape / rate

    def mean_precision(self, active: Tensor, h: Tensor) -> Tensor:
        """Mean of the precision, elementwise."""
        shape, rate = self._posterior(active, h)
        return shape / rate

    def _posterior(self, active: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        shape, rate = self._mix(active)
        return shape + 0.5, rate + h


def _log_scale(shape: float, rate: float) -> float:
    return shape * log(rate) - lgamma(shape)


def _log_evidence(h: Tensor, shape: float, rate: float) -> Tensor:
    return _log_scale(shape, rate) + lgamma(shape + 0.5) - (shape + 0.5) * torch.log(rate + h)
