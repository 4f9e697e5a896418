r"""Gumbel-softmax gates: a hard gate on every group, learned through its relaxation; weights are points.

Published, on every weight and without a posterior: two logits a gate, a draw of the hard Gumbel-softmax of temperature
3 forwards and the gradient of its relaxation backwards, and a loss of

.. math:: \text{loss}(y, f(x; w\,g)) + \alpha\,\big|d - \text{mean}(g)\big|

with a target density d, 0 in the authors' tutorial.  The first of two softmax components of temperature T over logits
:math:`l_1, l_0` with Gumbel noise is :math:`\sigma((l_1 - l_0 + \text{logit}\,u)/T)` for a uniform u, the difference of
two Gumbel variables being logistic: it is the binary concrete gate of ``dists.switch`` with log odds :math:`l_1 - l_0`.

Here gates are on groups, and the same gates have a prior,

.. math::
    z_g \sim \text{Bernoulli}(\lambda), \qquad w \sim N(0, \sigma_w^2), \qquad h_g \mapsto z_g h_g
    \text{ where group } g \text{ is read},

with :math:`q(z_g) = \text{Bernoulli}(\gamma_g)` and point weights: what ``fit`` minimises by default is the ELBO,

.. math::
    KL = \sum_g\Big[\gamma_g\ln\frac{\gamma_g}\lambda + (1 - \gamma_g)\ln\frac{1-\gamma_g}{1-\lambda}\Big] - \ln p(w).

The published baseline is ``fit(..., path=TargetDensity(target, keeps_kl=False))`` (``pyrobc.density``), which is not
Bayesian: the KL is left out, weight decay too, and the density counts parameters, in expectation, where the paper draws
gates a second time.

Reduction ``closed``: the gate is closed, :math:`\Delta F = \ln\frac{1-\gamma}{1-\lambda}`, whose posterior odds are the
odds of the gate: a group leaves where :math:`\gamma < \tfrac12`, the published choice of the larger logit.

What is the paper's: the relaxation with its temperature, hard draws, the penalty, the rule.  What is not: gates on
groups and where these are read, one draw per example, where gates start, the prior, and every other setting.  A
**reconstruction**, then, for comparison with families that have a posterior.

It is *not* a spike-and-slab with a Normal slab (``spike_and_slab``): an open group's weights are points.

References:
    Zhang, Tao, Zhang (2023), Neural network pruning by gradient descent.
    Jang, Gu, Poole (2017), Categorical reparameterization with Gumbel-softmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.dists import Switch
from pyrobc.dists.switch import switch_on
from pyrobc.errors import FamilyError
from pyrobc.family import Effective, Family, GroupScale, Laws, ReducedPrior, Reference, normal_prior
from pyrobc.gated import SwitchFactor
from pyrobc.groups import GroupSpec
from pyrobc.meanfield import Factor, MeanFieldGuide, PointFactor

__all__ = ["GumbelSoftmax"]


class GumbelSoftmax(Family):
    """Bernoulli gates and point weights.

    Args:
        inclusion: prior probability that a group is in.
        weight_scale: standard deviation of the Normal prior of weights and biases.
        temperature: of the relaxed gate that gradients see (published: 3).
        gate_lr: multiplier of the learning rate for gates.
        num_draws: draws of gates per minibatch, each for an equal run of examples; 0 draws one per example.
    """

    name = "gumbel_softmax"
    posterior_on = "gate"
    default_reduction = "closed"
    references = (
        Reference(
            "zhang2023neural",
            "Zhang, Zhang and Tao, Ruyi and Zhang, Jiang",
            "Neural Network Pruning by Gradient Descent",
            2023,
            "arXiv",
            "https://arxiv.org/abs/2311.12526",
        ),
    )

    def __init__(
        self,
        inclusion: float = 0.002,
        weight_scale: float = 1.0,
        temperature: float = 3.0,
        gate_lr: float = 1.0,
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
        self.gate_lr, self.num_draws = gate_lr, num_draws

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Logistic switches, Normal parameters."""
        laws: dict[str, Distribution] = {
            f"{block.name}.gate": self._prior_gate(like.new_zeros(block.size)).to_event(1) for block in spec.blocks
        }
        for name, info in spec.parameters.items():
            laws[name] = normal_prior(info.shape, self.weight_scale, like, loc=1.0 if info.kind == "scale" else 0.0)
        return laws

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Open gates, point parameters."""
        like = next(iter(start.values()))
        factors: dict[str, Factor] = {
            f"{block.name}.gate": SwitchFactor(self._prior_gate(like.new_zeros(block.size)), self.gate_lr)
            for block in spec.blocks
        }
        return MeanFieldGuide(factors | {name: PointFactor(start[name]) for name in spec.parameters})

    def combine(self, values: Mapping[str, Tensor], spec: GroupSpec) -> Effective:
        """The multiplier of a group is its gate."""
        gates = {block.name: switch_on(values[f"{block.name}.gate"]) for block in spec.blocks}
        return Effective(gates, {name: values[name] for name in spec.parameters})

    def draw_local(self, laws: Laws, spec: GroupSpec, num_examples: int) -> Effective:
        """Gates per example, or per run of examples."""
        draws = torch.Size([min(self.num_draws or num_examples, num_examples)])
        values = {f"{b.name}.gate": laws[f"{b.name}.gate"].rsample(draws) for b in spec.blocks}
        return self.combine(values | {name: laws[name].v for name in spec.parameters}, spec)

    def mean(self, laws: Laws, spec: GroupSpec) -> Effective:
        """Probabilities of open gates, point parameters."""
        gates = {b.name: torch.sigmoid(laws[f"{b.name}.gate"].base_dist.log_odds) for b in spec.blocks}
        return Effective(gates, {name: laws[name].v for name in spec.parameters})

    def scales(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """Bernoulli multipliers."""
        found = {}
        for block in spec.blocks:
            odds = laws[f"{block.name}.gate"].base_dist.log_odds
            prior = dist.Bernoulli(logits=self._prior_gate(odds).log_odds, validate_args=False)
            found[block.name] = GroupScale(dist.Bernoulli(logits=odds, validate_args=False), prior)
        return found

    def reduced(self) -> dict[str, ReducedPrior]:
        """The closed gate."""

        def closed(prior: Distribution, threshold: Tensor) -> Distribution:
            law: Distribution = dist.Bernoulli(logits=torch.full_like(threshold, -torch.inf), validate_args=False)
            return law

        def event(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full_like(threshold, -torch.inf), torch.full_like(threshold, 0.5)

        return {"closed": ReducedPrior("closed", closed, event)}

    def _prior_gate(self, like: Tensor) -> Switch:
        log_odds = torch.full_like(like, math.log(self.inclusion) - math.log1p(-self.inclusion))
        return Switch(log_odds, log_odds, self.temperature, validate_args=False)
