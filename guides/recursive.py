r"""Recursive Bayesian pruning: nearly noiseless channel noise, inferred and collapsed layer by layer.

The noise on the channels of one layer is not independent of that on the layer before: of two equal channels either can
go, but once one has gone the reader must not be halved.  Inference for layer l therefore conditions on the layers
before it, and

.. math::
    p(\theta^l|D) = \int p(\theta^l|\theta^{l-1}, D)\,q(\theta^{l-1})\,d\theta^{l-1} \;\to\;
    p(\theta^l|\hat\theta^{l-1}, D) \quad\text{as}\quad q(\theta^{l-1}) \to \delta(\hat\theta^{l-1}):

when a layer has been collapsed to a point and pruned, ordinary variational inference on the next one is inference
under the dependency.  :class:`LayerByLayer`, an ``on_step`` of ``fit``, does that; without it the family is the
one-shot method, with independent noise in all layers at once.

Prior and guide of the noise of channel c, for weights with a Normal prior (weights are points):

.. math::
    \theta_c = t_c\,\varepsilon_c, \quad t_c \sim U(0, T), \quad \varepsilon_c \sim N(0, 1), \qquad
    q(\theta_c) = N(m_c, s^2), \quad q(t_c) = \delta\big(\sqrt{m_c^2 + s^2}\big),

that is, :math:`\theta_c \sim N(0, t_c^2)` with the scale that maximises the ELBO; s is given, not learned, and small
(Dirac-like).  In nats per channel,

.. math:: KL = \tfrac12\ln\Big(1 + \frac{m_c^2}{s^2}\Big) + \ln T.

Against a log likelihood :math:`-\tfrac12 h(m - \hat m)^2` there is an optimum away from zero only if
:math:`\hat m^2 \ge 4/h` (for small s), at :math:`(\hat m + \sqrt{\hat m^2 - 4/h})/2`: channels that matter less are
driven to zero.  Turning the signs of a channel's noise and of its readers changes nothing, so m is kept positive, as
the exponential of a parameter.

Schedule.  Each block of channels, from input to output, has an equal share of the steps: first noise with s falling
geometrically from 0.05 to 0.005, then :math:`m_c < \max(2s, 0.01\max_j m_j)` is set to zero, the others are frozen
where they are, and the weights re-adapt.  Blocks to come are at one, without noise.  What is frozen multiplies the
weights that read the channel, so nothing has to be absorbed before the network is cut.

Costs.  With ``counts="macs"`` the KLs of block b are weighted by :math:`c_b = M_b / \bar M`, with :math:`M_b` the
multiply-accumulates (per example) that the network loses with one channel of b and :math:`\bar M` its mean over
channels: the threshold above becomes :math:`4 c_b/h`, so that what runs slowly has to be needed more.  Weights of a
divergence are no prior, and this objective bounds no evidence.

Reduction.  The ROPE :math:`|\theta| < \text{threshold}`, with the Normal's mass over that of :math:`t\varepsilon` under
the prior; after the schedule the posterior of a channel is a point, and its odds are those of a point.  Baseline: the
noise-to-signal ratio.

What is the paper's and what is not.  From the abstract: multiplicative noise on channels, dependence across layers,
a sparsity-inducing Dirac-like prior, and pruning layer by layer.  This noise, its prior, the threshold, the schedule
and the weights by cost are a **reconstruction**, checked against the argument above and nowhere against the authors'
code; numbers of the paper are no target for it.  The multiplier acts where a channel is read, which for ReLU is the
same function as on the pre-activation.

It is *not* structured Bayesian pruning, whose noise is learned in all layers at once.

References:
    Zhou, Zhang, Wang, Tian (2019), Accelerate CNN via recursive Bayesian pruning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc.dists import UniformScaleNormal
from pyrobc.errors import ConfigError, FamilyError
from pyrobc.family import (
    Baseline,
    Effective,
    Family,
    GroupScale,
    Laws,
    ReducedPrior,
    Reference,
    normal_prior,
    restrict_to,
)
from pyrobc.groups import GroupSpec
from pyrobc.meanfield import Factor, MeanFieldGuide, PointFactor

__all__ = ["LayerByLayer", "Recursive"]

_POINT = 1e-6  # standard deviation that stands for none
_GONE = -20.0  # logarithm of a multiplier that stands for zero
_FREE, _WAITING, _FROZEN = 0, 1, 2


class NoiseFactor(Factor):
    """Normal noise around a positive mean, started at one, with a width that is given."""

    width: Tensor
    state: Tensor

    def __init__(self, like: Tensor, size: int, width: float, largest: float, lr_scale: float) -> None:
        super().__init__()
        self.largest, self.lr_scale = largest, lr_scale
        self.log_loc = nn.Parameter(like.new_zeros(size))
        self.register_buffer("width", like.new_tensor(width))
        self.register_buffer("state", torch.tensor(_FREE))

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the noise, and the best scale of its prior."""
        is_free = int(self.state) == _FREE
        loc = (self.log_loc if is_free else self.log_loc.detach()).exp()
        width = self.width if is_free else torch.full_like(self.width, _POINT)
        return loc, width, (loc.square() + width.square()).sqrt()

    def distribution(self) -> Distribution:
        """All noise of a block in units of its scale, as one site."""
        loc, width, scale = self.moments()
        joint: Distribution = dist.Normal(loc / scale, width / scale, validate_args=False).to_event(1)
        return joint

    def project_(self) -> None:
        """Keep the mean where the scale's prior is."""
        self.log_loc.data.clamp_(_GONE, math.log(0.5 * self.largest))

    @torch.no_grad()
    def wait_(self) -> None:
        """No noise yet."""
        self.state.fill_(_WAITING)

    @torch.no_grad()
    def free_(self, width: float) -> None:
        """Noise of this width."""
        self.state.fill_(_FREE)
        self.width.fill_(width)

    @torch.no_grad()
    def freeze_(self, num_widths: float, share: float) -> None:
        """Collapse to a point, at zero where the mean is below a number of widths or a share of the largest."""
        if int(self.state) == _FROZEN:
            return
        loc = self.log_loc.exp()
        is_gone = loc < torch.maximum(num_widths * self.width, share * loc.max())
        is_gone[loc.argmax()] = False
        self.log_loc.data.masked_fill_(is_gone, _GONE)
        self.state.fill_(_FROZEN)


class SpreadFactor(Factor):
    """The scale of the prior of a block's noise, at its optimum."""

    def __init__(self, noise: NoiseFactor) -> None:
        super().__init__()
        self._noise = (noise,)  # in a tuple: its parameters are listed once, under its own site

    def distribution(self) -> Distribution:
        """A point for each channel."""
        return dist.Delta(self._noise[0].moments()[2], event_dim=1, validate_args=False)


@dataclass(frozen=True)
class LayerByLayer:
    """The schedule: ``fit(..., on_step=LayerByLayer())``.

    Args:
        first_width: standard deviation of the noise when a block's turn begins.
        last_width: and when it is pruned.
        tune: share of a turn that is left for the weights to re-adapt.
        num_widths: a channel leaves whose mean is below this many standard deviations.
        share: or below this share of the largest mean of its block.
    """

    first_width: float = 0.05
    last_width: float = 0.005
    tune: float = 0.3
    num_widths: float = 2.0
    share: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.last_width <= self.first_width and 0 < self.tune < 1):
            raise ConfigError(
                "layer-by-layer schedule",
                got=f"first_width={self.first_width}, last_width={self.last_width}, tune={self.tune}",
                allowed="0 < last_width <= first_width and 0 < tune < 1",
                fix="leave them out for the defaults",
            )

    def __call__(self, guide: MeanFieldGuide, done: float) -> None:
        """Put every block into the state it has at fraction ``done`` of the steps."""
        noises = [factor for factor in guide.by_site().values() if isinstance(factor, NoiseFactor)]
        for number, noise in enumerate(noises):
            turn = (done * len(noises) - number) / (1 - self.tune)
            if turn < 0:
                noise.wait_()
            elif turn < 1:
                noise.free_(self.first_width * (self.last_width / self.first_width) ** turn)
            else:
                noise.freeze_(self.num_widths, self.share)


class Recursive(Family):
    """Channel noise with a given small width and point weights.

    Args:
        width: standard deviation of the noise where no schedule sets it.
        largest: largest scale of the noise's prior.
        weight_scale: standard deviation of the Normal prior of weights and biases.
        noise_lr: multiplier of the learning rate for the noise.
        num_draws: noise draws per minibatch, each for an equal run of examples; 0 draws one per example.
        counts: ``channels``, the ELBO, or ``macs``: KLs are weighted by the multiply-accumulates of a channel.
    """

    name = "recursive"
    posterior_on = "gate"
    references = (
        Reference(
            "zhou2019accelerate",
            "Zhou, Yuefu and Zhang, Ya and Wang, Yanfeng and Tian, Qi",
            "Accelerate CNN via Recursive Bayesian Pruning",
            2019,
            "ICCV",
            "https://arxiv.org/abs/1812.00353",
        ),
    )

    def __init__(
        self,
        width: float = 0.05,
        largest: float = 10.0,
        weight_scale: float = 1.0,
        noise_lr: float = 1.0,
        num_draws: int = 0,
        counts: Literal["channels", "macs"] = "channels",
    ) -> None:
        if counts not in ("channels", "macs"):
            raise FamilyError(
                f"family {self.name!r}", got=f"counts={counts!r}", allowed="'channels' or 'macs'",
                fix="pass one of them",
            )  # fmt: skip
        if not (width > 0 and largest >= 4 and weight_scale > 0):
            raise FamilyError(
                f"family {self.name!r}",
                got=f"width={width}, largest={largest}, weight_scale={weight_scale}",
                allowed="positive numbers, and largest at least 4, so that there is room around one",
                fix="leave them out",
            )
        self.width, self.largest, self.weight_scale = width, largest, weight_scale
        self.noise_lr, self.num_draws, self.counts = noise_lr, num_draws, counts

    def kl_weights(self, spec: GroupSpec, num_data: int) -> dict[str, float]:
        """One number per block where channels count by what they cost, one on average."""
        if self.counts == "channels":
            return {}
        costs = {block.name: count_lost_macs(spec, block.name) for block in spec.blocks}
        mean = sum(block.size * costs[block.name] for block in spec.blocks) / spec.num_groups
        return {f"{name}.noise": cost / mean for name, cost in costs.items()} if mean > 0 else {}

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Uniform scales, standard Normal noise, Normal parameters."""
        laws: dict[str, Distribution] = {}
        for block in spec.blocks:
            size, zero = torch.Size([block.size]), like.new_zeros(())
            spread = dist.Uniform(zero, zero + self.largest, validate_args=False)
            laws[f"{block.name}.spread"] = spread.expand(size).to_event(1)
            laws[f"{block.name}.noise"] = dist.Normal(zero, zero + 1, validate_args=False).expand(size).to_event(1)
        for name, info in spec.parameters.items():
            laws[name] = normal_prior(info.shape, self.weight_scale, like, loc=1.0 if info.kind == "scale" else 0.0)
        return laws

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Noise around one, its best scale, point parameters."""
        like = next(iter(start.values()))
        factors: dict[str, Factor] = {}
        for block in spec.blocks:
            noise = NoiseFactor(like, block.size, self.width, self.largest, self.noise_lr)
            factors |= {f"{block.name}.spread": SpreadFactor(noise), f"{block.name}.noise": noise}
        return MeanFieldGuide(factors | {name: PointFactor(start[name]) for name in spec.parameters})

    def combine(self, values: Mapping[str, Tensor], spec: GroupSpec) -> Effective:
        """The multiplier of a channel is its noise in its own units times its scale."""
        gates = {b.name: values[f"{b.name}.spread"] * values[f"{b.name}.noise"] for b in spec.blocks}
        return Effective(gates, {name: values[name] for name in spec.parameters})

    def draw_local(self, laws: Laws, spec: GroupSpec, num_examples: int) -> Effective:
        """Noise per example, or per run of examples."""
        draws = torch.Size([min(self.num_draws or num_examples, num_examples)])
        values = {f"{b.name}.noise": laws[f"{b.name}.noise"].rsample(draws) for b in spec.blocks}
        return self.combine(values | {n: law.v for n, law in laws.items() if n not in values}, spec)

    def mean(self, laws: Laws, spec: GroupSpec) -> Effective:
        """Mean noise, point parameters."""
        return self.combine({name: law.mean for name, law in laws.items()}, spec)

    def scales(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """Normal noise, and a Normal of uniform scale."""
        found = {}
        for block in spec.blocks:
            noise, spread = laws[f"{block.name}.noise"].base_dist, laws[f"{block.name}.spread"].v
            posterior = dist.Normal(noise.loc * spread, noise.scale * spread, validate_args=False)
            found[block.name] = GroupScale(posterior, UniformScaleNormal(torch.full_like(spread, self.largest)))
        return found

    def reduced(self) -> dict[str, ReducedPrior]:
        """The ROPE, on both sides of zero."""

        def rope(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return -threshold, threshold

        return {"rope": restrict_to("rope", rope)}

    def baselines(self) -> dict[str, Baseline]:
        """The published ratio that small noise is told by, turned over so that larger says prune."""

        def log_noise(law: Any) -> Tensor:
            return torch.as_tensor(2.0 * (law.scale.log() - law.loc.abs().log()))

        return {"log_noise": Baseline("log_noise", log_noise, "log variance over squared mean")}


def count_lost_macs(spec: GroupSpec, block: str) -> int:
    """Multiply-accumulates per example that go with the first channel of a block."""
    everything = spec.everything()
    without = everything | {block: everything[block][1:]}
    return spec.forecast(everything)[1] - spec.forecast(without)[1]
