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

_SQRT_HALF = math.sqrt(0.5)
_PHI_ZERO = 1 / math.sqrt(2.0 * math.pi)
_LOG_2PI_E = math.log(2.0 * math.pi) + 1.0


class _DrawGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, low: float, high: float, u: Tensor) -> Tensor:
        scale = log_scale.exp()
        alpha, beta = (low - loc) / scale, (high - loc) / scale
        below, above = 0.5 * torch.special.erfc(-alpha * _SQRT_HALF), 0.5 * torch.special.erfc(beta * _SQRT_HALF)
        mass = 0.5 * (torch.erf(beta * _SQRT_HALF) - torch.erf(alpha * _SQRT_HALF))
        left, right = torch.addcmul(below, u, mass), torch.addcmul(above, 1 - u, mass)
        tail = torch.minimum(left, right)
        z = torch.copysign(torch.special.ndtri(tail), left - right)
        x = torch.addcmul(loc, scale, z).clamp_(low, high)
        gate = x.exp()
        # phi(end) / phi(z), with the two exponents combined so that neither under- nor overflows alone
        half = 0.5 * z.square()
        at_low = (half - 0.5 * alpha.square()).clamp_(max=60.0).exp_().mul_(1 - u)
        at_high = (half - 0.5 * beta.square()).clamp_(max=60.0).exp_().mul_(u)
        by_loc = gate * (1 - at_low - at_high)
        by_log_scale = gate * scale * (z - alpha * at_low - beta * at_high)
        ctx.save_for_backward(by_loc, by_log_scale)
        return gate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_loc, by_log_scale = ctx.saved_tensors
        return (grads[0] * by_loc).sum(0), (grads[0] * by_log_scale).sum(0), None, None, None


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
        at_low, at_high = weight * (-0.5 * alpha_2).exp_(), weight * (-0.5 * beta_2).exp_()
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
