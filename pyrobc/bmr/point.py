r"""Exact deletion: the reduced prior is a point, and the change of prior is the Savage-Dickey density ratio.

.. math:: \tilde p = \delta(\theta - v) \quad\Rightarrow\quad \Delta F = \ln q(v) - \ln p(v)

A ratio of densities needs two densities: where the prior's is infinite at v (a scale mixture such as the horseshoe) or
zero, deletion is degenerate and refused in favour of an interval.

References:
    Dickey, The Weighted Likelihood Ratio, Linear Hypotheses on Normal Location Parameters (1971).
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import Delta
from torch.distributions import Distribution

from pyrobc.bmr.compare import in_support
from pyrobc.bmr.registry import Reduction, register_reduction
from pyrobc.errors import ReductionError

__all__ = ["reduce_to_point"]


@register_reduction(Distribution, Distribution, Delta)
def reduce_to_point(q: Distribution, p: Distribution, reduced: Delta) -> Reduction:
    """Log density ratio ln q(v) - ln p(v) with ``v = reduced.v``; the kept posterior is the point itself."""
    point = reduced.v
    prior = torch.where(in_support(p, point), p.log_prob(point), -math.inf)
    posterior = torch.where(in_support(q, point), q.log_prob(point), -math.inf)
    if not bool(torch.isfinite(prior).all()) or bool((torch.isnan(posterior) | torch.isposinf(posterior)).any()):
        raise ReductionError(
            f"reduced prior Delta under {type(p).__name__}",
            got=f"a point where the density of {type(p).__name__} or {type(q).__name__} is zero, infinite or undefined",
            allowed="a point where both densities are positive and finite",
            fix="score a region of practical equivalence (ROPE) instead: Restricted(p, lower, upper)",
        )
    return Reduction(posterior - prior, reduced)
