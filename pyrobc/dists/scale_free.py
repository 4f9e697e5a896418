r"""A proper scale-free prior on the whole line, for signed scales with a Normal posterior (normal-Jeffreys).

:math:`p(z) \propto 1/|z|` has no normaliser.  Its proper version is log-uniform in the middle, flat below
:math:`\delta = e^a` and of power-law tail above :math:`B = e^b`, so that it is positive wherever a Normal is:

.. math::
    p(z) = \frac1C \min\Big(\frac1\delta, \frac1{|z|}, \frac{B}{z^2}\Big), \qquad C = 2(b - a + 2),

the centre and the two tails together holding 2 parts in :math:`b-a+2`.  (Cut off sharply at the two ends instead, it
would be zero where every Normal has mass, and the KL infinite.)

KL of :math:`q = N(\mu, \sigma^2)`, with :math:`\ln\alpha = \ln\sigma^2 - \ln\mu^2` and :math:`u = 1/(2\alpha)`.
:math:`z^2/\sigma^2` is noncentral chi-squared, so :math:`E\ln z^2 = \ln 2\sigma^2 +
\sum_j \text{Pois}(j; u)\,\psi(j + \tfrac12)`, and

.. math::
    KL = g(u) + \ln C - \tfrac12(1 + \ln\pi) + \tfrac12\psi(\tfrac12), \qquad
    g(u) = \tfrac12\Big[\sum_j \text{Pois}(j; u)\,\psi(j+\tfrac12) - \psi(\tfrac12)\Big] = 2\int_0^{\sqrt u} D(x)\,dx,

with Dawson's function D.  Only :math:`g` depends on the posterior, and it falls to 0 as :math:`\alpha\to\infty`: the KL
to the improper prior is the same g and no constant.  For :math:`u \le 32` the Poisson sum has positive terms only, and
for :math:`u > 32` the expectation of the logarithm has an asymptotic series of the same digits:

.. math::
    g(u) = \tfrac12(\ln 2u + \gamma + \ln 2) - \sum_{k\ge1}\frac{(2k-1)!!}{2k\,(2u)^k}, \qquad
    \frac{dg}{d\ln\alpha} = -\sum_j \frac{u\,\text{Pois}(j; u)}{2j+1}
    = -\tfrac12 - \sum_{k\ge1}\frac{(2k-1)!!}{2\,(2u)^k}.

What the two ends add is left out: :math:`E_q[\ln(\delta/|z|)]_+ \approx 2\delta\,q(0)`, at most
:math:`0.8\,\delta/\sigma` nats, and :math:`E_q[\ln(|z|/B)]_+`, nothing for a posterior inside the ends.  They matter
for a posterior as narrow as the centre, or wider than B.

References:
    Louizos, Ullrich, Welling, Bayesian Compression for Deep Learning (2017): the prior, and a sigmoid in place of g.
    Kingma, Salimans, Welling, Variational Dropout and the Local Reparameterization Trick (2015).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Normal, register_kl
from torch.distributions.utils import broadcast_all

from pyrobc.dists.interval import interval_log_mass

__all__ = [
    "ScaleFree",
    "constant_divergence",
    "jeffreys_divergence",
    "kl_normal_scale_free",
    "log_alpha",
    "sigmoid_divergence",
]

_EULER = 0.57721566490153286
_SWITCH = math.log(64.0)  # of ln 2u, where the Poisson sum hands over to the asymptotic series
_NUM_POISSON, _NUM_ASYMPTOTIC = 100, 24
_LEAST = -700.0  # exponent below which a term is none; what underflows would be slow


class ScaleFree(TorchDistribution):
    """Symmetric about zero; ``1/|z|`` for ``ln|z|`` in ``[low, high]``, flat below and a tail ``1/z^2`` above.

    Args:
        low: log of the end of the flat centre.
        high: log of the start of the tails, above ``low``.

    Example:
        >>> import torch
        >>> round(float(ScaleFree(-20.0, 20.0).cdf(torch.tensor(1.0))), 6)
        0.75
    """

    arg_constraints = {"low": constraints.real, "high": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(
        self, low: Tensor | float = -20.0, high: Tensor | float = 20.0, validate_args: bool | None = None
    ) -> None:
        self.low, self.high = broadcast_all(low, high)
        super().__init__(self.low.shape, validate_args=validate_args)
        if self._validate_args and not bool((self.low < self.high).all()):
            raise ValueError("ScaleFree: got low >= high; allowed: low < high; fix: swap the two")

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScaleFree:
        """The same law with a larger batch shape."""
        new: ScaleFree = self._get_checked_instance(ScaleFree, _instance)
        shape = torch.Size(batch_shape)
        new.low, new.high = self.low.expand(shape), self.high.expand(shape)
        super(ScaleFree, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def parts(self) -> Tensor:
        """``high - low + 2``: the mass in units of the centre's."""
        return self.high - self.low + 2.0

    @property
    def mean(self) -> Tensor:
        """Undefined: the tails are a Cauchy's."""
        return torch.full_like(self.low, math.nan)

    @property
    def variance(self) -> Tensor:
        """Infinite."""
        return torch.full_like(self.low, math.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``value``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        size = value.abs()
        log_size = torch.maximum(torch.log(torch.maximum(size, self.low.exp())), self.low)
        beyond = (log_size - self.high).clamp(min=0.0)
        return -log_size - beyond - torch.log(2.0 * self.parts)

    def icdf(self, prob: Tensor) -> Tensor:
        """Quantile."""
        rank = (2.0 * prob - 1.0).abs() * self.parts
        left = (self.parts - rank).clamp(min=torch.finfo(rank.dtype).eps)
        inside = torch.exp(self.low + (rank - 1.0).clamp(min=0.0))
        size = torch.where(rank < 1.0, rank * self.low.exp(), torch.where(left < 1.0, self.high.exp() / left, inside))
        return torch.copysign(size, prob - 0.5)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, by inversion."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.icdf(torch.rand(shape, dtype=self.low.dtype, device=self.low.device))

    def cdf(self, value: Tensor) -> Tensor:
        """P(z <= value)."""
        return torch.exp(self.log_mass(-math.inf, value)).to(self.low.dtype)

    def log_mass(self, lower: Tensor | float, upper: Tensor | float) -> Tensor:
        """Log mass ln P(lower <= z <= upper), nats, float64; -inf for an empty interval."""
        low, up = (torch.as_tensor(end).to(self.low.device, torch.float64) for end in (lower, upper))
        low, up = torch.broadcast_tensors(low, up)
        # An interval on the left is mirrored to the right.
        low, up = torch.where(up <= 0, -up, low), torch.where(up <= 0, -low, up)
        is_across = low < 0
        first, second = self._parts_below(low.abs()), self._parts_below(up)
        apart = torch.where(
            low.abs() > self.high.double().exp(), self._parts_above(low.abs()) - self._parts_above(up), second - first
        )
        mass = torch.where(is_across, first + second, apart)
        return torch.log(mass.clamp(min=0.0)) - torch.log(2.0 * self.parts.double())

    def _parts_below(self, size: Tensor) -> Tensor:
        """``parts * P(|z| <= size)``."""
        low, high = self.low.double(), self.high.double()
        centre = (size * torch.exp(-low)).clamp(max=1.0)
        middle = torch.minimum(torch.maximum(torch.log(size), low), high) - low
        return centre + middle + 1.0 - self._parts_above(size)

    def _parts_above(self, size: Tensor) -> Tensor:
        """Part of the tails beyond ``max(size, exp(high))``."""
        end = self.high.double().exp()
        return end / torch.maximum(size, end)


@interval_log_mass.register
def _(dist: ScaleFree, lower: Tensor, upper: Tensor) -> Tensor:
    return dist.log_mass(lower, upper)


@lru_cache
def _series(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Columns: coefficients of g and of its slope; rows: Poisson counts, and powers of 1/(2u).  Last, ln j!."""
    odd = 2.0 * torch.arange(_NUM_POISSON + 1, dtype=torch.float64) + 1.0
    halves = torch.cat([odd.new_zeros(1), (1.0 / odd[:-1]).cumsum(0)])  # (psi(j + 1/2) - psi(1/2)) / 2
    k = torch.arange(1, _NUM_ASYMPTOTIC + 1, dtype=torch.float64)
    double_factorial = odd[:_NUM_ASYMPTOTIC].cumprod(0)  # 1, 1 3, 1 3 5, ...
    poisson = torch.stack([halves, 1.0 / odd], 1)
    asymptotic = torch.stack([-double_factorial / (2.0 * k), double_factorial / 2.0], 1)
    return poisson.to(device), asymptotic.to(device), torch.lgamma(0.5 * (odd + 1.0)).to(device)


def _sum_poisson(log_u: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence and its slope, where u is at most 32."""
    poisson, _, log_factorial = _series(log_u.device)
    log_u = log_u.clamp(min=_LEAST)
    counts = torch.arange(len(poisson), dtype=torch.float64, device=log_u.device)
    u = log_u.exp()
    weights = torch.addcmul(-log_factorial, log_u.unsqueeze(-1), counts).sub_(u.unsqueeze(-1)).clamp_(_LEAST).exp_()
    value, slope = (weights @ poisson).unbind(-1)
    return value, -u * slope


def _sum_asymptotic(log_2u: Tensor) -> tuple[Tensor, Tensor]:
    """The same where it is more."""
    _, asymptotic, _ = _series(log_2u.device)
    powers = torch.exp(-log_2u).unsqueeze(-1).expand(-1, len(asymptotic)).cumprod(-1)
    value, slope = (powers @ asymptotic).unbind(-1)
    return value + 0.5 * (log_2u + _EULER + math.log(2.0)), -0.5 - slope


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor) -> Tensor:
        log_2u = -log_alpha.double().reshape(-1)
        is_far = log_2u > _SWITCH
        value, slope = torch.empty_like(log_2u), torch.empty_like(log_2u)
        for part, rule, shift in ((is_far, _sum_asymptotic, 0.0), (~is_far, _sum_poisson, math.log(2.0))):
            index = part.nonzero().squeeze(1)
            if len(index):
                values, slopes = rule(log_2u[index] - shift)
                value.index_copy_(0, index, values)
                slope.index_copy_(0, index, slopes)
        ctx.save_for_backward(slope.view_as(log_alpha).to(log_alpha.dtype))
        return value.view_as(log_alpha).to(log_alpha.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope  # type: ignore[no-any-return]


def jeffreys_divergence(log_alpha: Tensor) -> Tensor:
    """KL(Normal || 1/|z|) less its limit for infinite alpha, exactly: g of the module's docstring, nats.

    Args:
        log_alpha: log of variance over squared mean, any shape.

    Example:
        >>> import torch
        >>> round(float(jeffreys_divergence(torch.tensor(0.0))), 6)
        0.426686
    """
    return _Divergence.apply(log_alpha)  # type: ignore[no-any-return]


def sigmoid_divergence(log_alpha: Tensor) -> Tensor:
    r"""The published approximation of ``jeffreys_divergence``, within 0.0095 nats of it.

    :math:`k_1 - k_1\,\text{sigmoid}(k_2 + k_3\ln\alpha) + \tfrac12\ln(1 + 1/\alpha)`.

    Args:
        log_alpha: log of variance over squared mean, any shape.
    """
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 * torch.sigmoid(-k2 - k3 * log_alpha) + 0.5 * torch.nn.functional.softplus(-log_alpha)


def log_alpha(law: Normal) -> Tensor:
    """Log of variance over squared mean: the inverse signal-to-noise ratio."""
    smallest = torch.finfo(law.loc.dtype).tiny  # a mean of zero has a large alpha and no slope
    return 2.0 * (torch.log(law.scale) - torch.log(law.loc.abs().clamp(min=smallest)))


def constant_divergence(prior: ScaleFree) -> Tensor:
    """What a posterior without signal (infinite alpha) pays: KL less ``jeffreys_divergence``, nats, batch shape."""
    digamma_half = -_EULER - 2.0 * math.log(2.0)
    return torch.log(2.0 * prior.parts) - 0.5 * (1.0 + math.log(math.pi) - digamma_half)


@register_kl(Normal, ScaleFree)  # type: ignore[untyped-decorator]
def kl_normal_scale_free(q: Normal, p: ScaleFree) -> Tensor:
    """KL(Normal || ScaleFree), nats, batch shape, for posteriors between the ends of the prior."""
    return jeffreys_divergence(log_alpha(q)) + constant_divergence(p)
