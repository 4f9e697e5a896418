r"""Group normal-Jeffreys (BC-GNJ): a scale-free prior on one Normal scale per group, Normal weights, priced by a ROPE.

Prior, for the scale :math:`z_g` of every group and every weight :math:`w_{jg}` that reads it, non-centred:

.. math::
    p(z_g) \propto 1/|z_g|, \quad \tilde w_{jg} \sim N(0, 1), \quad b_j \sim N(0, 1), \qquad
    w_{jg} = z_g\,\tilde w_{jg}, \quad\text{that is } w_{jg}|z_g \sim N(0, z_g^2).

Guide: :math:`q(z_g) = N(\mu_g, \sigma_g^2)` and Normal weights, :math:`q(w_{jg}|z_g) = N(z_g\mu_{jg},
z_g^2\sigma_{jg}^2)`.  Turning the signs of a scale and of its column together changes nothing, so :math:`\mu_g` is kept
positive, as the exponential of a parameter.  With :math:`\alpha_g = \sigma_g^2/\mu_g^2`, in nats per group,

.. math::
    KL(q(z_g)\,\|\,p) = \text{const} + \tfrac12\Big[\sum_j \text{Pois}\big(j; \tfrac1{2\alpha_g}\big)
    \psi(j + \tfrac12) - \psi(\tfrac12)\Big]
    \approx \text{const} + k_1\,\text{sigmoid}(-k_2 - k_3\ln\alpha_g) + \tfrac12\ln(1 + \alpha_g^{-1}),

the first exact, the second the published fit (``divergence="sigmoid"``, within 0.0095); both fall to the constant as
the scale loses its signal, and :math:`\ln\alpha_g` does not depend on the unit of the scale.  The KL of
weights is :math:`\tfrac12\sum(\sigma^2 + \mu^2 - 1 - \ln\sigma^2)`: the scale cancels.  Deployed weight:
:math:`E[w_{jg}] = \mu_g\mu_{jg}`.

The prior is improper: it has no draws, and a change of it no Bayes factor.  The site's prior is therefore the proper
``ScaleFree(low, high)``: :math:`1/|z|` for :math:`\ln|z|` in ``[low, high]``, flat below, a power-law tail above.  That
fixes the constant,

.. math::
    \text{const} = \ln 2(\text{high} - \text{low} + 2) - \tfrac12(1 + \ln\pi) + \tfrac12\psi(\tfrac12),

and changes no gradient for posteriors between the ends (the guide keeps them there: the omitted terms stay below 0.002
nats with the default ends).  The ends do matter to evidence: the reduced prior is the ROPE
:math:`|z| < \text{threshold}`, and in :math:`\Delta F = \ln Q - \ln P` every doubling of ``high - low`` moves
:math:`P`.  They cancel in the posterior odds :math:`\ln Q/(1-Q)`, with :math:`Q` from the Normal distribution function.
Exact deletion, :math:`z = 0`, is not offered: the prior's density there is the width of its flat centre and nothing
else.

The published rule, drop a group when :math:`\ln\alpha_g` exceeds a threshold read off a histogram, is no change of
prior; it is the baseline ``log_alpha``, cut at the widest gap.  It is *not* variational dropout, whose scale-free prior
sits on every weight, nor the group horseshoe, whose prior on the scale is proper.

References:
    Louizos, Ullrich, Welling (2017), Bayesian compression for deep learning.
    Kingma, Salimans, Welling (2015), Variational dropout and the local reparameterization trick.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc.dists.normal_kl import sum_kl
from pyrobc.dists.scale_free import ScaleFree, constant_divergence, jeffreys_divergence, log_alpha, sigmoid_divergence
from pyrobc.errors import FamilyError, suggest
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
from pyrobc.meanfield import Factor, MeanFieldGuide, NormalFactor

__all__ = ["GroupNormalJeffreys"]

_DIVERGENCES = {"exact": jeffreys_divergence, "sigmoid": sigmoid_divergence}


class ScaleFactor(Factor):
    """Normal scales with a positive mean, started at one; both parameters are logarithms."""

    def __init__(self, like: Tensor, size: int, low: float, high: float, log_scale: float, lr_scale: float) -> None:
        super().__init__()
        self.low, self.high, self.lr_scale = low, high, lr_scale
        self.log_loc = nn.Parameter(like.new_zeros(size))
        self.log_scale = nn.Parameter(like.new_full((size,), log_scale))

    def law(self) -> dist.Normal:
        """Independent scales, batch shape ``[groups]``."""
        return dist.Normal(self.log_loc.exp(), self.log_scale.exp(), validate_args=False)

    def distribution(self) -> Distribution:
        """All scales of a block as one site."""
        joint: Distribution = self.law().to_event(1)
        return joint

    def project_(self) -> None:
        """Keep the posterior between the ends of the prior, where the KL is the declared one, and alpha a number."""
        self.log_scale.data.clamp_(self.low + 6.0, self.high - 3.0)
        self.log_loc.data.clamp_(self.low, self.high - 1.0)


class GroupNormalJeffreys(Family):
    """Group normal-Jeffreys with Normal weights.

    Args:
        divergence: ``exact``, or ``sigmoid`` for the published approximation; Pyro's own ELBO takes the exact one.
        low: log of the scale below which the prior is flat.
        high: log of the scale above which its tails fall off.
        initial_log_scale: where log standard deviations of weights and scales start (the paper's log variance -9).
        max_scale: largest standard deviation of the first layer's weights; None for no limit (published: 0.2 for
            784-300-100, 0.5 for LeNet-5).
        scale_lr: multiplier of the learning rate for the scales.
        num_draws: scale draws per minibatch, each for an equal run of examples; 0 draws one per example.
    """

    name = "group_normal_jeffreys"
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
            "kingma2015variational",
            "Kingma, Diederik P. and Salimans, Tim and Welling, Max",
            "Variational Dropout and the Local Reparameterization Trick",
            2015,
            "NeurIPS",
        ),
    )

    def __init__(
        self,
        divergence: Literal["exact", "sigmoid"] = "exact",
        low: float = -20.0,
        high: float = 20.0,
        initial_log_scale: float = -4.5,
        max_scale: float | None = None,
        scale_lr: float = 1.0,
        num_draws: int = 0,
    ) -> None:
        if divergence not in _DIVERGENCES:
            raise FamilyError(
                f"family {self.name!r}",
                got=f"divergence={divergence!r}",
                allowed=", ".join(_DIVERGENCES),
                fix=suggest(divergence, _DIVERGENCES),
            )
        if low > initial_log_scale - 6 or high < 3:
            raise FamilyError(
                f"family {self.name!r}",
                got=f"low={low}, high={high}",
                allowed=f"ends around the starting posterior: low <= {initial_log_scale - 6}, high >= 3",
                fix="take the defaults, low=-20 and high=20",
            )
        if max_scale is not None and max_scale <= 0:
            raise FamilyError(
                f"family {self.name!r}",
                got=f"max_scale={max_scale}",
                allowed="a positive number, or None for no limit",
                fix="the published values are 0.2 and 0.5",
            )
        self.divergence, self.low, self.high, self.max_scale = divergence, low, high, max_scale
        self.initial_log_scale, self.scale_lr, self.num_draws = initial_log_scale, scale_lr, num_draws

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Scale-free scales, Normal parameters."""
        laws: dict[str, Distribution] = {}
        for block in spec.blocks:
            low, high = like.new_full((block.size,), self.low), like.new_full((block.size,), self.high)
            laws[f"{block.name}.scale"] = ScaleFree(low, high, validate_args=False).to_event(1)
        for name, info in spec.parameters.items():
            laws[name] = normal_prior(info.shape, 1.0, like, loc=1.0 if info.kind == "scale" else 0.0)
        return laws

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Scales started near one, Normal parameters started at the network's, trained or not."""
        like = next(iter(start.values()))
        scales: dict[str, Factor] = {
            f"{b.name}.scale": ScaleFactor(like, b.size, self.low, self.high, self.initial_log_scale, self.scale_lr)
            for b in spec.blocks
        }
        first = spec.layers[0].weight
        normals = {
            name: NormalFactor(start[name], self.initial_log_scale, self.max_scale if name == first else None)
            for name in spec.parameters
        }
        return MeanFieldGuide(scales | normals)

    def combine(self, values: Mapping[str, Tensor], spec: GroupSpec) -> Effective:
        """Scales multiply what reads the group; weights are non-centred."""
        gates = {block.name: values[f"{block.name}.scale"] for block in spec.blocks}
        return Effective(gates, {name: values[name] for name in spec.parameters})

    def draw_local(self, laws: Laws, spec: GroupSpec, num_examples: int) -> Effective:
        """Scales per example, or per run of examples, all blocks at once; parameters stay means and variances."""
        scales = [laws[f"{block.name}.scale"].base_dist for block in spec.blocks]
        loc, scale = torch.cat([q.loc for q in scales]), torch.cat([q.scale for q in scales])
        draws = min(self.num_draws or num_examples, num_examples)
        noise = torch.randn(draws, len(loc), dtype=loc.dtype, device=loc.device)
        parts = torch.addcmul(loc, scale, noise).split([block.size for block in spec.blocks], dim=1)
        gates = {block.name: part for block, part in zip(spec.blocks, parts, strict=True)}
        normals = {name: laws[name].base_dist for name in spec.parameters}
        drawn = {n: q.rsample() for n, q in normals.items() if spec.parameters[n].kind in ("scale", "other")}
        means = {name: normal.loc for name, normal in normals.items()} | drawn
        variances = {n: q.variance for n, q in normals.items() if n not in drawn}
        return Effective(gates, means, variances)

    def kl(self, laws: Laws, priors: Laws) -> dict[str, Tensor]:
        """Scales of all blocks at once, by the chosen divergence; parameters by the registered Normal form."""
        scales = {n: law.base_dist for n, law in laws.items() if isinstance(priors[n].base_dist, ScaleFree)}
        loc, scale = (torch.cat([getattr(q, part) for q in scales.values()]) for part in ("loc", "scale"))
        flat = dist.Normal(loc, scale, validate_args=False)
        values = _DIVERGENCES[self.divergence](log_alpha(flat))
        parts = values.split([len(law.loc) for law in scales.values()])
        kls = {n: (p + constant_divergence(priors[n].base_dist)).sum() for n, p in zip(scales, parts, strict=True)}
        return kls | {n: sum_kl(law, priors[n]) for n, law in laws.items() if n not in scales}

    def mean(self, laws: Laws, spec: GroupSpec) -> Effective:
        """Mean scales and mean parameters; they are independent, so the product is the mean weight."""
        return self.combine({name: law.mean for name, law in laws.items()}, spec)

    def scales(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """The multiplier of a group is its scale, which has a sign."""
        names = {block.name: f"{block.name}.scale" for block in spec.blocks}
        return {b: GroupScale(laws[s].base_dist, priors[s].base_dist) for b, s in names.items()}

    def reduced(self) -> dict[str, ReducedPrior]:
        """The ROPE, on both sides of zero."""

        def rope(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return -threshold, threshold

        return {"rope": restrict_to("rope", rope)}

    def baselines(self) -> dict[str, Baseline]:
        """The published score, log of the scale's variance over its squared mean."""
        return {"log_alpha": Baseline("log_alpha", log_alpha, "log variance over squared mean")}

    def log_alpha(self, laws: Laws, spec: GroupSpec) -> dict[str, Tensor]:
        """The published score of every group, by block: log of the scale's variance over its squared mean."""
        return {block.name: log_alpha(laws[f"{block.name}.scale"].base_dist) for block in spec.blocks}
