r"""Probabilities and classes: Dirichlet, Beta, Categorical, Bernoulli.

* Dirichlet and Beta, with the multivariate Beta function :math:`\ln B(a) = \sum\ln\Gamma(a_k) - \ln\Gamma(\sum a_k)`:

  .. math:: \tilde s = q + r - p, \qquad \Delta F = \ln B(\tilde s) - \ln B(q) + \ln B(p) - \ln B(r),

  positive where the reduced prior is better; defined where all :math:`\tilde s_k > 0`.
* Categorical and Bernoulli, from log probabilities (a class the prior excludes must be excluded by the reduced prior):

  .. math:: \Delta F = \ln \sum_k \frac{q_k r_k}{p_k}, \qquad \tilde s_k \propto \frac{q_k r_k}{p_k}.

References:
    Friston, Parr, Zeidman, Bayesian model reduction (2018).
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Dirichlet
from torch.nn.functional import logsigmoid

from pyrobc.bmr.registry import Reduction, register_reduction

__all__ = ["reduce_bernoulli", "reduce_beta", "reduce_categorical", "reduce_dirichlet"]

_INADMISSIBLE = "the reduced posterior would need a concentration that is not positive"
_EXCLUDED = "the reduced prior allows a class that the full prior excludes"


def _log_beta(concentration: Tensor) -> Tensor:
    return torch.lgamma(concentration).sum(-1) - torch.lgamma(concentration.sum(-1))


def _reduce_counts(q: Tensor, p: Tensor, reduced: Tensor) -> tuple[Tensor, Tensor, str]:
    """Delta F and reduced concentrations; classes in the last dimension."""
    counts = q + reduced - p
    is_defined = (counts > 0).all(-1)
    counts = torch.where(is_defined[..., None], counts, torch.ones_like(counts))
    delta_f = _log_beta(counts) - _log_beta(q) + _log_beta(p) - _log_beta(reduced)
    reason = "" if bool(is_defined.all()) else _INADMISSIBLE
    return torch.where(is_defined, delta_f, math.nan), counts, reason


@register_reduction(Dirichlet, Dirichlet, Dirichlet)
def reduce_dirichlet(q: Dirichlet, p: Dirichlet, reduced: Dirichlet) -> Reduction:
    """Dirichlet to Dirichlet."""
    delta_f, counts, reason = _reduce_counts(q.concentration, p.concentration, reduced.concentration)
    return Reduction(delta_f, dist.Dirichlet(counts, validate_args=False), reason=reason)


@register_reduction(Beta, Beta, Beta)
def reduce_beta(q: Beta, p: Beta, reduced: Beta) -> Reduction:
    """Beta to Beta."""
    pairs = (torch.stack(torch.broadcast_tensors(b.concentration1, b.concentration0), -1) for b in (q, p, reduced))
    delta_f, counts, reason = _reduce_counts(*pairs)
    return Reduction(delta_f, dist.Beta(counts[..., 0], counts[..., 1], validate_args=False), reason=reason)


def _reduce_classes(q: Tensor, p: Tensor, reduced: Tensor) -> tuple[Tensor, Tensor, str]:
    """Delta F and reduced log probabilities from log probabilities; classes in the last dimension."""
    q, p, reduced = torch.broadcast_tensors(q, p, reduced)
    is_excluded = torch.isneginf(p)
    is_defined = (~is_excluded | torch.isneginf(reduced)).all(-1)
    log_prob = q + reduced - torch.where(is_excluded, torch.zeros_like(p), p)
    log_prob = torch.where(is_excluded, -math.inf, log_prob)
    delta_f = torch.logsumexp(log_prob, -1)
    reason = "" if bool(is_defined.all()) else _EXCLUDED
    return torch.where(is_defined, delta_f, math.nan), log_prob - delta_f[..., None], reason


def _log_probs(law: Categorical) -> Tensor:
    # torch clamps probabilities on the way to logits; an excluded class must stay excluded
    return torch.log(law.probs) if "probs" in vars(law) else law.logits


@register_reduction(Categorical, Categorical, Categorical)
def reduce_categorical(q: Categorical, p: Categorical, reduced: Categorical) -> Reduction:
    """Categorical to Categorical."""
    delta_f, log_prob, reason = _reduce_classes(*(_log_probs(law) for law in (q, p, reduced)))
    return Reduction(delta_f, dist.Categorical(logits=log_prob, validate_args=False), reason=reason)


def _log_pair(law: Bernoulli) -> Tensor:
    if "probs" in vars(law):
        return torch.stack([torch.log1p(-law.probs), torch.log(law.probs)], -1)
    return torch.stack([logsigmoid(-law.logits), logsigmoid(law.logits)], -1)


@register_reduction(Bernoulli, Bernoulli, Bernoulli)
def reduce_bernoulli(q: Bernoulli, p: Bernoulli, reduced: Bernoulli) -> Reduction:
    """Bernoulli to Bernoulli."""
    delta_f, log_prob, reason = _reduce_classes(*(_log_pair(law) for law in (q, p, reduced)))
    posterior = dist.Bernoulli(logits=log_prob[..., 1] - log_prob[..., 0], validate_args=False)
    return Reduction(delta_f, posterior, reason=reason)
