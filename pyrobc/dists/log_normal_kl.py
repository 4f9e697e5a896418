r"""Log-normal posteriors of scales whose prior is a Gamma or an inverse Gamma, in closed form.

If :math:`a \sim \text{Gamma}(\tfrac12, \text{scale } k^2)` and :math:`b \sim \text{InvGamma}(\tfrac12, 1)` are
independent, :math:`\sqrt{ab}` is half-Cauchy with scale k, so a horseshoe scale needs exactly these two.  With
:math:`q = \text{LN}(m, v)`, shape :math:`\alpha` and rate :math:`\beta`, :math:`E[\theta^{\pm1}] = e^{\pm m + v/2}`:

.. math::
    KL(q \,\|\, \text{Gamma}(\alpha, \beta)) &= \ln\Gamma(\alpha) - \alpha\ln\beta - \alpha m + \beta e^{m + v/2}
        - \tfrac12\ln(2\pi e v) \\
    KL(q \,\|\, \text{InvGamma}(\alpha, \beta)) &= \ln\Gamma(\alpha) - \alpha\ln\beta + \alpha m + \beta e^{-m + v/2}
        - \tfrac12\ln(2\pi e v)

The second is the first for :math:`1/\theta \sim \text{LN}(-m, v)`.

References:
    Louizos, Ullrich, Welling, Bayesian Compression for Deep Learning (2017).
    Wand, Ormerod, Padoan, Fruehwirth, Mean Field Variational Bayes for Elaborate Distributions (2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Gamma, InverseGamma, LogNormal, register_kl

__all__ = ["kl_log_normal_gamma", "kl_log_normal_inverse_gamma"]


def _kl(mean_log: Tensor, scale: Tensor, concentration: Tensor, rate: Tensor) -> Tensor:
    entropy_log = torch.log(scale) + 0.5 * math.log(2.0 * math.pi * math.e)
    expected = rate * torch.exp(mean_log + 0.5 * scale.square())
    log_norm = torch.lgamma(concentration) - concentration * torch.log(rate)
    return log_norm - concentration * mean_log + expected - entropy_log


@register_kl(LogNormal, Gamma)  # type: ignore[untyped-decorator]
def kl_log_normal_gamma(q: LogNormal, p: Gamma) -> Tensor:
    """KL(LogNormal || Gamma), nats, batch shape."""
    return _kl(q.loc, q.scale, p.concentration, p.rate)


@register_kl(LogNormal, InverseGamma)  # type: ignore[untyped-decorator]
def kl_log_normal_inverse_gamma(q: LogNormal, p: InverseGamma) -> Tensor:
    """KL(LogNormal || InverseGamma), nats, batch shape."""
    return _kl(-q.loc, q.scale, p.concentration, p.rate)
