r"""The truncated log-normal: multiplicative noise of a gate, and its closed forms in log space.

.. math::
    \theta = e^x, \qquad x \sim \mathcal N(\text{loc}, \text{scale}^2) \text{ truncated to } [\text{low}, \text{high}],
    \qquad \alpha = \frac{\text{low} - \text{loc}}{\text{scale}},\;
    \beta = \frac{\text{high} - \text{loc}}{\text{scale}},\; Z = \Phi(\beta) - \Phi(\alpha)

Moments are ratios of normalisers, because tilting a normal by :math:`e^{kx}` moves its location
by :math:`k\,\text{scale}^2`:

.. math::
    \ln E[\theta^k] = k\,\text{loc} + \tfrac12 k^2 \text{scale}^2
        + \ln Z(\alpha - k\,\text{scale}, \beta - k\,\text{scale}) - \ln Z(\alpha, \beta)

evaluated relative to the peaks of both densities, so that it is stable wherever the location lies.

References:
    Neklyudov, Molchanov, Ashukha, Vetrov, Structured Bayesian Pruning via Log-Normal Multiplicative Noise (2017).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import register_kl
from torch.distributions.utils import broadcast_all

from pyrobc.dists.truncated_log_uniform import TruncatedLogUniform
from pyrobc.dists.truncation import (
    TruncatedMoments,
    locate_peak,
    log_peak_mass,
    standard_quantile,
    truncated_moments,
)

__all__ = ["TruncatedLogNormal"]


class TruncatedLogNormal(TorchDistribution):
    """exp of a normal truncated to ``[low, high]``; ``loc`` may lie anywhere, also outside the interval.

    Stable for loc in [-30, 10] and ln scale in [-20, 5], float32 and float64: values are computed in float64 and
    returned in the dtype of the parameters.

    Args:
        loc: location of ln theta before truncation; any shape.
        scale: standard deviation of ln theta before truncation, positive.
        low: lower end of ln theta, finite.
        high: upper end of ln theta, finite, above ``low``.

    Example:
        >>> import torch
        >>> gate = TruncatedLogNormal(torch.tensor(-1.0), torch.tensor(0.5))
        >>> round(float(gate.mean), 5), round(float(gate.snr), 5)
        (0.39807, 2.17032)
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.dependent(is_discrete=False, event_dim=0),
        "high": constraints.dependent(is_discrete=False, event_dim=0),
    }
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: Tensor | float = -20.0,
        high: Tensor | float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.low, self.high = broadcast_all(loc, scale, low, high)
        super().__init__(self.loc.shape, validate_args=validate_args)
        if self._validate_args and not bool((self.low < self.high).all()):
            raise ValueError("TruncatedLogNormal: got low >= high; allowed: low < high; fix: swap the two")

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedLogNormal:
        """The same law with a larger batch shape."""
        new: TruncatedLogNormal = self._get_checked_instance(TruncatedLogNormal, _instance)
        shape = torch.Size(batch_shape)
        for name in ("loc", "scale", "low", "high"):
            setattr(new, name, getattr(self, name).expand(shape))
        super(TruncatedLogNormal, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """Theta between exp(low) and exp(high)."""
        return constraints.interval(self.low.exp(), self.high.exp())

    # The normal of ln theta, in float64: (peak, excess) = nearest point of [low, high] to loc, and loc - peak.
    def _bounds(self, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Standardised ends of the interval, for the location ``loc + shift``, without rounding loc + shift."""
        peak, excess = self._peak()
        moved, scale = excess + shift, self.scale.double()
        return (self.low.double() - peak - moved) / scale, (self.high.double() - peak - moved) / scale

    def _peak(self) -> tuple[Tensor, Tensor]:
        return locate_peak(self.loc.double(), self.low.double(), self.high.double())

    def _moments(self, shift: Tensor | float = 0.0) -> TruncatedMoments:
        return truncated_moments(*self._bounds(shift))

    def log_density_log(self, x: Tensor) -> Tensor:
        """Log density of x = ln theta at ``x`` (no support check), nats per unit of x, float64."""
        peak, excess = self._peak()
        scale = self.scale.double()
        step = x.double() - peak
        energy = 0.5 * (step / scale) * ((step - 2.0 * excess) / scale)
        return -energy - torch.log(scale) - log_peak_mass(*self._bounds())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of theta at ``value``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        x = torch.log(value.double())
        low, high = self.low.double(), self.high.double()
        slack = 4.0 * torch.finfo(value.dtype).eps * (1.0 + x.detach().abs().clamp(max=1e3))
        is_inside = (x >= low - slack) & (x <= high + slack)
        x = torch.maximum(torch.minimum(x, high), low)
        log_prob = torch.where(is_inside, self.log_density_log(x) - x, -math.inf)
        return log_prob.to(self.loc.dtype)

    def rsample_log(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterised draws of ln theta: sharper than ln of a draw of theta where theta is close to one."""
        shape = self._extended_shape(torch.Size(sample_shape))
        # From float64 noise, zero excluded: the tails of a float32 uniform stop at 6e-8.
        uniform = torch.rand(shape, dtype=torch.float64, device=self.loc.device)
        return self._quantile_log(uniform.clamp(min=torch.finfo(torch.float64).tiny)).to(self.loc.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterised draws of theta, with gradients in ``loc`` and ``scale``."""
        return self._into_support(torch.exp(self.rsample_log(sample_shape)))

    def _into_support(self, value: Tensor) -> Tensor:
        # exp rounds: bring the last unit in the last place back inside
        return torch.maximum(torch.minimum(value, self.high.exp()), self.low.exp())

    def _quantile_log(self, prob: Tensor) -> Tensor:
        peak, _ = self._peak()
        return peak + self.scale.double() * standard_quantile(prob, *self._bounds())

    def icdf(self, prob: Tensor) -> Tensor:
        """Quantile of theta."""
        return self._into_support(torch.exp(self._quantile_log(prob.double())).to(self.loc.dtype))

    def cdf(self, value: Tensor) -> Tensor:
        """Q(theta <= value)."""
        return torch.exp(self.log_mass(self.low, torch.log(value.double()))).to(self.loc.dtype)

    def log_mass(self, lower: Tensor | float, upper: Tensor | float) -> Tensor:
        """Log mass ln Q(lower <= ln theta <= upper), nats, float64, of the part inside the support; -inf if empty."""
        low, high = self.low.double(), self.high.double()
        lo = torch.as_tensor(lower, dtype=torch.float64, device=low.device)
        up = torch.as_tensor(upper, dtype=torch.float64, device=low.device)
        lo, up = torch.maximum(torch.minimum(lo, high), low), torch.maximum(torch.minimum(up, high), low)
        peak, excess = self._peak()
        scale = self.scale.double()
        # The peak of the part, seen from the peak of the whole: distance to the nearest of its points.
        near = torch.maximum(torch.minimum(peak + excess, up), lo) - peak
        energy = 0.5 * (near / scale) * ((near - 2.0 * excess) / scale)
        part = log_peak_mass((lo - peak - excess) / scale, (up - peak - excess) / scale)
        return part - energy - log_peak_mass(*self._bounds())

    def log_moment(self, k: float) -> Tensor:
        """Log moment ln E[theta^k], float64, batch shape."""
        peak, excess = self._peak()
        scale = self.scale.double()
        tilt = k * scale.square()
        move = torch.maximum(torch.minimum(excess + tilt, self.high.double() - peak), self.low.double() - peak)
        energy = 0.5 * (move / scale) * ((move - 2.0 * excess) / scale)
        log_moment = k * (peak + move) - energy + log_peak_mass(*self._bounds(tilt)) - log_peak_mass(*self._bounds())
        # theta lies in [exp(low), exp(high)], and rounding must not say otherwise
        ends = k * self.low.double(), k * self.high.double()
        return torch.maximum(torch.minimum(log_moment, torch.maximum(*ends)), torch.minimum(*ends))

    @property
    def mean(self) -> Tensor:
        """E[theta]."""
        return torch.exp(self.log_moment(1)).to(self.loc.dtype)

    def _log_squared_spread(self) -> Tensor:
        r"""Log moment ln E[theta^2] - 2 ln E[theta], the log of 1 + CV^2.

        The second difference of the cumulant function K; where ln theta varies little it is computed as
        :math:`\int_0^2 (1 - |k - 1|) K''(k)\,dk` by the three-point Gauss rule of that weight, with K'' the variance of
        the tilted normal, because the difference itself would cancel.
        """
        direct = self.log_moment(2) - 2.0 * self.log_moment(1)
        square = self.scale.double().square()
        node = math.sqrt(0.4)
        variances = [self._moments((1.0 + t) * square).variance * square for t in (-node, 0.0, node)]
        smooth = (5.0 * variances[0] + 14.0 * variances[1] + 5.0 * variances[2]) / 24.0
        return torch.where(variances[1] < 1e-3, smooth, direct)

    @property
    def variance(self) -> Tensor:
        """Var[theta]."""
        return (torch.exp(2.0 * self.log_moment(1)) * torch.expm1(self._log_squared_spread())).to(self.loc.dtype)

    @property
    def snr(self) -> Tensor:
        """E[theta] / sd[theta], float64, batch shape."""
        return torch.rsqrt(torch.expm1(self._log_squared_spread()))

    def entropy_log(self) -> Tensor:
        """Differential entropy of ln theta, nats, float64."""
        moments = self._moments()
        return torch.log(self.scale.double()) + moments.log_peak + moments.energy

    def entropy(self) -> Tensor:
        """Differential entropy of theta, nats: that of ln theta plus E[ln theta]."""
        peak, _ = self._peak()
        mean_log = peak + self.scale.double() * self._moments().offset
        return (self.entropy_log() + mean_log).to(self.loc.dtype)


@register_kl(TruncatedLogNormal, TruncatedLogUniform)  # type: ignore[untyped-decorator]
def kl_truncated_log_normal_log_uniform(q: TruncatedLogNormal, p: TruncatedLogUniform) -> Tensor:
    r"""KL(q || p) = ln(high - low) - H[ln theta], nats; infinite where q leaves the support of p.

    .. math::
        \ln(b-a) - \ln\sigma - \tfrac12\ln(2\pi e) - \ln Z - \frac{\alpha\varphi(\alpha) - \beta\varphi(\beta)}{2Z}
    """
    low, high = p.low.double(), p.high.double()
    slack = 1e-6 * (high - low)
    is_covered = (q.low.double() >= low - slack) & (q.high.double() <= high + slack)
    kl = torch.log(high - low) - q.entropy_log()
    return torch.where(is_covered, kl, math.inf).to(q.loc.dtype)
