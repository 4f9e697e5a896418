r"""Log-uniform gates: truncated log-normal multiplicative noise on every group (SBP), priced by BMR (BMRS).

Prior, over the gate :math:`\theta_g` of every group and every weight of the network:

.. math::
    \ln\theta_g \sim U[a, b],\quad a=-20,\ b=0, \qquad w_{ij} \sim N(0, \sigma_w^2), \qquad
    h_g \mapsto \theta_g h_g \ \text{where group } g \text{ is read.}

Guide: :math:`q(\ln\theta_g)` is :math:`N(\mu_g, \sigma_g^2)` truncated to :math:`[a, b]`, with :math:`\mu_g` projected
onto :math:`[a, b]`; weights are points (maximum a posteriori given the gates).  With
:math:`\alpha=(a-\mu)/\sigma,\ \beta=(b-\mu)/\sigma,\ Z=\Phi(\beta)-\Phi(\alpha)`, in nats per gate,

.. math::
    KL = \ln(b-a) - \ln\sigma - \tfrac12\ln(2\pi e) - \ln Z - \frac{\alpha\phi(\alpha)-\beta\phi(\beta)}{2Z}.

The weights' prior is part of the method: without it the weights grow and undo the gates, and the scale of a gate means
nothing.  Gates act after the nonlinearity, so a gate of zero is a removed unit and leaves no constant behind.

Reduced priors of a gate:

* ``rope``: the prior restricted to ``theta < threshold``; :math:`\Delta F = \ln Q - \ln P` of that event;
* ``spike``: all mass at :math:`e^{a}`; :math:`\Delta F = \ln q_x(a)(b-a)`, the limit of BMRS_N as its width goes to 0;
* ``uniform8``, ``uniform4``: log-uniform on :math:`[2^{-23}, 2^{-8}]`, :math:`[2^{-23}, 2^{-4}]` (BMRS_U).  As
  published, gates below :math:`2^{-23}` lie outside and count as needed; ``below8`` and ``below4`` count them in.  The
  published rule :math:`Q \ge P` is ``prior_odds="none"``; implied prior odds ask for :math:`Q > 1/2`.

The released code of BMRS leaves :math:`2\pi` out of the spike's :math:`\Delta F` and so prunes from
:math:`-\tfrac12\ln 2\pi = -0.919` nats up: it decides as if every group were needless with prior odds
:math:`\sqrt{2\pi} : 1`, which ``prior_odds=RELEASED_PROBABILITY`` repeats.  It also weighs the KL otherwise: it adds to
the mean negative log likelihood a row the mean over blocks of the mean KL over groups, where the ELBO divides the sum
by the number of rows N.  With L blocks that is a weight of :math:`N / (L n_b)` on the gates of a block of
:math:`n_b` groups: ``kl_scale="mean"``.  Scores are then Bayes factors of a tempered likelihood, and depend on how many
groups a block has.

It is *not* variational dropout (whose improper log-uniform prior has no Bayes factor), nor a spike-and-slab: gates
shrink, and the decision to remove one is taken afterwards.

References:
    Neklyudov, Molchanov, Ashukha, Vetrov (2017), Structured Bayesian pruning via log-normal multiplicative noise.
    Wright, Igel, Selvan (2024), BMRS: Bayesian model reduction for structured pruning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc.dists import TruncatedLogNormal, TruncatedLogUniform
from pyrobc.dists.gate_noise import draw_gates, gate_kl
from pyrobc.dists.normal_kl import sum_kl
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
from pyrobc.meanfield import Factor, MeanFieldGuide, PointFactor

__all__ = ["RELEASED_PROBABILITY", "LogUniform"]

RELEASED_PROBABILITY = math.sqrt(2 * math.pi) / (1 + math.sqrt(2 * math.pi))
"""Prior probability of the spike with which posterior odds decide as the released code of BMRS does."""


class GateFactor(Factor):
    """Truncated log-normal gates, started close to one."""

    def __init__(self, like: Tensor, size: int, low: float, high: float, log_scale: float, lr_scale: float) -> None:
        super().__init__()
        self.low, self.high, self.lr_scale = low, high, lr_scale
        self.loc = nn.Parameter(like.new_full((size,), high))
        self.log_scale = nn.Parameter(like.new_full((size,), log_scale))

    def law(self) -> TruncatedLogNormal:
        """Independent gates, batch shape ``[groups]``."""
        return TruncatedLogNormal(self.loc, self.log_scale.exp(), self.low, self.high, validate_args=False)

    def distribution(self) -> Distribution:
        """All gates of a block as one site."""
        joint: Distribution = self.law().to_event(1)
        return joint

    def project_(self) -> None:
        """Keep the location on the support and the scale where float32 represents it."""
        self.loc.data.clamp_(self.low, self.high)
        self.log_scale.data.clamp_(-20.0, 5.0)


class LogUniform(Family):
    """Log-uniform gates with Normal weights.

    Args:
        low: lower end of the support of the log gate.
        high: upper end.
        weight_scale: standard deviation of the Normal prior of weights and biases.
        initial_log_scale: where the gates' log standard deviation starts.
        gate_lr: multiplier of the learning rate for gates.
        num_draws: noise draws per minibatch, each for an equal run of examples; 0 draws one per example.
        kl_scale: ``elbo``, or ``mean`` for the weights of the released code of BMRS.
    """

    name = "log_uniform"
    posterior_on = "gate"
    references = (
        Reference(
            "neklyudov2017structured",
            "Neklyudov, Kirill and Molchanov, Dmitry and Ashukha, Arsenii and Vetrov, Dmitry",
            "Structured Bayesian Pruning via Log-Normal Multiplicative Noise",
            2017,
            "NeurIPS",
        ),
        Reference(
            "wright2024bmrs",
            "Wright, Dustin and Igel, Christian and Selvan, Raghavendra",
            "BMRS: Bayesian Model Reduction for Structured Pruning",
            2024,
            "NeurIPS",
        ),
    )

    def __init__(
        self,
        low: float = -20.0,
        high: float = 0.0,
        weight_scale: float = 1.0,
        initial_log_scale: float = -5.0,
        gate_lr: float = 1.0,
        num_draws: int = 0,
        kl_scale: Literal["elbo", "mean"] = "elbo",
    ) -> None:
        if not low < high or weight_scale <= 0 or kl_scale not in ("elbo", "mean"):
            raise FamilyError(
                f"family {self.name!r}",
                got=f"low={low}, high={high}, weight_scale={weight_scale}, kl_scale={kl_scale!r}",
                allowed="low < high, weight_scale > 0, and kl_scale 'elbo' or 'mean'",
                fix="the published support is low=-20, high=0",
            )
        self.low, self.high, self.weight_scale = low, high, weight_scale
        self.initial_log_scale, self.gate_lr = initial_log_scale, gate_lr
        self.num_draws, self.kl_scale = num_draws, kl_scale

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Log-uniform gates, Normal parameters."""
        laws: dict[str, Distribution] = {}
        for block in spec.blocks:
            low, high = like.new_full((block.size,), self.low), like.new_full((block.size,), self.high)
            laws[f"{block.name}.gate"] = TruncatedLogUniform(low, high, validate_args=False).to_event(1)
        for name, info in spec.parameters.items():
            laws[name] = normal_prior(info.shape, self.weight_scale, like, loc=1.0 if info.kind == "scale" else 0.0)
        return laws

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Truncated log-normal gates, point parameters."""
        like = next(iter(start.values()))
        factors: dict[str, Factor] = {
            f"{b.name}.gate": GateFactor(like, b.size, self.low, self.high, self.initial_log_scale, self.gate_lr)
            for b in spec.blocks
        }
        return MeanFieldGuide(factors | {name: PointFactor(start[name]) for name in spec.parameters})

    def combine(self, values: Mapping[str, Tensor], spec: GroupSpec) -> Effective:
        """Gates and parameters are the sites themselves."""
        gates = {block.name: values[f"{block.name}.gate"] for block in spec.blocks}
        return Effective(gates, {name: values[name] for name in spec.parameters})

    def draw_local(self, laws: Laws, spec: GroupSpec, num_examples: int) -> Effective:
        """Gates drawn per example, or per run of examples; all blocks at once."""
        draws = min(self.num_draws or num_examples, num_examples)
        flat = _flatten([laws[f"{block.name}.gate"].base_dist for block in spec.blocks])
        gates = draw_gates(*flat, self.low, self.high, draws)
        parts = gates.split([block.size for block in spec.blocks], dim=1)
        values = {f"{block.name}.gate": part for block, part in zip(spec.blocks, parts, strict=True)}
        return self.combine(values | {name: laws[name].v for name in spec.parameters}, spec)

    def kl(self, laws: Laws, priors: Laws) -> dict[str, Tensor]:
        """Gates of all blocks at once, in the dtype of training; parameters by their log prior."""
        gates = {name: law.base_dist for name, law in laws.items() if name.endswith(".gate")}
        flat = gate_kl(*_flatten(list(gates.values())), self.low, self.high)
        parts = flat.split([len(gate.loc) for gate in gates.values()])
        kls = {name: part.sum() for name, part in zip(gates, parts, strict=True)}
        return kls | {n: sum_kl(law, priors[n]) for n, law in laws.items() if n not in gates}

    def mean(self, laws: Laws, spec: GroupSpec) -> Effective:
        """Mean gates, point parameters."""
        return self.combine({name: law.mean for name, law in laws.items()}, spec)

    def scales(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """The multiplier of a group is its gate."""
        names = {block.name: f"{block.name}.gate" for block in spec.blocks}
        return {b: GroupScale(laws[s].base_dist, priors[s].base_dist) for b, s in names.items()}

    def reduced(self) -> dict[str, ReducedPrior]:
        """ROPE, spike and the two published uniform reductions."""

        def spike(prior: Distribution, threshold: Tensor) -> Distribution:
            return dist.Delta(torch.full_like(threshold, math.exp(self.low)))

        def rope(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(threshold), threshold

        def between(label: str, lower: float, upper: float) -> ReducedPrior:
            def event(threshold: Tensor) -> tuple[Tensor, Tensor]:
                return torch.full_like(threshold, lower), torch.full_like(threshold, upper)

            return restrict_to(label, event)

        reductions = [restrict_to("rope", rope), ReducedPrior("spike", spike)]
        for bits in (8, 4):
            reductions += [between(f"uniform{bits}", 2.0**-23, 2.0**-bits), between(f"below{bits}", 0.0, 2.0**-bits)]
        return {reduction.label: reduction for reduction in reductions}

    def baselines(self) -> dict[str, Baseline]:
        """The published signal-to-noise ratio and mean gate, turned over so that larger says prune."""

        def log_noise(law: Any) -> Tensor:
            return torch.as_tensor(-2.0 * torch.log(law.snr))

        def log_closure(law: Any) -> Tensor:
            return torch.as_tensor(-law.log_moment(1))

        return {
            "log_noise": Baseline("log_noise", log_noise, "log variance over squared mean", published_cut=0.0),
            "log_closure": Baseline("log_closure", log_closure, "minus log mean gate", published_cut=math.log(10.0)),
        }

    def kl_weights(self, spec: GroupSpec, num_data: int) -> dict[str, float]:
        """One number per block of gates where the KL is averaged over groups and blocks."""
        if self.kl_scale == "elbo":
            return {}
        return {f"{b.name}.gate": num_data / (len(spec.blocks) * b.size) for b in spec.blocks}


def _flatten(gates: list[TruncatedLogNormal]) -> tuple[Tensor, Tensor]:
    return torch.cat([g.loc for g in gates]), torch.cat([g.scale for g in gates]).log()
