r"""The change of prior, dispatched on types: ``reduce(q, p, reduced)``.

Same likelihood, prior :math:`p \to \tilde p`, posterior ``q`` (Friston and Penny 2011):

.. math::
    \Delta F = \ln \tilde p(y) - \ln p(y) = \ln \int q(\theta)\,\frac{\tilde p(\theta)}{p(\theta)}\,d\theta
    \quad\text{(nats)}, \qquad
    \tilde q(\theta) = q(\theta)\,\frac{\tilde p(\theta)}{p(\theta)}\,e^{-\Delta F}.

Exact when ``q`` is the exact posterior, otherwise as good as ``q``.  Closed forms are registered per triple of types,
as ``register_kl`` does for pairs; every other triple goes to Pareto-smoothed importance sampling, which reports its
error.  ``delta_f`` keeps the joint batch shape of the three distributions (event dimensions are summed), is float64 and
is NaN exactly where the reduction is undefined, with ``reason`` saying why: NaN never prunes, nor does an infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributions import Distribution

from pyrobc.bmr.compare import batch_shape, check_comparable
from pyrobc.bmr.monte_carlo import estimate_reduction
from pyrobc.bmr.reduction import Reduction
from pyrobc.bmr.wrappers import Trio, plain, unwrap
from pyrobc.dists.precision import in_double
from pyrobc.errors import ReductionError

__all__ = ["Reduction", "closed_form", "reduce", "register_reduction", "registered_triples"]


Rule = Callable[[Any, Any, Any], Reduction]
_Rule = TypeVar("_Rule", bound=Rule)
_RULES: dict[tuple[type, type, type], Rule] = {}


def register_reduction(q: type, p: type, reduced: type) -> Callable[[_Rule], _Rule]:
    """Register a closed form for posterior type ``q``, prior type ``p`` and reduced-prior type ``reduced``.

    The most specific registered triple wins (``q`` first, then ``p``, then ``reduced``).  A second registration of the
    same triple raises.
    """
    triple = (q, p, reduced)

    def decorate(rule: _Rule) -> _Rule:
        if triple in _RULES:
            names = ", ".join(t.__name__ for t in triple)
            raise ReductionError(
                f"reduction ({names})",
                got=f"a second closed form {rule.__module__}.{rule.__qualname__}",
                allowed=f"one; {_RULES[triple].__module__}.{_RULES[triple].__qualname__} is registered",
                fix="register a subclass, or remove one of the two",
            )
        _RULES[triple] = rule
        return rule

    return decorate


def registered_triples() -> list[tuple[type, type, type]]:
    """All (posterior, prior, reduced prior) type triples with a closed form."""
    return list(_RULES)


def closed_form(q: type, p: type, reduced: type) -> Rule | None:
    """The most specific registered rule for these types, or None."""
    best: tuple[tuple[int, int, int], Rule] | None = None
    for (tq, tp, tr), rule in _RULES.items():
        if issubclass(q, tq) and issubclass(p, tp) and issubclass(reduced, tr):
            distance = (q.__mro__.index(tq), p.__mro__.index(tp), reduced.__mro__.index(tr))
            if best is None or distance < best[0]:
                best = (distance, rule)
    return None if best is None else best[1]


def reduce(
    q: Distribution,
    p: Distribution,
    reduced: Distribution,
    *,
    num_draws: int = 1000,
    generator: torch.Generator | None = None,
) -> Reduction:
    """Score replacing the prior ``p`` by ``reduced`` when ``q`` is the posterior under ``p``.

    Args:
        q: posterior (approximate or exact) of one site.
        p: the prior ``q`` answers to.
        reduced: the simpler prior; ``Delta(v)`` deletes the site exactly (Savage-Dickey at ``v``).
        num_draws: draws from ``q`` for the fallback when no closed form is registered; 0 refuses the fallback.
        generator: random numbers for the fallback.

    Raises:
        ReductionError: supports, shapes or event dimensions that cannot be compared; or no closed form with
            ``num_draws=0``.
    """
    memo: dict[int, Any] = {}
    trio = (in_double(q, memo), in_double(p, memo), in_double(reduced, memo))
    check_comparable(trio)
    result = _reduce((plain(trio[0]), plain(trio[1]), plain(trio[2])), num_draws, generator)
    shape = batch_shape(trio)
    return result.map(lambda part: part.expand(shape))


def _reduce(trio: Trio, num_draws: int, generator: torch.Generator | None) -> Reduction:
    shared = unwrap(trio)
    if shared is not None:
        inner_trio, num_dims, wrap = shared
        shape = batch_shape(inner_trio)
        inner = _reduce(inner_trio, num_draws, generator).map(lambda part: part.expand(shape))
        return _sum_events(inner, num_dims, wrap)
    rule = closed_form(*(type(law) for law in trio))
    if rule is not None:
        return rule(*trio)
    return estimate_reduction(*trio, num_draws=num_draws, generator=generator)


def _sum_events(inner: Reduction, num_dims: int, wrap: Callable[[Distribution], Distribution]) -> Reduction:
    """Independent elements: evidence adds up, and so do the squares of its errors."""
    if not num_dims:
        return inner.map(lambda part: part, posterior=wrap)
    dims = tuple(range(-num_dims, 0))
    return inner.map(
        lambda delta_f: delta_f.sum(dims),
        posterior=wrap,
        mcse=lambda mcse: mcse.square().sum(dims).sqrt(),
        khat=lambda khat: khat.amax(dims),
    )
