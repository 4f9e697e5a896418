r"""The ROPE reduction: the full prior restricted to an interval.

:math:`\tilde p = p(\cdot \mid I)` gives, for every posterior,

.. math:: \Delta F = \ln Q(I) - \ln P(I), \qquad \tilde q = q(\cdot \mid I),

finite where exact deletion is degenerate (the horseshoe's marginal density at zero is infinite).  Any other restricted
prior is two changes of prior in a row, p to its base and the base to the interval, by the chain rule of evidence.
"""

from __future__ import annotations

import torch
from torch.distributions import Distribution, Independent

from pyrobc.bmr.registry import Reduction, reduce, register_reduction
from pyrobc.dists import Restricted, interval_log_mass
from pyrobc.errors import ReductionError

__all__ = ["reduce_to_interval"]


@register_reduction(Distribution, Distribution, Restricted)
def reduce_to_interval(q: Distribution, p: Distribution, reduced: Restricted) -> Reduction:
    """Log mass ratio ln Q(I) - ln P(I); -inf where the posterior has no mass in the interval."""
    if not _is_same(p, reduced.base):
        first = reduce(q, p, reduced.base, num_draws=0)
        if first.posterior is None:
            raise ReductionError(
                f"reduced prior Restricted({type(reduced.base).__name__})",
                got="a base whose reduced posterior has no closed form",
                allowed="the full prior itself as base, or a base with a closed form",
                fix="Restricted(p, lower, upper)",
            )
        second = reduce_to_interval(first.posterior, reduced.base, reduced)
        reason = first.reason or second.reason
        return Reduction(first.delta_f + second.delta_f, second.posterior, reason=reason)
    prior_mass = interval_log_mass(p, reduced.lower, reduced.upper)
    posterior_mass = interval_log_mass(q, reduced.lower, reduced.upper)
    is_empty = torch.isneginf(prior_mass)
    delta_f = torch.where(is_empty, torch.nan, posterior_mass - prior_mass)
    reason = "the full prior has no mass in the interval" if bool(is_empty.any()) else ""
    posterior = Restricted(q, reduced.lower, reduced.upper, validate_args=False)
    return Reduction(delta_f, posterior, reason=reason)


def _is_same(p: Distribution, base: Distribution) -> bool:
    """Whether ``base`` is ``p``: the same object, or the same type with equal parameters."""
    if p is base:
        return True
    if type(p) is not type(base) or p.batch_shape != base.batch_shape:
        return False
    if isinstance(p, Independent) and isinstance(base, Independent):
        return _is_same(p.base_dist, base.base_dist)
    if isinstance(p, Restricted) and isinstance(base, Restricted):
        ends = torch.equal(p.lower, base.lower) and torch.equal(p.upper, base.upper)
        return ends and _is_same(p.base, base.base)
    names = p.arg_constraints
    return bool(names) and all(torch.equal(getattr(p, name), getattr(base, name)) for name in names)
