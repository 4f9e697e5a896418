r"""Truncated log-normal gates for a training step: draws and KL of many gates in few operations.

Same law as :class:`TruncatedLogNormal`, for locations *inside* the support (:math:`\alpha \le 0 \le \beta`, where a
guide keeps them), in the dtype of the parameters, with hand-written gradients.  A test holds both equal to the
distribution.  With :math:`z = \Phi^{-1}(\Phi(\alpha) + uZ)` and :math:`x = \mu + \sigma z`, differentiating
:math:`F(x; \mu, \sigma) = u` at fixed u gives

.. math::
    \frac{\partial x}{\partial\mu} &= 1 - \frac{(1-u)\phi(\alpha) + u\,\phi(\beta)}{\phi(z)}, \\
    \frac{\partial x}{\partial\ln\sigma} &=
        \sigma\Big[z - \frac{(1-u)\alpha\phi(\alpha)+u\,\beta\phi(\beta)}{\phi(z)}\Big].

With :math:`D = \alpha\phi(\alpha) - \beta\phi(\beta)` and :math:`s = D / 2Z`, the KL
:math:`\ln(b-a) - \ln\sigma - \tfrac12\ln 2\pi e - \ln Z - s` has

.. math::
    \frac{\partial KL}{\partial\mu} &= \frac1\sigma\Big[(s - 1)\frac{\phi(\alpha) - \phi(\beta)}Z
        + \frac{\phi(\alpha)(1-\alpha^2) - \phi(\beta)(1-\beta^2)}{2Z}\Big], \\
    \frac{\partial KL}{\partial\ln\sigma} &= 2s(s-1) - 1
        + \frac{\alpha\phi(\alpha)(1-\alpha^2) - \beta\phi(\beta)(1-\beta^2)}{2Z}.

References:
    Figurnov, Mohamed, Mnih, Implicit Reparameterization Gradients (2018).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["draw_gates", "gate_kl"]

_SQRT_HALF, _ROOT_TWO = math.sqrt(0.5), math.sqrt(2.0)
_FAR = 1 - 2.0**-9  # of erf: where a tail of less than 2^-10 begins
_NEAR = {torch.float32: -13.0, torch.float64: -20.0}  # below it an end's part is less than rounding, for any draw
_MOST = 60.0
_LEAST = -80.0  # exponent below which nothing counts, and arithmetic on what it gives would be ten times slower
_PHI_ZERO = 1 / math.sqrt(2.0 * math.pi)
_LOG_2PI_E = math.log(2.0 * math.pi) + 1.0


class _DrawGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, low: float, high: float, u: Tensor) -> Tensor:
        scale = log_scale.exp()
        alpha, beta = (low - loc) / scale, (high - loc) / scale
        z = _draw_normal(alpha, beta, u)  # in units of the square root of two, until the slopes
        gate = torch.addcmul(loc, scale, z, value=_ROOT_TWO).clamp_(low, high).exp_()
        # phi(end) / phi(z), with the two exponents combined so that neither under- nor overflows alone
        half = z.square()
        at_high = (half - 0.5 * beta.square()).clamp_(_LEAST, _MOST).exp_().mul_(u)
        slope, lost = z.mul_(_ROOT_TWO).addcmul_(beta, at_high, value=-1), at_high
        if bool((alpha > _NEAR[loc.dtype]).any()):  # the lower end is rarely near, and then takes no part
            at_low = half.sub_(0.5 * alpha.square()).clamp_(_LEAST, _MOST).exp_().mul_(1 - u)
            slope, lost = slope.addcmul_(alpha, at_low, value=-1), lost.add_(at_low)
        by_loc = torch.addcmul(gate, gate, lost, value=-1)
        ctx.save_for_backward(by_loc, slope.mul_(gate), scale)
        return gate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_loc, by_log_scale, scale = ctx.saved_tensors
        return (grads[0] * by_loc).sum(0), (grads[0] * by_log_scale).sum(0).mul_(scale), None, None, None


def _draw_normal(alpha: Tensor, beta: Tensor, u: Tensor) -> Tensor:
    r"""Quantile :math:`z/\sqrt2` of a standard Normal truncated to ``[alpha, beta]``.

    :math:`\mathrm{erf}(z/\sqrt2)` is uniform between its values at the two ends, and ``erfinv`` is several times faster
    than ``ndtri``; but near one a float has few digits of a small tail.  Those, one draw in five hundred, are left to
    ``ndtri``, which is given the tail itself.
    """
    ends = alpha * _SQRT_HALF, beta * _SQRT_HALF
    start = torch.erf(ends[0])
    mass = torch.erf(ends[1]) - start
    position = torch.addcmul(start, u, mass)
    far = (position.abs() > _FAR).view(-1).nonzero().squeeze(1)
    z = position.erfinv_()
    if len(far):
        group, rank = far % len(alpha), u.reshape(-1)[far]
        below, above = 0.5 * torch.special.erfc(-ends[0])[group], 0.5 * torch.special.erfc(ends[1])[group]
        part = 0.5 * mass[group]
        left, right = torch.addcmul(below, rank, part), torch.addcmul(above, 1 - rank, part)
        quantile = torch.special.ndtri(torch.minimum(left, right)).mul_(_SQRT_HALF)
        z.view(-1).index_copy_(0, far, quantile.copysign_(left.sub_(right)))
    return z


def draw_gates(loc: Tensor, log_scale: Tensor, low: float, high: float, num_draws: int) -> Tensor:
    """Draws of gates, ``[num_draws, groups]``, from locations in ``[low, high]``, both ``[groups]``."""
    # A uniform of b bits is a multiple of 2^-b: half a step more keeps it off zero.  Its largest value would round to
    # one, whose quantile is infinite.
    step = 2.0**-25 if loc.dtype == torch.float32 else 2.0**-54
    u = (torch.rand(num_draws, *loc.shape, dtype=loc.dtype, device=loc.device) + step).clamp_(max=1 - 2 * step)
    return _DrawGates.apply(loc, log_scale, low, high, u)  # type: ignore[no-any-return]


class _GateKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, low: float, high: float) -> Tensor:
        inverse = (-log_scale).exp()
        alpha, beta = (low - loc) * inverse, (high - loc) * inverse
        mass = 0.5 * (torch.erf(beta * _SQRT_HALF) - torch.erf(alpha * _SQRT_HALF))
        alpha_2, beta_2 = alpha.square(), beta.square()
        weight = _PHI_ZERO / mass  # turns exp(-x^2 / 2) into phi(x) / Z
        at_low, at_high = (weight * (-0.5 * end).clamp_(min=_LEAST).exp_() for end in (alpha_2, beta_2))
        slope = 0.5 * (alpha * at_low - beta * at_high)
        by_low, by_high = 0.5 * at_low * (1 - alpha_2), 0.5 * at_high * (1 - beta_2)
        by_loc = inverse * ((slope - 1) * (at_low - at_high) + by_low - by_high)
        by_log_scale = 2 * slope * (slope - 1) - 1 + alpha * by_low - beta * by_high
        ctx.save_for_backward(by_loc, by_log_scale)
        return math.log(high - low) - 0.5 * _LOG_2PI_E - log_scale - mass.log() - slope

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_loc, by_log_scale = ctx.saved_tensors
        return grads[0] * by_loc, grads[0] * by_log_scale, None, None


def gate_kl(loc: Tensor, log_scale: Tensor, low: float, high: float) -> Tensor:
    """KL to the log-uniform law on the same support, nats per gate, for locations in ``[low, high]``."""
    return _GateKl.apply(loc, log_scale, low, high)  # type: ignore[no-any-return]
