r"""Turbo-VBI: Markov supports along each neuron's weights, Gamma precisions, Normal weights; messages in closed form.

Prior of a weight tensor, three layers, along the chains that ``dists.scan`` lays through it:

.. math::
    s_1 \sim B(\lambda), \quad P(s_{n+1}{=}1|s_n{=}0) = p_{01}, \quad P(s_{n+1}{=}0|s_n{=}1) = p_{10}, \qquad
    \rho_n|s_n \sim \begin{cases}\text{Gamma}(a, b) & s_n = 1\\ \text{Gamma}(\bar a, \bar b) & s_n = 0\end{cases},
    \qquad w_n \sim N(0, 1/\rho_n),

rates :math:`b, \bar b`, with :math:`\bar a/\bar b \gg a/b`: an inactive weight is near zero, and active ones come in
runs of mean length :math:`1/p_{10}`.  Biases are :math:`N(0, 1)`.  In the Pyro model supports and precisions are summed
out (``dists.chained_student_t``), so every site is continuous.

Guide: :math:`q(w_n) = N(\mu_n, v_n)` by gradients, and :math:`q(\rho, s)` in closed form, where no parameter is
trained: precisions at every evaluation, supports by a pass of sum-product messages every ``every`` steps, transitions
by the M-step of EM before each pass.  With :math:`h_n = \tfrac12(\mu_n^2 + v_n)`, block ``joint``, in nats,

.. math::
    KL = -\tfrac12\sum_n(1+\ln v_n) - \sum_n\big[\gamma_n\ln g_1(h_n) + (1-\gamma_n)\ln g_0(h_n)\big]
    + \sum_n\gamma_n\ell_n - \ln Z(\ell), \qquad \ln\frac{\gamma_n}{1-\gamma_n} = \ln\frac{\pi_n}{1-\pi_n} + \ell_n,

:math:`\ell_n` being the evidence at the last pass and :math:`\pi_n` the extrinsic reply of the chain.  It is the KL of
all three layers, so it bounds that of the weights (``kl_is_bound``), and every move is coordinate ascent on one ELBO:
the derivation is in ``dists.chained_student_t``.  Transitions are held by the guide, which learns them; the Pyro model
keeps those of the settings.  Block ``factorised`` is :math:`q(s)q(\rho)`, the published form: it has two optima, and
is started from the evidence of the joint block.

Decisions: a weight is inactive where :math:`\gamma_n < \tfrac12` (``prune_weights``); a group, whose *presence* is 0 or
1, leaves where the probability that any weight reads it is below one half, the posterior odds under the reduced prior
``absent``, :math:`\Delta F = \ln q(0) - \ln p(0)`.  A unit that is read but has no active input emits a constant;
``remove_dead_units`` folds it into the next bias.  Order matters to a chain: a cut makes neighbours of what was apart.

``mask_bits`` is the code length of the decided mask under a Markov chain and under independent bits.  The coded file
does not use the chain: its adaptive mixture has the nearest entries as features, and codes the masks that chains leave
on MNIST as short (``benchmarks.turbo_vbi`` compares).

Which is whose.  Prior, Gamma form, alternation of modules and goals are the published method's; no code of it was
found, its successor's is public.  There, constants of complex signals stand where real weights have one half, evidence
is multiplied in twice where it is passed extrinsically here, and the lattice has two dimensions.  The joint block, EM,
trained variances, the defaults of every setting and the rule at one half are this file's, not the paper's settings.

It is *not* a spike-and-slab (inactive weights have a narrow law, not a point), nor group sparsity.

References:
    Xia, Tsang, Lau (2023), Structured Bayesian compression for deep neural networks based on the turbo-VBI approach.
    Liu, Liu, Lian, Lau, Zhao (2020), Robust recovery of structured sparse signals with uncertain sensing matrix: a
    turbo-VBI approach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.dists import (
    BinaryChain,
    ChainedStudentT,
    FactorisedPair,
    GammaPair,
    Rates,
    SupportedNormal,
    count_bits,
)
from pyrobc.dists.scan import Walk, from_chains, to_chains
from pyrobc.errors import FamilyError
from pyrobc.family import GroupScale, Laws, ReducedPrior, Reference, UngatedFamily, normal_prior
from pyrobc.groups import GroupSpec, Member
from pyrobc.meanfield import Factor, MeanFieldGuide, NormalFactor

__all__ = ["TurboVBI"]

Structure = Literal["chain", "independent"]
Block = Literal["joint", "factorised"]
_SMALLEST_RATE = 1e-4
_LEAST, _MOST = -80.0, 700.0  # log odds whose probabilities are numbers


class SupportedFactor(NormalFactor):
    """Normal weights, with the evidence for their supports and the transitions, which messages and EM set."""

    start: Tensor
    enter: Tensor
    leave: Tensor
    evidence: Tensor
    steps: Tensor

    def __init__(
        self, loc: Tensor, scale: float, prior: ChainedStudentT, pair: GammaPair, learns: Structure | None, every: int
    ) -> None:
        super().__init__(loc, math.log(scale))
        self.pair, self.walk, self.learns, self.every = pair, prior.walk, learns, every
        for name, rate in prior.rates._asdict().items():
            self.register_buffer(name, rate.clone())
        h = 0.5 * (self.loc.detach().square() + scale**2)
        self.register_buffer("evidence", GammaPair.log_odds(pair, h, h))  # the joint block's, for the factorised too
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=loc.device))
        self._known: tuple[Tensor, int, BinaryChain] | None = None

    def distribution(self) -> Distribution:
        """Normals, with the supports as messages last left them."""
        base: Any = super().distribution()
        return SupportedNormal(base.base_dist, self.pair, self.supports(), self.walk)

    @torch.no_grad()
    def supports(self) -> BinaryChain:
        """The chain at the stored evidence; messages pass once for each."""
        known = self._known
        if known is None or known[0] is not self.evidence or known[1] != self.evidence._version:
            evidence = to_chains(self.evidence, self.evidence.shape, self.walk)
            chain = BinaryChain(Rates(self.start, self.enter, self.leave), evidence, validate_args=False)
            known = self._known = self.evidence, self.evidence._version, chain
        return known[2]

    def keep_(self, kept: Tensor) -> None:
        """Delete entries; their supports are zero from now on."""
        super().keep_(kept)
        self.evidence.masked_fill_(~self.kept, -torch.inf)

    def project_(self) -> None:
        """Also count steps, and pass messages when it is time."""
        super().project_()
        self.steps += 1
        if int(self.steps) % self.every == 0:
            self.refresh_()

    @torch.no_grad()
    def refresh_(self) -> None:
        """Transitions given supports, evidence given weights; supports given both follow when next asked for."""
        law: Any = self.distribution()
        refreshed = law.refreshed().log_odds
        if self.learns is not None:
            rate = law.supports.mean.mean()
            found = law.supports.estimate() if self.learns == "chain" else Rates(rate, rate, 1 - rate)
            for old, new in zip(law.supports.rates, found, strict=True):  # a chain of one node says nothing of steps
                old.copy_(torch.where(new.isfinite(), new.clamp(_SMALLEST_RATE, 1 - _SMALLEST_RATE), old))
        self.evidence.copy_(from_chains(refreshed, self.evidence.shape, self.walk))


class TurboVBI(UngatedFamily):
    """Turbo-VBI with Normal weights.

    Args:
        density: prior share of active weights, where the chain is stationary.
        run: prior mean length of a run of active weights.
        structure: ``chain``, or ``independent`` supports of the same density (``run`` then says nothing).
        block: ``joint`` or ``factorised`` law of precision and support.
        walk: chains of a convolution run through each ``kernel``, or over its input ``channel``.
        idle_rate: rate of the precision of inactive weights, whose scale is about its root.
        shape, rate, idle_shape: of the Gamma laws.
        learns: whether transitions are learned.
        every: steps between passes of messages.
        bias_scale: standard deviation of the Normal prior of biases and other parameters.
        initial_log_scale: where log standard deviations of weights start (the published code's variance is zero).
    """

    name = "turbo_vbi"
    kl_is_bound = True
    default_reduction = "absent"
    references = (
        Reference(
            "xia2023structured",
            "Xia, Chengyu and Tsang, Danny H. K. and Lau, Vincent K. N.",
            "Structured Bayesian Compression for Deep Neural Networks Based on the Turbo-VBI Approach",
            2023,
            "IEEE Transactions on Signal Processing 71",
            "https://arxiv.org/abs/2302.10483",
        ),
        Reference(
            "liu2020robust",
            "Liu, An and Liu, Guanying and Lian, Lixiang and Lau, Vincent K. N. and Zhao, Min-Jian",
            "Robust Recovery of Structured Sparse Signals With Uncertain Sensing Matrix: A Turbo-VBI Approach",
            2020,
            "IEEE Transactions on Wireless Communications 19(5)",
        ),
    )

    def __init__(
        self,
        density: float = 0.2,
        run: float = 5.0,
        structure: Structure = "chain",
        block: Block = "joint",
        walk: Walk = "kernel",
        idle_rate: float = 1e-5,
        shape: float = 1.0,
        rate: float = 1.0,
        idle_shape: float = 1.0,
        learns: bool = True,
        every: int = 50,
        bias_scale: float = 1.0,
        initial_log_scale: float = -4.5,
    ) -> None:
        choices = {"structure": (structure, Structure), "block": (block, Block), "walk": (walk, Walk)}
        for key, (value, kind) in choices.items():
            if value not in get_args(kind):
                raise FamilyError(
                    f"family {self.name!r}", got=f"{key}={value!r}", allowed=", ".join(get_args(kind)),
                    fix="leave it out for the default",
                )  # fmt: skip
        if not 0 < density < 1 or not run > density / (1 - density) or run < 1:
            raise FamilyError(
                f"family {self.name!r}", got=f"density={density}, run={run}",
                allowed="0 < density < 1, and runs of 1 or more that leave room for gaps: run > density/(1-density)",
                fix="take the defaults, density=0.2 and run=5",
            )  # fmt: skip
        if min(shape, rate, idle_shape, idle_rate, bias_scale, every) <= 0 or idle_shape * rate <= shape * idle_rate:
            raise FamilyError(
                f"family {self.name!r}",
                got=f"shape={shape}, rate={rate}, idle_shape={idle_shape}, idle_rate={idle_rate}, "
                f"bias_scale={bias_scale}, every={every}",
                allowed="positive numbers, and idle_shape/idle_rate > shape/rate: inactive weights are more precise",
                fix="take the defaults; a smaller idle_rate keeps smaller weights active",
            )  # fmt: skip
        self.density, self.run, self.structure, self.block, self.walk = density, run, structure, block, walk
        self.shape, self.rate, self.idle_shape, self.idle_rate = shape, rate, idle_shape, idle_rate
        self.learns, self.every, self.bias_scale = learns, every, bias_scale
        self.initial_log_scale = initial_log_scale

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Chains of Student's t for weights, Normal biases."""
        laws: dict[str, Distribution] = {}
        leave = 1 - self.density if self.structure == "independent" else 1 / self.run
        enter = self.density * leave / (1 - self.density)
        rates = Rates(*(like.new_tensor(rate) for rate in (self.density, enter, leave)))
        pair = GammaPair(self.shape, self.rate, self.idle_shape, self.idle_rate)
        for name, info in spec.parameters.items():
            if info.kind == "weight":
                laws[name] = ChainedStudentT(torch.Size(info.shape), pair, rates, self.walk, validate_args=False)
            else:
                center = 1.0 if info.kind == "scale" else 0.0
                laws[name] = normal_prior(info.shape, self.bias_scale, like, loc=center)
        return laws

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Normals at the network's parameters: train it first, a random network's weights look inactive."""
        factors: dict[str, Factor] = {}
        scale = math.exp(self.initial_log_scale)
        for name, law in self.prior(spec, next(iter(start.values()))).items():
            if isinstance(law, ChainedStudentT):
                pair = FactorisedPair(*astuple(law.pair)) if self.block == "factorised" else law.pair
                learns = self.structure if self.learns else None
                factors[name] = SupportedFactor(start[name], scale, law, pair, learns, self.every)
            else:
                factors[name] = NormalFactor(start[name], self.initial_log_scale)
        return MeanFieldGuide(factors)

    def presence(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """Whether any weight that reads the group is active, 0 or 1."""
        supports, found = self.supports(laws), {}
        nothing = {name: chain.given(chain.log_odds.new_zeros(chain.event_shape)) for name, chain in supports.items()}
        like = next(iter(laws.values())).mean
        for block in spec.blocks:
            pair = []
            for chains in (supports, nothing):
                absent = like.new_zeros(block.size)
                for member in block.consumers:
                    if member.parameter not in chains:  # a frozen weight reads it
                        absent = torch.full_like(absent, -torch.inf)
                        continue
                    owner = _lay_owners(member, block.size, laws[member.parameter].event_shape, self.walk)
                    absent = absent + chains[member.parameter].log_zeros(owner.to(like.device), block.size)
                odds = torch.log(-torch.expm1(absent)) - absent
                pair.append(dist.Bernoulli(logits=odds.clamp(_LEAST, _MOST), validate_args=False))
            found[block.name] = GroupScale(*pair)
        return found

    def weight_log_odds(self, laws: Laws, spec: GroupSpec) -> dict[str, Tensor]:
        """Of inactive against active; NaN where already deleted."""
        found = {}
        for name, chain in self.supports(laws).items():
            odds = from_chains(-chain.marginal_log_odds, laws[name].event_shape, self.walk)
            found[name] = torch.where(odds == torch.inf, torch.nan, odds)
        return found

    def reduced(self) -> dict[str, ReducedPrior]:
        """The group is absent."""

        def absent(prior: Distribution, threshold: Tensor) -> Distribution:
            law: Distribution = dist.Bernoulli(logits=torch.full_like(threshold, -torch.inf), validate_args=False)
            return law

        def event(threshold: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full_like(threshold, -torch.inf), torch.full_like(threshold, 0.5)

        return {"absent": ReducedPrior("absent", absent, event)}

    def supports(self, laws: Laws) -> dict[str, BinaryChain]:
        """Supports given weights as they are now, by parameter; chains in the last axis."""
        return {name: law.refreshed() for name, law in laws.items() if isinstance(law, SupportedNormal)}

    def clusters(self, laws: Laws) -> dict[str, tuple[float, float]]:
        """Expected number of runs of active weights, and their mean length, by parameter."""
        found = {}
        for name, chain in self.supports(laws).items():
            runs = float(chain.num_runs.detach().sum())
            found[name] = runs, float(chain.mean.detach().sum()) / max(runs, 1e-30)
        return found

    def mask_bits(self, laws: Laws) -> dict[str, tuple[float, float]]:
        """Bits of the decided mask under the best chain, and under the best independent rate, by parameter."""
        supports = self.supports(laws)
        return {name: count_bits((chain.marginal_log_odds.detach() > 0).double()) for name, chain in supports.items()}


def _lay_owners(member: Member, size: int, shape: torch.Size, walk: Walk) -> Tensor:
    """The group that each weight reads, along chains; ``size`` for none."""
    owner = torch.full((shape[1],), size)
    owner[torch.as_tensor(member.indices).sort().values] = torch.as_tensor(member.group_of_index())
    return to_chains(owner.reshape(1, -1, *(1,) * (len(shape) - 2)).expand(shape), shape, walk)
