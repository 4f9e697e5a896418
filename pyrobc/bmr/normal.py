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
from functools import partial

import torch
from pyro.distributions import Normal as PyroNormal
from torch import Tensor
from torch.distributions import Normal

from pyrobc.bmr.chunks import score_in_chunks
from pyrobc.bmr.reduction import Reduction, explain_undefined
from pyrobc.bmr.registry import register_reduction

__all__ = ["reduce_normal"]


@register_reduction(Normal, Normal, Normal)
def reduce_normal(q: Normal, p: Normal, reduced: Normal) -> Reduction:
    """Normal to Normal, elementwise; undefined where the reduced posterior would have no positive precision."""
    parameters = (q.loc, q.scale, p.loc, p.scale, reduced.loc, reduced.scale)
    delta_f = score_in_chunks(_score, *parameters)
    reason = explain_undefined(delta_f, "the reduced posterior has no positive precision")
    return Reduction(delta_f, partial(_make_posterior, *parameters), reason=reason)


def _grow(scale: Tensor, scale_p: Tensor, scale_r: Tensor) -> tuple[Tensor, Tensor]:
    """lambda, and 1 + s^2 lambda: the reduced posterior precision in units of the full one's."""
    gain = 1.0 / scale_r.square() - 1.0 / scale_p.square()
    return gain, 1.0 + scale.square() * gain


def _score(loc: Tensor, scale: Tensor, loc_p: Tensor, scale_p: Tensor, loc_r: Tensor, scale_r: Tensor) -> Tensor:
    gain, growth = _grow(scale, scale_p, scale_r)
    is_defined = growth > 0
    growth = torch.where(is_defined, growth, 1.0)
    d, e = loc - loc_p, loc_r - loc_p
    energy = d.square() * gain
    if e.requires_grad or bool(e.any()):
        pull = e / scale_r.square()
        energy = energy + pull * (e * (1.0 - (scale / scale_p).square()) - 2.0 * d)
    delta_f = torch.log(scale_p / scale_r) - 0.5 * (torch.log(growth) + energy / growth)
    return torch.where(is_defined, delta_f, math.nan)


def _make_posterior(
    loc: Tensor, scale: Tensor, loc_p: Tensor, scale_p: Tensor, loc_r: Tensor, scale_r: Tensor
) -> PyroNormal:
    _, growth = _grow(scale, scale_p, scale_r)
    growth = torch.where(growth > 0, growth, math.nan)
    moved = loc_p + (loc - loc_p + scale.square() * (loc_r - loc_p) / scale_r.square()) / growth
    return PyroNormal(moved, scale * growth.rsqrt(), validate_args=False)
