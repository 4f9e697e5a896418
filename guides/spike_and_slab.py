r"""Spike-and-slab group shrinkage: a Bernoulli gate and a positive scale on every group (SS-GL and SS-GHS).

Prior.  Group ``g`` is a unit with all the weights and the bias that produce it, m numbers in all; of an input feature,
the weights that read it.  Weights and biases are non-centred, and a group is multiplied where it is read:

.. math::
    z_g \sim \text{Bernoulli}(\lambda), \qquad \tilde w_{ig} \sim N(0, \sigma_0^2), \qquad
    h_g \mapsto z_g\,\tau_g\,h_g,

with the outputs of the network left alone.  The scale is one of two:

* group lasso (SS-GL): :math:`\tau_g^2 = \kappa_g/\varsigma^2`,
  :math:`\kappa_g \sim G(\tfrac{m+1}2, \text{rate } \tfrac12)` and :math:`\varsigma^2 \sim G(4, \text{rate } 2)` for
  the whole network, that is :math:`\tau_g^2|\varsigma^2 \sim G(\tfrac{m+1}2, \text{rate } \tfrac{\varsigma^2}2)`; for
  :math:`\sigma_0 = 1` the density of :math:`w = \tau_g\tilde w_g` is proportional to :math:`e^{-\varsigma\|w\|}`;
* group horseshoe (SS-GHS): :math:`u_g = s\,\tilde\tau_g` with s for the whole network and :math:`\tilde\tau_g` both
  half-Cauchy(0, 1), each the root of a product of :math:`G(\tfrac12, 1)` and :math:`IG(\tfrac12, 1)`, regularised to
  :math:`\tau_g = c\,u_g/\sqrt{c^2 + u_g^2}`.

Guide: :math:`q(z_g) = \text{Bernoulli}(\gamma_g)`, log-normal for every factor of a scale, and for the weights
:math:`q(\tilde w|z=1) = N(m, s^2),\ q(\tilde w|z=0) = p(\tilde w)`.  With the parts in closed form,

.. math::
    KL = \sum_g \Big[\gamma_g\ln\frac{\gamma_g}\lambda + (1-\gamma_g)\ln\frac{1-\gamma_g}{1-\lambda} + \gamma_g\sum_i
    KL\big(N(m_{ig}, s_{ig}^2)\|N(0, \sigma_0^2)\big)\Big] + KL(\text{scales}),

so that, all else fixed, the best gate has :math:`\text{logit}\,\gamma_g = \text{logit}\,\lambda + E[\ln p(y|z_g=1)] -
E[\ln p(y|z_g=0)] - \sum_i KL_{ig}`.  Gates are drawn hard; their gradient is that of the relaxed gate of temperature T
(``dists.switch``, which also says how a Bernoulli gate is a continuous site with the same divergence).

Reduction.  Removing a group is the change of prior :math:`\lambda \to 0`, a point at a closed gate, and

.. math::
    \Delta F = \ln\sum_z q(z)\frac{\tilde p(z)}{p(z)} = \ln\frac{1-\gamma}{1-\lambda}, \qquad
    \Delta F_c = \ln\frac\gamma\lambda, \qquad
    \Delta F - \Delta F_c + \ln\frac{1-\lambda}\lambda = -\text{logit}\,\gamma:

the posterior odds of removal are the odds of the gate, exactly, and deciding at even odds is the median-probability
rule (drop a group where :math:`\gamma < \tfrac12`).  Another prior for the groups, ``prior_odds``, moves only the last
term.

What is the paper's and what is not.  As in the authors' code: the prior but for the place of the multiplier, the
hyperparameters 4, 2 and c = 1, T = 0.5, :math:`\sigma_0 = 1`, the divergence with its factor :math:`\gamma`, and where
gates, standard deviations and horseshoe scales start.  Choices made here: the multiplier acts where a unit is read (for
ReLU, leaky ReLU and pooling that is the same function as on the pre-activation, for the paper's SiLU it is not); the
guide factorises over :math:`(\kappa, \varsigma^2)`, not :math:`(\tau^2, \varsigma^2)`; group-lasso scales start where
their divergence is least; gates and own scales are drawn per example; :math:`\lambda` is one number, where the paper
has one per layer, from the widths (0.0015 and 0.0023 for 784-400-400-10).  Input features are groups too, unless the
network is lifted with ``prune_inputs=False``, as the paper's are; after a cut, m counts what is left.

It is *not* the group horseshoe of Bayesian compression, whose scales only shrink: here a group is exactly zero with
probability :math:`1 - \gamma`.

References:
    Jantre, Bhattacharya, Maiti (2023), A comprehensive study of spike and slab shrinkage priors for structurally sparse
    Bayesian neural networks.
    Barbieri, Berger (2004), Optimal predictive model selection: the median-probability rule.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.dists import GammaRatioRoot, HalfCauchyProduct, SoftCapped, SpikeAndSlab, Switch
from pyrobc.dists.soft_capped import soft_cap
from pyrobc.dists.switch import switch_on
from pyrobc.errors import FamilyError
from pyrobc.family import Effective, Family, GroupScale, Laws, ReducedPrior, Reference, normal_prior, restrict_to
from pyrobc.gated import GatedGuide, SwitchFactor
from pyrobc.groups import Block, GroupSpec
from pyrobc.meanfield import Factor, LogNormalFactor, MeanFieldGuide, NormalFactor

__all__ = ["SpikeAndSlabHorseshoe", "SpikeAndSlabLasso"]

_RATE_SHAPE, _RATE_RATE = 4, 2.0  # of the squared group-lasso penalty


class _SpikeAndSlab(Family):
    """Gates and weights; the scale of a group is a subclass's."""

    cap: ClassVar[float | None] = None
    _SHARED: ClassVar[dict[str, float]]
    _OWN: ClassVar[dict[str, float]]
    posterior_on = "weight"
    default_reduction = "spike"
    references = (
        Reference(
            "jantre2023comprehensive",
            "Jantre, Sanket and Bhattacharya, Shrijita and Maiti, Tapabrata",
            "A Comprehensive Study of Spike and Slab Shrinkage Priors for Structurally Sparse Bayesian Neural Networks",
            2023,
            "IEEE TNNLS",
            "https://arxiv.org/abs/2308.09104",
        ),
        Reference(
            "barbieri2004optimal",
            "Barbieri, Maria Maddalena and Berger, James O.",
            "Optimal Predictive Model Selection",
            2004,
            "Annals of Statistics 32(3)",
        ),
    )

    def __init__(
        self,
        inclusion: float = 0.002,
        weight_scale: float = 1.0,
        temperature: float = 0.5,
        initial_log_scale: float = -6.0,
        gate_lr: float = 1.0,
        scale_lr: float = 1.0,
        num_draws: int = 0,
    ) -> None:
        if not (0 < inclusion < 1 and weight_scale > 0 and temperature > 0):
            raise FamilyError(
                f"family {self.name!r}",
                got=f"inclusion={inclusion}, weight_scale={weight_scale}, temperature={temperature}",
                allowed="a probability, and positive numbers",
                fix="leave them out",
            )
        self.inclusion, self.weight_scale, self.temperature = inclusion, weight_scale, temperature
        self.initial_log_scale = initial_log_scale
        self.gate_lr, self.scale_lr, self.num_draws = gate_lr, scale_lr, num_draws

    @abstractmethod
    def prior_scales(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Prior of the factors of all scales, by site."""

    @abstractmethod
    def prior_slab(self, block: Block, spec: GroupSpec, like: Tensor) -> Distribution:
        """Prior law of a block's scales, before any cap."""

    @abstractmethod
    def start_scales(self, spec: GroupSpec, like: Tensor) -> dict[str, Tensor]:
        """Where the logarithms of the factors of all scales start, by site."""

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Logistic switches, factors of the scales, Normal parameters."""
        laws: dict[str, Distribution] = {}
        for block in spec.blocks:
            laws[f"{block.name}.gate"] = self._prior_gate(like.new_zeros(block.size)).to_event(1)
        laws |= self.prior_scales(spec, like)
        for name, info in spec.parameters.items():
            laws[name] = normal_prior(info.shape, self.weight_scale, like, loc=1.0 if info.kind == "scale" else 0.0)
        return laws

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Open gates, log-normal scales, Normal parameters started at the network's."""
        like = next(iter(start.values()))
        factors: dict[str, Factor] = {
            f"{block.name}.gate": SwitchFactor(self._prior_gate(like.new_zeros(block.size)), self.gate_lr)
            for block in spec.blocks
        }
        for site, loc in self.start_scales(spec, like).items():
            factors[site] = LogNormalFactor(loc, self.initial_log_scale)
            factors[site].lr_scale = self.scale_lr
        normals = {name: NormalFactor(start[name], self.initial_log_scale) for name in spec.parameters}
        return GatedGuide(factors | normals, spec, self.weight_scale)

    def combine(self, values: Mapping[str, Tensor], spec: GroupSpec) -> Effective:
        """The multiplier of a group is its gate times its scale."""
        gates = {}
        for block in spec.blocks:
            logs = [sign * values[site].log() for site, sign in self._sites(block).items()]
            scale = sum(logs, start=torch.zeros_like(logs[-1])).mul(0.5).exp()
            gates[block.name] = switch_on(values[f"{block.name}.gate"]) * self._limit(scale)
        return Effective(gates, {name: values[name] for name in spec.parameters})

    def draw_local(self, laws: Laws, spec: GroupSpec, num_examples: int) -> Effective:
        """Shared scales once, gates and own scales per example; parameters stay means and variances."""
        draws = torch.Size([min(self.num_draws or num_examples, num_examples)])
        common, gates = None, {}
        for block in spec.blocks:
            own = {site: sign for site, sign in self._sites(block).items() if site not in self._SHARED}
            shared_loc, shared_spread = _log_moments(laws, self._SHARED)
            loc, spread = _log_moments(laws, own)
            common = torch.randn_like(shared_loc) if common is None else common
            noise = torch.randn(draws + loc.shape, dtype=loc.dtype, device=loc.device)
            scale = (shared_loc + loc + shared_spread * common + spread * noise).exp()
            gate = switch_on(laws[f"{block.name}.gate"].rsample(draws))
            gates[block.name] = gate * self._limit(scale)
        normals = {name: laws[name].base_dist for name in spec.parameters}
        drawn = {n: q.rsample() for n, q in normals.items() if spec.parameters[n].kind in ("scale", "other")}
        means = {name: normal.loc for name, normal in normals.items()} | drawn
        variances = {n: q.scale.square() for n, q in normals.items() if n not in drawn}
        return Effective(gates, means, variances)

    def mean(self, laws: Laws, spec: GroupSpec) -> Effective:
        """Mean multipliers and mean parameters; they are independent, so the product is the mean weight."""
        gates = {block.name: self._posterior(laws, block).mean for block in spec.blocks}
        return Effective(gates, {name: laws[name].mean for name in spec.parameters})

    def scales(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """A gate times a scale, under the guide and under the prior."""
        found = {}
        for block in spec.blocks:
            posterior = self._posterior(laws, block)
            slab = self.prior_slab(block, spec, posterior.log_odds)
            prior = SpikeAndSlab(self._prior_gate(posterior.log_odds).log_odds, self._cap(slab))
            found[block.name] = GroupScale(posterior, prior)
        return found

    def reduced(self) -> dict[str, ReducedPrior]:
        """The closed gate."""

        def closed(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full_like(threshold, -1.0), torch.zeros_like(threshold)

        return {"spike": restrict_to("spike", closed)}

    def _sites(self, block: Block) -> dict[str, float]:
        """Factors of a block's squared scales, with the signs of their logarithms."""
        return self._SHARED | {f"{block.name}.{site}": sign for site, sign in self._OWN.items()}

    def _prior_gate(self, like: Tensor) -> Switch:
        log_odds = torch.full_like(like, math.log(self.inclusion) - math.log1p(-self.inclusion))
        return Switch(log_odds, log_odds, self.temperature, validate_args=False)

    def _posterior(self, laws: Laws, block: Block) -> SpikeAndSlab:
        slab: Distribution = dist.LogNormal(*_log_moments(laws, self._sites(block)), validate_args=False)
        return SpikeAndSlab(laws[f"{block.name}.gate"].base_dist.log_odds, self._cap(slab))

    def _limit(self, scale: Tensor) -> Tensor:
        return scale if self.cap is None else soft_cap(scale, self.cap)

    def _cap(self, law: Distribution) -> Distribution:
        return law if self.cap is None else SoftCapped(law, self.cap)


class SpikeAndSlabLasso(_SpikeAndSlab):
    """Spike-and-slab group lasso (SS-GL).

    Args:
        inclusion: prior probability that a group is in.
        weight_scale: standard deviation of the Normal prior of weights and biases.
        temperature: of the relaxed gate that gradients see.
        initial_log_scale: where log standard deviations of weights and of log scales start.
        gate_lr: multiplier of the learning rate for gates.
        scale_lr: the same for scales.
        num_draws: draws of gates and scales per minibatch, each for an equal run of examples; 0 draws one per example.
    """

    name = "spike_and_slab_lasso"
    _SHARED = {"rate": -1.0}
    _OWN = {"scale": 1.0}

    def prior_scales(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Gamma laws of the squared penalty and of the squared scales times it."""
        rate = dist.Gamma(like.new_tensor(_RATE_SHAPE), like.new_tensor(_RATE_RATE), validate_args=False)
        laws: dict[str, Distribution] = {"rate": rate}
        for block in spec.blocks:
            shape = _lasso_shape(block, spec, like)
            laws[f"{block.name}.scale"] = dist.Gamma(shape, like.new_tensor(0.5), validate_args=False).to_event(1)
        return laws

    def prior_slab(self, block: Block, spec: GroupSpec, like: Tensor) -> Distribution:
        """The root of a ratio of Gammas."""
        return GammaRatioRoot(_lasso_shape(block, spec, like), _RATE_SHAPE, _RATE_RATE, validate_args=False)

    def start_scales(self, spec: GroupSpec, like: Tensor) -> dict[str, Tensor]:
        """Squared scales times the penalty at their prior means, and the penalty where scales are one on average."""
        starts = {f"{b.name}.scale": (2.0 * _lasso_shape(b, spec, like)).log() for b in spec.blocks}
        return {"rate": torch.cat(list(starts.values())).mean(), **starts}


class SpikeAndSlabHorseshoe(_SpikeAndSlab):
    """Spike-and-slab group horseshoe (SS-GHS); arguments as for the group lasso."""

    name = "spike_and_slab_horseshoe"
    cap = 1.0
    _SHARED = {"global_a": 1.0, "global_b": 1.0}
    _OWN = {"local_a": 1.0, "local_b": 1.0}

    def prior_scales(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Gamma and inverse-Gamma factors of the half-Cauchys."""
        half, one = like.new_tensor(0.5), like.new_ones(())
        gamma, inverse = dist.Gamma(half, one, validate_args=False), dist.InverseGamma(half, one, validate_args=False)
        laws: dict[str, Distribution] = {"global_a": gamma, "global_b": inverse}
        for block in spec.blocks:
            size = torch.Size([block.size])
            laws[f"{block.name}.local_a"] = gamma.expand(size).to_event(1)
            laws[f"{block.name}.local_b"] = inverse.expand(size).to_event(1)
        return laws

    def prior_slab(self, block: Block, spec: GroupSpec, like: Tensor) -> Distribution:
        """A product of two half-Cauchys."""
        return HalfCauchyProduct(torch.ones_like(like))

    def start_scales(self, spec: GroupSpec, like: Tensor) -> dict[str, Tensor]:
        """Published: one for the shared factors, zero on average for the others."""
        own = {f"{b.name}.{site}": like.new_zeros(b.size) for b in spec.blocks for site in self._OWN}
        return {site: like.new_ones(()) for site in self._SHARED} | own


def _log_moments(laws: Laws, signs: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of half the signed sum of independent Normal logarithms."""
    normals = [(laws[site].base_dist if laws[site].event_shape else laws[site], sign) for site, sign in signs.items()]
    loc = 0.5 * sum((sign * law.loc for law, sign in normals), start=torch.zeros_like(normals[-1][0].loc))
    variance = sum((law.scale.square() for law, _ in normals), start=torch.zeros_like(loc))
    return loc, 0.5 * variance.sqrt()


def _lasso_shape(block: Block, spec: GroupSpec, like: Tensor) -> Tensor:
    """(m + 1) / 2 for each group of m numbers: those that produce it; of an input feature, those that read it."""
    role = "consume" if block.is_input else "produce"
    size = like.new_ones(block.size)
    for member in block.members:
        info = spec.parameters.get(member.parameter)
        if member.role == role and info is not None and info.kind in ("weight", "bias"):
            each = math.prod(info.shape) // info.shape[member.axis]
            size = size + each * torch.as_tensor(np.diff(member.ptr)).to(like)
    return 0.5 * size
