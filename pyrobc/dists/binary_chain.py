r"""A Markov chain of zeros and ones with evidence at every node: messages, marginals, pairs, partition function.

Prior and evidence, for nodes :math:`s_1 \dots s_n`, with log odds :math:`\ell_i` for one against zero:

.. math::
    p(s) = \lambda^{s_1}(1-\lambda)^{1-s_1}\prod_{i>1} T_{s_{i-1}s_i}, \quad
    T = \begin{pmatrix} 1-p_{01} & p_{01}\\ p_{10} & 1-p_{10}\end{pmatrix}, \qquad
    q(s) = \frac{p(s)\,e^{\sum_i \ell_i s_i}}{Z}.

Everything is a recursion on log odds, over nodes one after the other and over all chains at once.  With
:math:`f_i` from before and :math:`b_i` from behind,

.. math::
    f_1 &= \ln\tfrac{\lambda}{1-\lambda}, &
    f_{i+1} &= \ln\frac{p_{01} + (1-p_{10})\,e^{f_i+\ell_i}}{(1-p_{01}) + p_{10}\,e^{f_i+\ell_i}}, \\
    b_n &= 0, &
    b_{i-1} &= \ln\frac{p_{10} + (1-p_{10})\,e^{b_i+\ell_i}}{(1-p_{01}) + p_{01}\,e^{b_i+\ell_i}},

the *extrinsic* log odds of a node, what the others say of it, are :math:`f_i + b_i`; those of its marginal
:math:`\gamma_i` are :math:`f_i + b_i + \ell_i`.  ``q`` is a Markov chain too, with
:math:`\ln\text{odds}\,q(s_i{=}1|s_{i-1}{=}0) = \ln\frac{p_{01}}{1-p_{01}} + \ell_i + b_i`, likewise from one, and

.. math::
    \ln Z = \sum_i \ln\frac{1 + e^{f_i+\ell_i}}{1 + e^{f_i}}, \qquad
    KL(q\,\|\,p) = \sum_i \gamma_i\ell_i - \ln Z, \qquad
    E[\text{runs of ones}] = \gamma_1 + \sum_{i>1} q(s_{i-1}{=}0, s_i{=}1).

With :math:`p_{01} = 1 - p_{10} = \lambda` nodes are independent.  Evidence of minus infinity fixes a node at zero.

References:
    Rabiner, A tutorial on hidden Markov models and selected applications in speech recognition (1989).
    Kschischang, Frey, Loeliger, Factor graphs and the sum-product algorithm (2001).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["BinaryChain", "Rates", "count_bits", "fit_chain"]

_NO_SHAPE = torch.Size()


class Rates(NamedTuple):
    """Probabilities of one at the first node, of one after zero, and of zero after one."""

    start: Tensor
    enter: Tensor
    leave: Tensor

    def logs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log probabilities of the steps 0 to 0, 0 to 1, 1 to 0 and 1 to 1."""
        return torch.log1p(-self.enter), self.enter.log(), self.leave.log(), torch.log1p(-self.leave)


class BinaryChain(TorchDistribution):
    """Chains along the last dimension, which share their rates.

    Args:
        rates: of the prior, numbers between 0 and 1.
        log_odds: evidence, nats, ``[..., nodes]``; zero for none.
        validate_args: as for every distribution.

    Example:
        >>> chain = BinaryChain(Rates(*torch.tensor([0.25, 0.1, 0.3])), torch.tensor([9.0, 1.0]).log())
        >>> [round(float(p), 4) for p in chain.mean]
        [0.75, 0.55]
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, rates: Rates, log_odds: Tensor, validate_args: bool | None = None) -> None:
        self.rates, self.log_odds = rates, log_odds
        super().__init__(log_odds.shape[:-1], log_odds.shape[-1:], validate_args=validate_args)

    def given(self, log_odds: Tensor) -> BinaryChain:
        """The same prior with other evidence."""
        return BinaryChain(self.rates, log_odds, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BinaryChain:
        """The same law for more chains."""
        return self.given(self.log_odds.expand(torch.Size(batch_shape) + self.event_shape))

    @cached_property
    def messages(self) -> tuple[Tensor, Tensor]:
        """Log odds that reach each node from before, and from behind, ``[..., nodes]`` each."""
        evidence = self.log_odds.movedim(-1, 0).contiguous().unbind(0)
        ends = self.log_odds.new_zeros(self.batch_shape)
        off, on, leave, stay = self.rates.logs()
        before = [ends + torch.logit(self.rates.start)]
        for own in evidence[:-1]:
            total = before[-1] + own
            before.append(torch.logaddexp(total + stay, on) - torch.logaddexp(total + leave, off))
        behind = [ends]
        for own in evidence[:0:-1]:
            total = behind[-1] + own
            behind.append(torch.logaddexp(total + stay, leave) - torch.logaddexp(total + on, off))
        return torch.stack(before).movedim(0, -1).contiguous(), torch.stack(behind[::-1]).movedim(0, -1).contiguous()

    @property
    def extrinsic(self) -> Tensor:
        """Log odds of each node from the others' evidence and the prior."""
        before, behind = self.messages
        return before + behind

    @property
    def marginal_log_odds(self) -> Tensor:
        """Log odds of each node from everything."""
        return self.extrinsic + self.log_odds

    @cached_property
    def mean(self) -> Tensor:
        """Probability that each node is one."""
        return torch.sigmoid(self.marginal_log_odds)

    @property
    def variance(self) -> Tensor:
        """Of each node."""
        odds = self.marginal_log_odds
        return torch.sigmoid(odds) * torch.sigmoid(-odds)

    @property
    def log_partition(self) -> Tensor:
        """Logarithm of Z of each chain, nats."""
        before = self.messages[0]
        return (softplus(before + self.log_odds) - softplus(before)).sum(-1)

    @property
    def step_log_odds(self) -> tuple[Tensor, Tensor]:
        """Log odds of one after zero, and of one after one, given all evidence; for each node but the first."""
        behind = (self.messages[1] + self.log_odds)[..., 1:]
        return torch.logit(self.rates.enter) + behind, behind - torch.logit(self.rates.leave)

    @property
    def pairs(self) -> Tensor:
        """P(s_{i-1}, s_i), ``[..., nodes - 1, 2, 2]``."""
        ones, steps = self.mean[..., :-1], torch.stack(self.step_log_odds, -1)
        last = torch.stack([1 - ones, ones], -1)
        return torch.stack([last * torch.sigmoid(-steps), last * torch.sigmoid(steps)], -1)

    @property
    def num_runs(self) -> Tensor:
        """Expected number of runs of ones in each chain."""
        up = self.step_log_odds[0]
        return self.mean[..., 0] + ((1 - self.mean[..., :-1]) * torch.sigmoid(up)).sum(-1)

    @cached_property
    def kl_from_prior(self) -> Tensor:
        """KL of each chain from the one without evidence, nats."""
        ones = self.mean
        return torch.where(ones > 0, ones * self.log_odds, 0.0).sum(-1) - self.log_partition

    def entropy(self) -> Tensor:
        """Nats, of each chain."""
        off, on, leave, stay = self.rates.logs()
        first, pairs = self.mean[..., 0], self.pairs.sum(-3)
        prior = first * self.rates.start.log() + (1 - first) * torch.log1p(-self.rates.start)
        steps = torch.stack([off, on, leave, stay]).view(2, 2)
        prior = prior + (pairs * steps).sum((-2, -1))
        return -self.kl_from_prior - prior

    def estimate(self) -> Rates:
        """Rates of most expected log likelihood over all chains: the M-step of EM; NaN where nothing says."""
        ones, (up, stay) = self.mean, self.step_log_odds
        active, idle = ones[..., :-1], 1 - ones[..., :-1]
        enter = (idle * torch.sigmoid(up)).sum() / idle.sum()
        leave = (active * torch.sigmoid(-stay)).sum() / active.sum()
        return Rates(ones[..., 0].mean(), enter, leave)

    def log_zeros(self, owner: Tensor, size: int) -> Tensor:
        """Log probability that all nodes of each owner are zero, nats, ``[size]``.

        Args:
            owner: who has each node, from 0, ``[..., nodes]``; ``size`` for nobody.  Adjacent nodes count jointly,
                others as if independent, which is not more than they have where ones attract each other.
            size: how many owners there are.
        """
        alone = -softplus(self.marginal_log_odds).expand_as(owner)
        follows = torch.where(owner[..., 1:] == owner[..., :-1], -softplus(self.step_log_odds[0]), alone[..., 1:])
        terms = torch.cat([alone[..., :1], follows], -1)
        return terms.new_zeros(size + 1).index_add(0, owner.flatten(), terms.flatten())[:size]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of zeros and ones, nats, of each chain."""
        if self._validate_args:
            self._validate_sample(value)
        off, on, leave, stay = self.rates.logs()
        is_on = value > 0.5
        first = torch.where(is_on[..., 0], self.rates.start.log(), torch.log1p(-self.rates.start))
        steps = torch.where(
            is_on[..., :-1], torch.where(is_on[..., 1:], stay, leave), torch.where(is_on[..., 1:], on, off)
        )
        return first + steps.sum(-1) + torch.where(is_on, self.log_odds, 0.0).sum(-1) - self.log_partition

    @torch.no_grad()
    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Draws, node after node."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.rand(shape, dtype=self.log_odds.dtype, device=self.log_odds.device)
        up, stay = (torch.sigmoid(odds) for odds in self.step_log_odds)
        drawn = [noise[..., 0] < self.mean[..., 0]]
        for i in range(shape[-1] - 1):
            drawn.append(noise[..., i + 1] < torch.where(drawn[-1], stay[..., i], up[..., i]))
        return torch.stack(drawn, -1).to(noise)


def fit_chain(values: Tensor) -> BinaryChain:
    """The chain under which zeros and ones ``[..., nodes]`` are most likely, half a case added to each count."""
    last, now = values[..., :-1], values[..., 1:]
    enter = (((1 - last) * now).sum() + 0.5) / ((1 - last).sum() + 1)
    leave = ((last * (1 - now)).sum() + 0.5) / (last.sum() + 1)
    first = values[..., 0]
    return BinaryChain(Rates((first.sum() + 0.5) / (first.numel() + 1), enter, leave), torch.zeros_like(values))


def count_bits(values: Tensor) -> tuple[float, float]:
    """Code length of zeros and ones ``[..., nodes]`` under the best chain, and under the best independent rate."""
    rate = (values.sum() + 0.5) / (values.numel() + 1)
    independent = values.sum() * rate.log() + (1 - values).sum() * torch.log1p(-rate)
    return -float(fit_chain(values).log_prob(values).sum()) / math.log(2), -float(independent) / math.log(2)
