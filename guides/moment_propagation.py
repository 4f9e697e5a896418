r"""Self-compression by moment propagation (extended VI): one variance for each kernel, trained without draws.

Prior and guide, for the weights :math:`w_k \in R^d` of every kernel (or linear unit) and every bias:

.. math::
    w_k \sim N(0, I_d), \quad b_k \sim N(0, 1), \qquad q(w_k) = N(M_k, \sigma_k^2 I_d), \quad q(b_k) = N(m_k, s_k^2),

in nats for each kernel

.. math::
    KL_k = \tfrac12\big(d\,\sigma_k^2 + \|M_k\|^2 - d - d\ln\sigma_k^2\big).

``fit`` takes the expected log likelihood from the mean and covariance that the network passes on from layer to layer
(``pyrobc.propagation``, ``pyrobc.moment_loss``), instead of draws.  A kernel that the data have no use for tends to
:math:`M_k = 0`, but its variance is noise for what reads it; the network is to find out which kernels it can do
without, by fewer of them leaving zero.  There are no gates: a group *is* the weights that produce it (its kernel and
bias; of an input feature, the weights that read it), and its multiplier is their length along their posterior mean,

.. math::
    u_g = e_g^\top w_g, \quad e_g = E[w_g]/\|E[w_g]\|: \qquad
    q(u_g) = N\big(\|E[w_g]\|,\; \textstyle\sum_i e_{gi}^2 s_i^2\big), \quad p(u_g) = N(0, 1).

What is deployed is :math:`E[u_g]\,e_g`, and what it contributes is proportional to that (for ReLU networks).

Reduced priors of a group:

* ``rope``: the prior restricted to :math:`|u_g| < \text{threshold}`; the direction is that of the posterior;
* ``spike``: all the group's weights at zero.  :math:`\Delta F = \ln q(w_g = 0) - \ln p(w_g = 0)`, for a kernel alone
  :math:`-\tfrac d2\ln\sigma_k^2 - \|M_k\|^2/2\sigma_k^2`: exact, and without implied prior odds.

Baseline ``kernel_norm``: the published ranking by the norm of the mean kernel, here :math:`-\ln\|E[w_g]\|`, cut at the
widest gap.

What is whose.  From the paper's abstract and summaries of it, the text itself not having been at hand: kernels are
ranked by the Frobenius norm of their mean, and the network is trained again with those that are left.  From the
authors' public code for the same variational family, *not* for self-compression, whose code was not found: the prior,
one variance a kernel, first-order propagation with its rules for pooling and softmax, the Gaussian density of one-hot
targets (``MomentLoss(density="gaussian")``), and the variance that a fit starts from.  Ours: the parameter is the
logarithm of the standard deviation, where theirs is a softplus of the variance; the bias counts as one more weight of
its kernel; covariances are full or diagonal everywhere, where the code mixes the two; KLs are summed over kernels and
weighed against the summed log likelihood, where the code averages both, differently; the default log likelihood; both
reduced priors; and the automatic cut.

It is *not* variational dropout, nor a scale mixture: no prior mass sits near zero, and no hyper-parameter asks for
sparsity.

References:
    Carannante, Dera, Rasool, Bouaynaya (2021), Self-compression in Bayesian neural networks.
    Dera, Bouaynaya, Rasool, Shterenberg, Fathallah-Shaykh (2021), PremiUm-CNN: propagating uncertainty towards robust
    convolutional neural networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc.bmr import Reduction, register_reduction
from pyrobc.errors import FamilyError, ReductionError
from pyrobc.family import (
    Baseline,
    GroupScale,
    Laws,
    ReducedPrior,
    Reference,
    UngatedFamily,
    normal_prior,
    restrict_to,
)
from pyrobc.groups import Block, GroupSpec, Member
from pyrobc.meanfield import MeanFieldGuide, NormalFactor

__all__ = ["KernelFactor", "KernelLength", "MomentPropagation"]

_SMALLEST_NORM = 1e-15


class KernelFactor(NormalFactor):
    """Normals with one scale for each row: ``log_scale`` has shape ``[rows, 1, ...]``."""

    def __init__(self, loc: Tensor, log_scale: float) -> None:
        super().__init__(loc, log_scale)
        shape = (len(loc), *(1,) * (loc.dim() - 1))
        self.log_scale = nn.Parameter(loc.new_full(shape, log_scale))


class KernelLength(dist.Normal):
    """Law of the length of a group's weights along a direction, with the density of them all at zero.

    Args:
        loc: mean length.
        scale: its standard deviation.
        log_zero: log density of the group's weights, all of them, at zero.
    """

    def __init__(self, loc: Tensor, scale: Tensor, log_zero: Tensor) -> None:
        super().__init__(loc, scale, validate_args=False)
        self.log_zero = log_zero


@register_reduction(KernelLength, KernelLength, dist.Delta)
def delete_kernel(q: KernelLength, p: KernelLength, reduced: dist.Delta) -> Reduction:
    """Savage-Dickey ratio of all the group's weights at zero."""
    if bool((reduced.v != 0).any()):
        raise ReductionError(
            "reduced prior of a group's weights", got="a point other than zero",
            allowed="zero, which deletes the group", fix="pass Delta(0.0)",
        )  # fmt: skip
    return Reduction(q.log_zero - p.log_zero, reduced)


class MomentPropagation(UngatedFamily):
    """Normal weights with one variance for each kernel.

    Args:
        prior_scale: standard deviation of the prior of weights and biases (the authors' related code: 1).
        initial_variance: where the variances start (the authors' related code: softplus(-2.2) = 0.105).
    """

    name = "moment_propagation"
    path = "moments"
    references = (
        Reference(
            "carannante2021self",
            "Carannante, Giuseppina and Dera, Dimah and Rasool, Ghulam and Bouaynaya, Nidhal C.",
            "Self-Compression in Bayesian Neural Networks",
            2021,
            "arXiv",
            "https://arxiv.org/abs/2111.05950",
        ),
    )

    def __init__(self, prior_scale: float = 1.0, initial_variance: float = 0.105) -> None:
        if not (prior_scale > 0 and initial_variance > 0):
            raise FamilyError(
                f"family {self.name!r}",
                got=f"prior_scale={prior_scale}, initial_variance={initial_variance}",
                allowed="positive numbers",
                fix="leave them out for the defaults",
            )
        self.prior_scale, self.initial_variance = prior_scale, initial_variance

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Normal parameters."""
        return {
            name: normal_prior(info.shape, self.prior_scale, like, loc=1.0 if info.kind == "scale" else 0.0)
            for name, info in spec.parameters.items()
        }

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Normals at the network's parameters, one variance for each row of a weight and for each other parameter."""
        log_scale = 0.5 * math.log(self.initial_variance)
        kinds = {"weight": KernelFactor}
        return MeanFieldGuide(
            {n: kinds.get(info.kind, NormalFactor)(start[n], log_scale) for n, info in spec.parameters.items()}
        )

    def presence(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """What says whether a group is there is the length of its weights along their posterior mean."""
        return {block.name: self._measure_lengths(block, laws, priors, spec) for block in spec.blocks}

    def reduced(self) -> dict[str, ReducedPrior]:
        """The ROPE, on both sides of zero, and deletion."""

        def rope(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return -threshold, threshold

        def spike(prior: Distribution, threshold: Tensor) -> Distribution:
            return dist.Delta(torch.zeros_like(threshold))

        return {"rope": restrict_to("rope", rope), "spike": ReducedPrior("spike", spike)}

    def baselines(self) -> dict[str, Baseline]:
        """The published ranking, turned over so that larger says prune."""

        def kernel_norm(law: KernelLength) -> Tensor:
            return -law.loc.clamp_min(_SMALLEST_NORM).log()

        return {"kernel_norm": Baseline("kernel_norm", kernel_norm, "negative log norm of the mean kernel")}

    def _measure_lengths(self, block: Block, laws: Laws, priors: Laws, spec: GroupSpec) -> GroupScale:
        like = next(iter(laws.values())).mean
        totals = list(like.new_zeros(5, block.size))
        for member in _find_kernels(block, spec):
            q, p = (law[member.parameter].base_dist for law in (laws, priors))
            squares, zero = q.loc.square(), torch.zeros_like(q.loc)
            shares = squares + _SMALLEST_NORM**2  # where the mean is zero any direction is as good
            index = torch.as_tensor(member.indices).sort().values.to(like.device)
            owner = torch.as_tensor(member.group_of_index()).to(like.device)
            parts = (squares, shares, shares * q.variance, q.log_prob(zero), p.log_prob(zero))
            lines = (part.transpose(0, member.axis).flatten(1).sum(1) if part.dim() > 1 else part for part in parts)
            totals = [total.index_add(0, owner, line[index]) for total, line in zip(totals, lines, strict=True)]
        power, weight, spread, log_q, log_p = totals
        scale = torch.where(weight > 0, spread / weight, self.prior_scale**2).sqrt()  # no weights: nothing was learned
        prior_scale = torch.full_like(scale, self.prior_scale)
        prior = KernelLength(torch.zeros_like(scale), prior_scale, log_p)
        return GroupScale(KernelLength(power.sqrt(), scale, log_q), prior, power.sqrt())


def _find_kernels(block: Block, spec: GroupSpec) -> list[Member]:
    """The trained weights and biases that produce a block; of input features, the weights that read them."""
    trained = [m for m in block.members if m.parameter in spec.parameters]
    made = [m for m in trained if m.role == "produce" and spec.parameters[m.parameter].kind in ("weight", "bias")]
    return made or ([m for m in trained if m.role == "consume"] if block.is_input else [])
