r"""A target for the share of parameters that stay: one number as the budget of any method with gates.

With :math:`\gamma_g` the probability that group g is there and independent gates, the expected share of parameters is

.. math::
    \bar\gamma = \frac1P\sum_t |t| \prod_{a}\Big(\frac1{n_a}\sum_{i}\gamma_{g(i)}\Big),

over tensors t of :math:`|t|` numbers and their axes a of :math:`n_a` indices (an index that no group owns counts as
one): exact where no two axes of a tensor belong to one block.  The loss gets

.. math:: N\,\alpha\,|d - \bar\gamma| \quad\text{(nats)}

for N rows, a target d and a strength :math:`\alpha` in nats a row.  Its slope is constant on both sides of the target:
the optimum is *at* the target as long as a little more of the network would lower the rest of the loss by less than
:math:`\alpha` per unit of density and row, and otherwise stays above it.

Published (Zhang, Tao and Zhang 2023) for hard Gumbel-softmax gates on single weights, in place of any divergence, with
the mean of drawn gates, :math:`\alpha = 0.01` and :math:`d = 0`.  Here the density is that of parameters, which groups
do not share equally, it is an expectation, and the KL stays unless it is asked to go (``keeps_kl=False``, which is not
Bayesian): a reconstruction of the penalty, and its use beside a KL is this package's.  With the KL it is no ELBO: a
penalty on the guide's own probabilities belongs to no model, and evidence found later is that of the model without.

References:
    Zhang, Tao, Zhang (2023), Neural network pruning by gradient descent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyrobc.dists import SpikeAndSlab, TruncatedLogNormal
from pyrobc.errors import ConfigError, FamilyError
from pyrobc.groups import GroupSpec
from pyrobc.lift import LiftedModel
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.objective import Loss, fast_loss, split_laws

__all__ = ["TargetDensity", "expected_density"]


@dataclass(frozen=True)
class TargetDensity:
    """A loss that pulls the expected share of parameters to a target: ``fit(..., path=TargetDensity(0.1))``.

    Args:
        target: share of the parameters.  Cut when the fit is over: gates that leave while others are on their way
            down take the density below its target for good.
        strength: of the pull, in nats a row and unit of density.
        keeps_kl: whether the KL stays, which has a pull of its own.
    """

    target: float
    strength: float = 1.0
    keeps_kl: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.target <= 1 and self.strength > 0):
            raise ConfigError(
                "target density", got=f"target={self.target}, strength={self.strength}",
                allowed="a share from 0 to 1, and a positive strength", fix="pass TargetDensity(0.1), for instance",
            )  # fmt: skip

    def __call__(self, model: LiftedModel, guide: MeanFieldGuide, num_data: int) -> Loss:
        """The loss of ``fit``."""
        base = fast_loss(model, guide, num_data)
        expected_density(model, guide)  # refuses a family without gates before the first step

        def loss(inputs: Any, targets: Tensor, temperature: float) -> Tensor:
            away = (expected_density(model, guide) - self.target).abs()
            return base(inputs, targets, temperature if self.keeps_kl else 0.0) + num_data * self.strength * away

        return loss


def expected_density(model: LiftedModel, guide: MeanFieldGuide) -> Tensor:
    """Expected share of trainable parameters, with its gradient.

    Raises:
        FamilyError: the family's groups have no gates that gradients reach.
    """
    family, spec = model.family, model.spec
    own, _ = split_laws(model, guide.distributions())
    found = {}
    for name, scale in family.presence(own, family.prior(spec, model.anchor), spec).items():
        law = scale.posterior
        if isinstance(law, SpikeAndSlab):
            found[name] = torch.sigmoid(law.log_odds)
        elif isinstance(law, TruncatedLogNormal) and law.mean.requires_grad:
            found[name] = law.mean  # a gate between nothing and one
        elif isinstance(law, torch.distributions.Bernoulli) and law.probs.requires_grad:
            found[name] = law.probs
        else:
            raise FamilyError(
                f"family {family.name!r} with a target density", got=f"a presence of law {type(law).__name__}",
                allowed="gates whose probability of being open is trained",
                fix="fit spike_and_slab_horseshoe, log_uniform or gumbel_softmax, or give decide a budget",
            )  # fmt: skip
    return _share(spec, found)


def _share(spec: GroupSpec, present: dict[str, Tensor]) -> Tensor:
    """Parameters expected to stay over all there are."""
    axes: dict[tuple[str, int], Tensor] = {}
    for block in spec.blocks:
        for member in block.members:
            if member.parameter not in spec.parameters:
                continue
            key, length = (member.parameter, member.axis), spec.tensors[member.parameter][member.axis]
            owner = torch.as_tensor(member.group_of_index(), device=present[block.name].device)
            lost = (1 - present[block.name][owner]).sum() / length
            axes[key] = axes.get(key, torch.ones_like(lost)) - lost
    total = sum(prod(info.shape) for info in spec.parameters.values())
    share: Any = 0.0
    for name, info in spec.parameters.items():
        kept: Any = 1.0
        for axis in range(len(info.shape)):
            kept = kept * axes.get((name, axis), 1.0)
        share = share + kept * (prod(info.shape) / total)
    return share  # type: ignore[no-any-return]
