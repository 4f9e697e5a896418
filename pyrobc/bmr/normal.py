r"""Normal posterior and prior: closed-form change of prior.

With posterior :math:`N(m, s^2)`, prior :math:`N(m_0, S^2)` and reduced prior :math:`N(m_r, r^2)`,

.. math::
    \tilde\pi = \frac1{s^2} + \frac1{r^2} - \frac1{S^2}, \qquad
    \tilde m = \tilde\pi^{-1}\left(\frac m{s^2} + \frac{m_r}{r^2} - \frac{m_0}{S^2}\right), \\
    \Delta F = \tfrac12 \ln\frac{S^2}{r^2 s^2 \tilde\pi}
        - \tfrac12\left[\frac{m^2}{s^2} + \frac{m_r^2}{r^2} - \frac{m_0^2}{S^2} - \tilde\pi\tilde m^2\right]

evaluated about :math:`m_0`, so that equal priors give exactly zero, and undefined where :math:`\tilde\pi \le 0`.
Completing the square gives the form used here, free of cancelling squares: with :math:`d = m - m_0`,
:math:`e = m_r - m_0`, :math:`\lambda = 1/r^2 - 1/S^2`,

.. math:: Q = \frac{d^2\lambda + e^2/r^2\,(1 - s^2/S^2) - 2de/r^2}{1 + s^2\lambda}, \qquad
    \Delta F = \tfrac12\ln\frac{S^2/r^2}{1 + s^2\lambda} - \tfrac12 Q.

References:
    Friston and Penny, Post hoc Bayesian model selection (2011).
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import Normal as PyroNormal
from torch import Tensor
from torch.distributions import Normal

from pyrobc.bmr.registry import Reduction, register_reduction

__all__ = ["reduce_normal"]


@register_reduction(Normal, Normal, Normal)
def reduce_normal(q: Normal, p: Normal, reduced: Normal) -> Reduction:
    """Normal to Normal, elementwise; undefined where the reduced posterior would have no positive precision."""
    d, e = q.loc - p.loc, reduced.loc - p.loc
    s2, p2, r2 = q.scale.square(), p.scale.square(), reduced.scale.square()
    gain = 1.0 / r2 - 1.0 / p2
    growth = 1.0 + s2 * gain  # s^2 * reduced posterior precision
    is_defined = growth > 0
    growth = torch.where(is_defined, growth, torch.ones_like(growth))
    energy = (d.square() * gain + e.square() / r2 * (1.0 - s2 / p2) - 2.0 * d * e / r2) / growth
    delta_f: Tensor = torch.log(p.scale / reduced.scale) - 0.5 * torch.log(growth) - 0.5 * energy
    delta_f = torch.where(is_defined, delta_f, math.nan)
    loc = p.loc + (d + s2 * e / r2) / growth
    posterior = PyroNormal(loc, q.scale * growth.rsqrt(), validate_args=False)
    reason = "" if bool(is_defined.all()) else "the reduced posterior has no positive precision"
    return Reduction(delta_f, posterior, reason=reason)
