r"""KL of a whole tensor of Normals against one law as a single number, in one pass forward and one backward.

Against :math:`N(\mu, S^2)`,

.. math::
    KL = \tfrac12\sum_i\Big[\frac{(m_i - \mu)^2 + s_i^2}{S^2} - 1 - \ln\frac{s_i^2}{S^2}\Big]\ \text{nats}, \qquad
    \frac{\partial KL}{\partial m_i} = \frac{m_i - \mu}{S^2}, \quad
    \frac{\partial KL}{\partial s_i} = \frac{s_i}{S^2} - \frac1{s_i},

and against a Laplace law of scale ``b`` around :math:`\mu`, with :math:`d = m - \mu`,

.. math::
    KL = \sum_i\Big[\ln 2b + \frac{E|d_i|}{b} - \tfrac12\ln(2\pi e s_i^2)\Big], \quad
    E|d| = s\sqrt{\tfrac2\pi}e^{-d^2/2s^2} + d\,\mathrm{erf}\frac{d}{s\sqrt2}, \quad
    \frac{\partial E|d|}{\partial m} = \mathrm{erf}\frac{d}{s\sqrt2}, \quad
    \frac{\partial E|d|}{\partial s} = \sqrt{\tfrac2\pi}e^{-d^2/2s^2},

over the entries that are kept, which alone are read.  A point at ``v`` has :math:`-\ln N(v; \mu, S^2)`: the same
without the terms in :math:`s_i`, and with :math:`\tfrac12\ln 2\pi S^2`.  It is the registered elementwise divergence,
summed (a test holds them equal), at a fraction of its memory traffic, which is what a step costs where layers are large
and batches small.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, Normal, kl_divergence

from pyrobc.dists.pruned_normal import PrunedNormal

__all__ = ["sum_kl"]

_ROOT = math.sqrt(2 / math.pi)


def sum_kl(law: Distribution, prior: Distribution) -> Tensor:
    """KL(law || prior) as one number, nats, whatever the batch and event shapes."""
    q: Any = law.base_dist if isinstance(law, Independent) else law
    p: Any = prior.base_dist if isinstance(prior, Independent) else prior
    is_point = isinstance(q, Delta) and isinstance(p, Normal) and q.v.shape == p.batch_shape
    if is_point and _is_one(p.loc) and _is_one(p.scale):
        point: Tensor = _SumPoints.apply(q.v, p.loc.detach().flatten()[0], p.scale.detach().flatten()[0])
        return point
    is_known = isinstance(q, Normal | PrunedNormal) and isinstance(p, Normal | Laplace)
    if is_known and q.batch_shape == p.batch_shape and _is_one(p.loc) and _is_one(p.scale):
        index = q.index if isinstance(q, PrunedNormal) else None
        center, scale = (part.detach().flatten()[0] for part in (p.loc, p.scale))
        rule = _SumLaplace if isinstance(p, Laplace) else _SumNormal
        value: Tensor = rule.apply(q.loc, q.scale, index, center, scale)
        return value
    return kl_divergence(law, prior).sum()


def _is_one(value: Tensor) -> bool:
    """Whether a tensor is one number, expanded, that nobody trains."""
    return value.numel() > 0 and not any(value.stride()) and not value.requires_grad


def _take(values: Tensor, index: Tensor | None) -> Tensor:
    flat = values.reshape(-1)
    return flat if index is None else flat.index_select(0, index)


def _put(gradient: Tensor, like: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return gradient.view_as(like)
    return torch.zeros_like(like).view(-1).index_copy_(0, index, gradient).view_as(like)


class _SumNormal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, spread: Tensor, index: Tensor | None, center: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, spread, index, center, scale)
        away, width = _take(loc, index) - center, _take(spread, index)
        energy = 0.5 * (away.dot(away) + width.dot(width)) / scale**2
        return energy - width.log().sum() + width.numel() * (scale.log() - 0.5)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        loc, spread, index, center, scale = ctx.saved_tensors
        away, width = _take(loc, index) - center, _take(spread, index)
        to_loc = away * (gradients[0] / scale**2)
        to_spread = (width / scale**2 - width.reciprocal()) * gradients[0]
        return _put(to_loc, loc, index), _put(to_spread, spread, index), None, None, None


class _SumPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, center: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(value, center, scale)
        away = value.reshape(-1) - center
        return 0.5 * away.dot(away) / scale**2 + away.numel() * (scale.log() + 0.5 * math.log(2 * math.pi))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        value, center, scale = ctx.saved_tensors
        return (value - center) * (gradients[0] / scale**2), None, None


class _SumLaplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, spread: Tensor, index: Tensor | None, center: Tensor, scale: Tensor) -> Tensor:
        away, width = _take(loc, index) - center, _take(spread, index)
        z = away / width
        sign, bell = torch.erf(z * math.sqrt(0.5)), _ROOT * torch.exp(-0.5 * z * z)
        ctx.save_for_backward(loc, spread, index, scale, sign, bell)
        size = width.dot(bell) + away.dot(sign)
        constant = (2 * scale).log() - 0.5 * math.log(2 * math.pi * math.e)
        return size / scale - width.log().sum() + width.numel() * constant

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        loc, spread, index, scale, sign, bell = ctx.saved_tensors
        to_spread = (bell / scale - _take(spread, index).reciprocal()) * gradients[0]
        return _put(sign * (gradients[0] / scale), loc, index), _put(to_spread, spread, index), None, None, None
