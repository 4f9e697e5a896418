r"""Group horseshoe (BC-GHS): one half-Cauchy scale per group, Normal weights, priced by BMR through a ROPE.

Prior, with one global scale :math:`s` per block and one local scale :math:`\tilde z_g` per group, non-centred:

.. math::
    s \sim C^+(0, \tau_0),\quad \tilde z_g \sim C^+(0, 1),\quad \tilde w_{jg} \sim N(0, 1),\quad b_j \sim N(0, 1),
    \qquad w_{jg} = \tilde w_{jg}\, s\, \tilde z_g,

where column ``g`` is every weight that reads group ``g`` (all kernels of an input channel, all positions of a
flattened channel).  Each half-Cauchy is the square root of a product of a Gamma and an inverse Gamma (Neville, Ormerod
and Wand 2014): :math:`s=\sqrt{s_a s_b}`, :math:`s_a\sim G(1/2, \text{scale } \tau_0^2)`,
:math:`s_b\sim IG(1/2, 1)`, and likewise :math:`\tilde z_g=\sqrt{\alpha_g\beta_g}` with unit scale.

Guide: the four kinds of scale are log-normal, weights and biases Normal, so the effective scale
:math:`z_g = s\tilde z_g` is log-normal with location :math:`\tfrac12(m_{s_a}+m_{s_b}+m_{\alpha}+m_{\beta})` and
variance a quarter of the sum of the four.  Every KL is closed, in nats:

.. math::
    KL(LN(m,v)\,\|\,G(a,\text{scale }\theta)) &= a\ln\theta+\ln\Gamma(a)-am+e^{m+v/2}/\theta-\tfrac12\ln(2\pi e v),\\
    KL(LN(m,v)\,\|\,IG(a,1)) &= \ln\Gamma(a)+am+e^{-m+v/2}-\tfrac12\ln(2\pi e v).

Deployed weight: :math:`E[w]=\mu\,e^{m_z+v_z/2}`.

With a slab of width c the horseshoe is the regularised one: weights are multiplied by
:math:`c\,z_g/\sqrt{c^2+z_g^2}`, which is :math:`z_g` where that is small and never above c.  Sites, guide and KL stay
as they are; the multiplier's mean is then a one-dimensional sum, and masses are those of :math:`z_g` itself.

Reduction: deleting a group exactly is degenerate here (the horseshoe's density at zero is infinite, a log-normal's is
zero), so the reduced prior is the ROPE ``z < threshold``, whose :math:`\Delta F=\ln Q-\ln P` is finite; :math:`P` is
the law of a product of two half-Cauchys.

Baseline: the published score is the negative logarithm of the scale's mode, :math:`v_z - m_z`, to be cut by eye.

It is *not* the regularised horseshoe unless a slab is given, nor the log-alpha rule of the group normal-Jeffreys
method.

References:
    Louizos, Ullrich, Welling (2017), Bayesian compression for deep learning.
    Carvalho, Polson, Scott (2010), The horseshoe estimator for sparse signals.
    Piironen, Vehtari (2017), Sparsity information and regularization in the horseshoe and other shrinkage priors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from pyrobc.dists import HalfCauchyProduct, SoftCapped
from pyrobc.dists.normal_kl import sum_kl
from pyrobc.dists.soft_capped import soft_cap
from pyrobc.errors import FamilyError
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
from pyrobc.meanfield import Factor, LogNormalFactor, MeanFieldGuide, NormalFactor

__all__ = ["GroupHorseshoe"]

_GLOBAL = ("global_a", "global_b")
_LOCAL = ("local_a", "local_b")


class GroupHorseshoe(Family):
    """Group horseshoe with Normal weights.

    Args:
        global_scale: scale of the half-Cauchy prior of each block's global scale.
        initial_log_scale: where the log standard deviation of every weight starts (the paper's log variance -9).
        slab: largest multiplier of a group (regularised horseshoe); None for no limit.
        max_scale: largest standard deviation of the first layer's weights; None for no limit (published: 0.2 for
            784-300-100, 0.5 for LeNet-5).
        scale_lr: multiplier of the learning rate for the scales.
        num_draws: scale draws per minibatch, each for an equal run of examples; 0 draws one per example.
    """

    name = "group_horseshoe"
    posterior_on = "weight"
    references = (
        Reference(
            "louizos2017bayesian",
            "Louizos, Christos and Ullrich, Karen and Welling, Max",
            "Bayesian Compression for Deep Learning",
            2017,
            "NeurIPS",
        ),
        Reference(
            "carvalho2010horseshoe",
            "Carvalho, Carlos M. and Polson, Nicholas G. and Scott, James G.",
            "The Horseshoe Estimator for Sparse Signals",
            2010,
            "Biometrika 97(2)",
        ),
        Reference(
            "piironen2017sparsity",
            "Piironen, Juho and Vehtari, Aki",
            "Sparsity Information and Regularization in the Horseshoe and Other Shrinkage Priors",
            2017,
            "Electronic Journal of Statistics 11(2)",
        ),
    )

    def __init__(
        self,
        global_scale: float = 1.0,
        initial_log_scale: float = -4.5,
        slab: float | None = None,
        max_scale: float | None = None,
        scale_lr: float = 1.0,
        num_draws: int = 0,
    ) -> None:
        if global_scale <= 0:
            raise FamilyError(
                f"family {self.name!r}",
                got=f"global_scale={global_scale}",
                allowed="a positive number",
                fix="smaller is sparser: try 1e-2",
            )
        if (slab is not None and slab <= 0) or (max_scale is not None and max_scale <= 0):
            raise FamilyError(
                f"family {self.name!r}",
                got=f"slab={slab}, max_scale={max_scale}",
                allowed="positive numbers, or None for no limit",
                fix="leave them out",
            )
        self.global_scale, self.initial_log_scale = global_scale, initial_log_scale
        self.slab, self.max_scale = slab, max_scale
        self.scale_lr, self.num_draws = scale_lr, num_draws

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Gamma and inverse-Gamma factors of the half-Cauchys, Normal parameters."""
        laws: dict[str, Distribution] = {}
        half, one = like.new_full((), 0.5), like.new_ones(())
        for block in spec.blocks:
            size = torch.Size([block.size])
            laws[f"{block.name}.global_a"] = dist.Gamma(half, one / self.global_scale**2, validate_args=False)
            laws[f"{block.name}.global_b"] = dist.InverseGamma(half, one, validate_args=False)
            laws[f"{block.name}.local_a"] = dist.Gamma(half, one, validate_args=False).expand(size).to_event(1)
            laws[f"{block.name}.local_b"] = dist.InverseGamma(half, one, validate_args=False).expand(size).to_event(1)
        for name, info in spec.parameters.items():
            laws[name] = normal_prior(info.shape, 1.0, like, loc=1.0 if info.kind == "scale" else 0.0)
        return laws

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Log-normal scales started near one, Normal parameters started at the network's."""
        like = next(iter(start.values()))
        factors: dict[str, Factor] = {}
        for block in spec.blocks:
            factors |= {f"{block.name}.{s}": LogNormalFactor(like.new_zeros(()), -4.5) for s in _GLOBAL}
            factors |= {f"{block.name}.{s}": LogNormalFactor(like.new_zeros(block.size), -4.5) for s in _LOCAL}
        for factor in factors.values():
            factor.lr_scale = self.scale_lr
        first = spec.layers[0].weight
        normals = {
            name: NormalFactor(start[name], self.initial_log_scale, self.max_scale if name == first else None)
            for name in spec.parameters
        }
        return MeanFieldGuide(factors | normals)

    def combine(self, values: Mapping[str, Tensor], spec: GroupSpec) -> Effective:
        """The multiplier of a group is the product of its global and local scale."""
        gates = {}
        for block in spec.blocks:
            factors = [values[f"{block.name}.{site}"] for site in _GLOBAL + _LOCAL]
            gate = sum((f.log() for f in factors), start=torch.zeros_like(factors[-1])).mul(0.5).exp()
            gates[block.name] = self._limit(gate)
        return Effective(gates, {name: values[name] for name in spec.parameters})

    def draw_local(self, laws: Laws, spec: GroupSpec, num_examples: int) -> Effective:
        """Global scales once, local scales per example, all blocks at once; parameters stay means and variances."""
        draws = torch.Size([min(self.num_draws or num_examples, num_examples)])
        sizes = [block.size for block in spec.blocks]
        loc_s, var_s = _log_moments([_flatten([laws[f"{b.name}.{site}"] for b in spec.blocks]) for site in _GLOBAL])
        loc_z, var_z = _log_moments([_flatten([laws[f"{b.name}.{site}"] for b in spec.blocks]) for site in _LOCAL])
        noise = torch.randn(*draws, len(loc_z), dtype=loc_z.dtype, device=loc_z.device)
        owner = torch.repeat_interleave(torch.tensor(sizes)).to(loc_s.device)
        shared = (loc_s + var_s.sqrt() * torch.randn_like(loc_s)).index_select(0, owner)
        values = self._limit(torch.addcmul(loc_z + shared, var_z.sqrt(), noise).exp())
        gates = {block.name: part for block, part in zip(spec.blocks, values.split(sizes, dim=1), strict=True)}
        normals = {name: laws[name].base_dist for name in spec.parameters}
        drawn = {n: q.rsample() for n, q in normals.items() if spec.parameters[n].kind in ("scale", "other")}
        means = {name: normal.loc for name, normal in normals.items()} | drawn
        variances = {n: q.variance for n, q in normals.items() if n not in drawn}
        return Effective(gates, means, variances)

    def kl(self, laws: Laws, priors: Laws) -> dict[str, Tensor]:
        """Scales of all blocks at once, by the kind of their prior; parameters by the registered Normal form."""
        kls: dict[str, Tensor] = {}
        for kind in _GLOBAL + _LOCAL:
            sites = [name for name in laws if name.endswith(f".{kind}")]
            q, p = _flatten([laws[name] for name in sites]), _base(priors[sites[0]])
            same = type(p)(p.concentration.flatten()[0], p.rate.flatten()[0], validate_args=False)
            parts = kl_divergence(q, same).split([_base(laws[name]).loc.numel() for name in sites])
            kls |= {name: part.sum() for name, part in zip(sites, parts, strict=True)}
        return kls | {name: sum_kl(law, priors[name]) for name, law in laws.items() if name not in kls}

    def mean(self, laws: Laws, spec: GroupSpec) -> Effective:
        """Mean multipliers and mean parameters; they are independent, so the product is the mean weight."""
        gates = {name: scale.posterior.mean for name, scale in self.scales(laws, {}, spec).items()}
        return Effective(gates, {name: laws[name].mean for name in spec.parameters})

    def scales(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """A log-normal against the law of a product of two half-Cauchys."""
        found = {}
        for block in spec.blocks:
            globals_ = [laws[f"{block.name}.{site}"] for site in _GLOBAL]
            locals_ = [laws[f"{block.name}.{site}"].base_dist for site in _LOCAL]
            loc, variance = _log_moments(globals_ + locals_)
            posterior: Distribution = dist.LogNormal(loc, variance.sqrt())
            prior: Distribution = HalfCauchyProduct(torch.full_like(loc, self.global_scale))
            if self.slab is not None:
                posterior, prior = SoftCapped(posterior, self.slab), SoftCapped(prior, self.slab)
            found[block.name] = GroupScale(posterior, prior)
        return found

    def reduced(self) -> dict[str, ReducedPrior]:
        """The ROPE; exact deletion is degenerate for a scale mixture."""

        def rope(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(threshold), threshold

        return {"rope": restrict_to("rope", rope)}

    def baselines(self) -> dict[str, Baseline]:
        """The published score, minus the log of the scale's mode; of the scale itself where a slab limits it."""

        def negative_log_mode(law: Any) -> Tensor:
            scale: Any = law.base if isinstance(law, SoftCapped) else law
            return torch.as_tensor(scale.scale.square() - scale.loc)

        return {"negative_log_mode": Baseline("negative_log_mode", negative_log_mode, "minus log scale")}

    def _limit(self, gate: Tensor) -> Tensor:
        return gate if self.slab is None else soft_cap(gate, self.slab)


def _base(law: Any) -> Any:
    return law.base_dist if isinstance(law, Independent) else law


def _flatten(laws: list[Any]) -> Any:
    """Log-normals of several sites as one, batch shape ``[all groups]``."""
    bases = [_base(law) for law in laws]
    loc, scale = (torch.cat([getattr(base, part).reshape(-1) for base in bases]) for part in ("loc", "scale"))
    return dist.LogNormal(loc, scale, validate_args=False)


def _log_moments(laws: list[Any]) -> tuple[Tensor, Tensor]:
    """Location and variance of the log of the square root of a product of independent log-normals."""
    loc = 0.5 * sum((law.loc for law in laws), start=torch.zeros_like(laws[0].loc))
    variance = 0.25 * sum((law.scale.square() for law in laws), start=torch.zeros_like(laws[0].loc))
    return loc, variance
