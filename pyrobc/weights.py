r"""Pruning inside what groups keep: Bayesian model reduction of single weights.

Under a folded posterior (``pyrobc.folding``) a weight has :math:`q = N(m, s^2)` and prior :math:`N(0, S^2)`.  Deleting
it is the change of prior to a point at zero (Savage--Dickey; Dickey 1971; Friston and Penny 2011),

.. math:: \Delta F = \ln q(0) - \ln p(0) = \tfrac12\ln\frac{S^2}{s^2} - \frac{m^2}{2s^2}\quad\text{nats}

(with a Laplace prior of scale ``b``, :math:`\ln q(0) + \ln 2b`), and the posterior log odds of "zero" are :math:`L =
\Delta F + \ln\frac{\pi}{1-\pi}`.  :math:`\pi` is the prior probability that a weight is zero, learned for each tensor
(Beta--Bernoulli, ``bmr.learn_inclusion``).  A family with supports of single weights has these odds itself
(``Family.weight_log_odds``), and needs no folding.  A row's or a kernel's :math:`\Delta F` is the sum over its weights,
as the guide factorises.  Where the fit was tempered, :math:`-T\,\mathrm{ELBO}` was minimised with ``T`` on the KL, so
:math:`T\,m^2/2s^2` is the second-order rise of the negative log likelihood.

One round promises too much, because other weights have not re-adapted (Beckers et al. 2024): ``pyrobc.sparsify``
removes some, fits again, and goes on.

Scores are float64 and as many as weights; besides them memory holds a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrobc.bmr import learn_log_odds, reduce
from pyrobc.errors import BudgetError, ReductionError, suggest
from pyrobc.folding import FoldedFamily, check_folded, find_normals
from pyrobc.meanfield import NormalFactor
from pyrobc.posterior import Posterior
from pyrobc.selection import find_above, find_largest, split_flat

__all__ = ["count_weights", "prune_weights", "score_weights"]


Unit = Literal["weight", "row", "kernel"]


@torch.no_grad()
def score_weights(posterior: Posterior, per: Unit = "weight") -> dict[str, Tensor]:
    """Log Bayes factor of deleting each weight and bias, nats, float64, by parameter; NaN where already deleted.

    Args:
        posterior: folded.
        per: what is deleted together, and so shares its score: single weights, rows (all that one output reads) or
            kernels (all positions between an input and an output channel; a single weight of a linear layer).
    """
    family = check_folded(posterior)
    if per not in get_args(Unit):
        allowed = ", ".join(get_args(Unit))
        raise ReductionError("unit of deletion", got=repr(per), allowed=allowed, fix=suggest(str(per), get_args(Unit)))
    scores = {}
    for name, factor in find_normals(posterior).items():
        found = torch.empty(factor.loc.shape, dtype=torch.float64, device=factor.loc.device)
        parts = (factor.mean(), factor.log_scale, factor.kept, found)
        for loc, log_scale, kept, out in zip(*map(split_flat, parts), strict=True):  # a chunk of float64 at a time
            q = dist.Normal(loc.double(), log_scale.double().exp(), validate_args=False)
            law = dist.Laplace if family.law == "laplace" else dist.Normal
            p = law(torch.zeros_like(q.loc), torch.full_like(q.loc, family.prior_scales[name]), validate_args=False)
            delta_f = reduce(q, p, dist.Delta(torch.zeros_like(q.loc))).delta_f
            out.copy_(torch.where(kept, delta_f, torch.nan))
        inner = {"weight": found.dim(), "row": 1, "kernel": 2}[per]  # the first axis that is deleted together
        if inner < found.dim():
            total = torch.where(factor.kept, found, 0.0).flatten(inner).sum(inner)
            total = total.reshape(*total.shape, *(1,) * (found.dim() - inner)).expand_as(found)
            found = torch.where(factor.kept, total, torch.nan)
        scores[name] = found
    return scores


@torch.no_grad()
def prune_weights(
    posterior: Posterior, keep: int | None = None, per: Unit = "weight", prior: Mapping[str, Tensor] | None = None
) -> int:
    """Delete weights of ``posterior``, in place; returns how many.

    Args:
        posterior: folded, or of a family that knows itself which weights are zero.
        keep: weights and biases to leave, those with the most evidence against deletion (of equal ones the last);
            None deletes what has posterior odds above one.  NaN and infinite scores are never deleted, even if more
            are left then.
        per: see ``score_weights``; with a number to keep, single weights only.
        prior: prior log odds of zero of each weight, nats, by parameter (``pyrobc.supports``); None: with a number to
            keep those of all weights are alike, without one they are learned for each tensor.
    """
    if keep is not None and per != "weight":
        raise ReductionError(
            "unit of deletion", got=f"{per!r} with keep={keep}", allowed="'weight', or no number to keep",
            fix="leave keep out: rows and kernels leave by their posterior odds",
        )  # fmt: skip
    if prior is not None and per != "weight":
        raise ReductionError(
            "unit of deletion", got=f"{per!r} with prior odds of weights", allowed="'weight', or no prior",
            fix="leave prior out: odds of rows and kernels are learned",
        )  # fmt: skip
    factors, own = find_normals(posterior), _own_odds(posterior) if per == "weight" else {}
    scores = own or score_weights(posterior, per)
    if prior is not None:
        scores = {n: s + prior[n] if n in prior else s for n, s in scores.items()}
    if keep is not None:
        gone = find_largest(scores, _count_excess(factors, scores, keep))
    elif own or prior is not None:
        gone = {n: find_above(odds, 0.0) for n, odds in scores.items()}
    else:
        learned = {n: _learned_odds(s if per == "weight" else s[factors[n].kept].unique()) for n, s in scores.items()}
        gone = {n: find_above(s, -learned[n]) for n, s in scores.items()}
    removed = 0
    for name, where in gone.items():
        where &= factors[name].kept
        removed += int(where.count_nonzero())  # a sum would first make integers of all
        factors[name].keep_(where.logical_not_())
    return removed


def count_weights(posterior: Posterior) -> tuple[int, int]:
    """Weights and biases that are not deleted, and all there are."""
    factors = find_normals(posterior).values()
    return sum(int(f.kept.count_nonzero()) for f in factors), sum(f.kept.numel() for f in factors)


def _own_odds(posterior: Posterior) -> dict[str, Tensor]:
    """Posterior log odds of zero where the family has them, NaN for other parameters; empty if it has none."""
    known = {} if isinstance(posterior.model.family, FoldedFamily) else posterior.weight_log_odds()
    factors = find_normals(posterior) if known else {}
    return {n: known.get(n, torch.full_like(f.loc, torch.nan)) for n, f in factors.items()}


def _count_excess(factors: dict[str, NormalFactor], scores: dict[str, Tensor], keep: int) -> int:
    if not isinstance(keep, int) or keep < 1:
        raise BudgetError("weights to keep", got=repr(keep), allowed="a whole number from 1", fix="raise the number")
    return max(0, sum(int(factors[name].kept.count_nonzero()) for name in scores) - keep)


def _learned_odds(scores: Tensor) -> float:
    """Learned prior log odds of zero against kept, nats; zero where nothing is defined."""
    if not any(bool((chunk < torch.inf).any()) for chunk in split_flat(scores)):  # NaN is not less
        return 0.0
    return -float(learn_log_odds(scores, max_steps=100_000))
