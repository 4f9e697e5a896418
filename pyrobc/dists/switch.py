r"""A Bernoulli gate as the sign of a continuous variable: exact divergence, straight-through gradient.

The model's gate is :math:`z = 1[x > 0]` with :math:`x \sim \text{Logistic}(\text{logit}\,\lambda, 1)`, so
:math:`P(z = 1) = \lambda`.  The guide gives the two signs the probabilities :math:`\gamma = \sigma(\theta)` and
:math:`1 - \gamma` and leaves x alone within each sign:

.. math::
    q(x) = p(x)\,\Big(\frac\gamma\lambda\Big)^{1[x>0]}\Big(\frac{1-\gamma}{1-\lambda}\Big)^{1[x\le0]}, \qquad
    KL(q\,\|\,p) = \gamma\ln\frac\gamma\lambda + (1-\gamma)\ln\frac{1-\gamma}{1-\lambda},

the divergence of the two Bernoulli laws: nothing is paid for x being continuous, and samplers that need a density on
the real line have one.

Draws: with u uniform and :math:`r = \theta + \text{logit}\,u`, the sign of r is positive with probability
:math:`\gamma`; x takes that sign and r's rank within it, :math:`\sigma(\text{logit}\lambda - x) = (1-u)\lambda/\gamma`
above zero and :math:`\sigma(x - \text{logit}\lambda) = u(1-\lambda)/(1-\gamma)` below.  The gradient of a draw is that
of the relaxed gate :math:`y = \sigma(r/T)` (a binary concrete variable), :math:`\partial y/\partial\theta = y(1-y)/T`;
the gate read from x by :func:`switch_on` is hard and passes it on.  The hard gate's probability does not depend on T.

References:
    Maddison, Mnih, Teh, The Concrete Distribution: A Continuous Relaxation of Discrete Random Variables (2017).
    Jang, Gu, Poole, Categorical Reparameterization with Gumbel-Softmax (2017): straight-through.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import register_kl
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

__all__ = ["Switch", "kl_switch", "switch_on"]


class Switch(TorchDistribution):
    """Law of x whose sign is the gate: positive with log odds ``log_odds``, else as under the prior.

    Args:
        log_odds: of a positive sign.
        prior_log_odds: location of the logistic law that each sign keeps; the prior has that for ``log_odds``.
        temperature: of the relaxed gate whose gradient a draw carries.
    """

    arg_constraints = {"log_odds": constraints.real, "prior_log_odds": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        log_odds: Tensor,
        prior_log_odds: Tensor,
        temperature: float = 0.5,
        validate_args: bool | None = None,
    ) -> None:
        self.log_odds, self.prior_log_odds = broadcast_all(log_odds, prior_log_odds)
        self.temperature = temperature
        super().__init__(self.log_odds.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Switch:
        """The same law with a larger batch shape."""
        shape = torch.Size(batch_shape)
        odds = self.log_odds.expand(shape), self.prior_log_odds.expand(shape)
        return Switch(*odds, self.temperature, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of x, nats."""
        away = value - self.prior_log_odds
        above = logsigmoid(self.log_odds) - logsigmoid(self.prior_log_odds)
        below = logsigmoid(-self.log_odds) - logsigmoid(-self.prior_log_odds)
        return logsigmoid(away) + logsigmoid(-away) + torch.where(value > 0, above, below)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of x, with the gradient of the relaxed gate."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            eps = torch.finfo(self.log_odds.dtype).eps
            u = torch.rand(shape, dtype=self.log_odds.dtype, device=self.log_odds.device).clamp_(eps / 4, 1 - eps)
            noise = torch.logit(u)
            is_on = self.log_odds + noise > 0
            sign = is_on.to(u.dtype) * 2 - 1
            # log of the share of the prior's mass of this sign that lies beyond x
            beyond = logsigmoid(-sign * noise) - logsigmoid(sign * self.log_odds)
            tail = (beyond.clamp_max(0.0) + logsigmoid(sign * self.prior_log_odds)).clamp_max(-eps)
            away = torch.log(-torch.expm1(tail)) - tail
            x = self.prior_log_odds + sign * away
            x = torch.where(is_on, x.clamp_min(torch.finfo(x.dtype).tiny), x.clamp_max(0.0))
        relaxed = torch.sigmoid((self.log_odds + noise) / self.temperature)
        return x + (relaxed - relaxed.detach())


def switch_on(x: Tensor) -> Tensor:
    """The gate 1[x > 0], with the gradient that x carries."""
    return (x > 0).to(x.dtype) + (x - x.detach())


@register_kl(Switch, Switch)  # type: ignore[untyped-decorator]
def kl_switch(q: Switch, p: Switch) -> Tensor:
    """KL of the two gates, nats, batch shape; both laws keep the same prior within a sign."""
    on, off = torch.sigmoid(q.log_odds), torch.sigmoid(-q.log_odds)
    above = logsigmoid(q.log_odds) - logsigmoid(p.log_odds)
    return on * above + off * (logsigmoid(-q.log_odds) - logsigmoid(-p.log_odds))
