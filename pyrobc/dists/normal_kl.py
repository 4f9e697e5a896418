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
from weakref import WeakKeyDictionary

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, Independent, Laplace, Normal, kl_divergence

from pyrobc.dists.log_scale_normal import LogScaleNormal
from pyrobc.dists.pruned_normal import PrunedNormal

__all__ = ["sum_kl"]

_ROOT, _LOG_2PI = math.sqrt(2 / math.pi), math.log(2 * math.pi)
_READ: WeakKeyDictionary[Any, tuple[tuple[int, ...], tuple[float, float]]] = WeakKeyDictionary()


def sum_kl(law: Distribution, prior: Distribution) -> Tensor:
    """KL(law || prior) as one number, nats, whatever the batch and event shapes."""
    q: Any = law.base_dist if isinstance(law, Independent) else law
    p: Any = prior.base_dist if isinstance(prior, Independent) else prior
    is_ours = isinstance(q, Delta | Normal | PrunedNormal) and isinstance(p, Normal | Laplace)
    shape = q.v.shape if isinstance(q, Delta) else q.batch_shape
    if not is_ours or shape != p.batch_shape or (numbers := _read_numbers(p)) is None:
        return kl_divergence(law, prior).sum()
    if isinstance(q, Delta):
        if isinstance(p, Laplace):
            return kl_divergence(law, prior).sum()
        point: Tensor = _SumPoints.apply(q.v, *numbers)
        return point
    if isinstance(q, LogScaleNormal) and isinstance(p, Normal):
        normal: Tensor = _SumLogScale.apply(q.loc, q.log_scale, q.variance, *numbers)
        return normal
    index = q.index if isinstance(q, PrunedNormal) else None
    rule = _SumLaplace if isinstance(p, Laplace) else _SumNormal
    value: Tensor = rule.apply(q.loc, q.scale, index, *numbers)
    return value


def _read_numbers(prior: Any) -> tuple[float, float] | None:
    """Location and scale of a prior that has one of each, read once; None where it has more, or trains them."""
    parts = prior.loc, prior.scale
    if any(part.numel() == 0 or any(part.stride()) or part.requires_grad for part in parts):
        return None
    versions = tuple(part._version for part in parts)
    if prior not in _READ or _READ[prior][0] != versions:
        center, scale = (float(part.flatten()[0]) for part in parts)
        _READ[prior] = versions, (center, scale)
    return _READ[prior][1]


def _move(values: Tensor, center: float) -> Tensor:
    return values - center if center else values


def _take(values: Tensor, index: Tensor | None) -> Tensor:
    flat = values.reshape(-1)
    return flat if index is None else flat.index_select(0, index)


def _put(gradient: Tensor, like: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return gradient.view_as(like)
    return torch.zeros_like(like).view(-1).index_copy_(0, index, gradient).view_as(like)


class _SumNormal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, spread: Tensor, index: Tensor | None, center: float, scale: float) -> Tensor:
        ctx.save_for_backward(loc, spread, index)
        ctx.numbers = center, scale
        away, width = _move(_take(loc, index), center), _take(spread, index)
        energy = 0.5 * (away.dot(away) + width.dot(width)) / scale**2
        return energy - width.log().sum() + width.numel() * (math.log(scale) - 0.5)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        loc, spread, index = ctx.saved_tensors
        center, scale = ctx.numbers
        away, width = _move(_take(loc, index), center), _take(spread, index)
        to_loc = away * (gradients[0] / scale**2)
        to_spread = (width / scale**2 - width.reciprocal()) * gradients[0]
        return _put(to_loc, loc, index), _put(to_spread, spread, index), None, None, None


class _SumLogScale(torch.autograd.Function):
    """As ``_SumNormal``, of the variance and the log scale, whose slopes are one number each."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, variance: Tensor, center: float, scale: float) -> Tensor:
        ctx.save_for_backward(loc)
        ctx.numbers = center, scale
        away = _move(loc.reshape(-1), center)
        energy = (away.dot(away) + variance.sum()).mul_(0.5 / scale**2)
        return energy.sub_(log_scale.sum()).add_(loc.numel() * (math.log(scale) - 0.5))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (loc,), (center, scale) = ctx.saved_tensors, ctx.numbers
        slope = gradients[0] / scale**2
        return _move(loc, center) * slope, -gradients[0].expand_as(loc), (0.5 * slope).expand_as(loc), None, None


class _SumPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, center: float, scale: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.numbers = center, scale
        away = _move(value.reshape(-1), center)
        return away.dot(away).mul_(0.5 / scale**2).add_(away.numel() * (math.log(scale) + 0.5 * _LOG_2PI))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (value,), (center, scale) = ctx.saved_tensors, ctx.numbers
        return _move(value, center) * (gradients[0] / scale**2), None, None


class _SumLaplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, spread: Tensor, index: Tensor | None, center: float, scale: float) -> Tensor:
        away, width = _move(_take(loc, index), center), _take(spread, index)
        z = away / width
        sign, bell = torch.erf(z * math.sqrt(0.5)), _ROOT * torch.exp(-0.5 * z * z)
        ctx.save_for_backward(loc, spread, index, sign, bell)
        ctx.scale = scale
        size = width.dot(bell) + away.dot(sign)
        constant = math.log(2 * scale) - 0.5 * (_LOG_2PI + 1)
        return size / scale - width.log().sum() + width.numel() * constant

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (loc, spread, index, sign, bell), scale = ctx.saved_tensors, ctx.scale
        to_spread = (bell / scale - _take(spread, index).reciprocal()) * gradients[0]
        return _put(sign * (gradients[0] / scale), loc, index), _put(to_spread, spread, index), None, None, None
