"""Whether three distributions can be compared at all; every refusal says why and what to do."""

from __future__ import annotations

import math
from numbers import Number
from typing import Any

import torch
from pyro.distributions import Delta, ImproperUniform, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrobc.bmr.wrappers import Trio
from pyrobc.errors import ReductionError

__all__ = ["batch_shape", "check_comparable", "in_support"]

_ROLES = ("posterior", "prior", "reduced prior")


def check_comparable(trio: Trio) -> None:
    """Refuse improper, masked or point laws, event shapes that differ, and supports that do not nest."""
    for role, law in zip(_ROLES, trio, strict=True):
        _check_law(role, law)
    q, p, reduced = trio
    if len({law.event_shape for law in trio}) > 1:
        raise ReductionError(
            "event shapes of posterior, prior and reduced prior",
            got=", ".join(str(tuple(law.event_shape)) for law in trio),
            allowed="three equal event shapes",
            fix="use .to_event(n) on those with too few event dimensions, or expand the reduced prior",
        )
    batch_shape(trio)
    if isinstance(reduced, Delta):
        return
    for role, law in (("posterior", q), ("reduced prior", reduced)):
        if not _is_within(law.support, p.support):
            raise ReductionError(
                f"support of the {role} {type(law).__name__}",
                got=_describe(law.support),
                allowed=f"a part of the prior's, {_describe(p.support)} ({type(p).__name__})",
                fix="the data said nothing about values the full prior excludes; choose a law on the prior's support",
            )


def batch_shape(trio: Trio) -> torch.Size:
    """The joint batch shape."""
    try:
        shape: torch.Size = torch.broadcast_shapes(*(law.batch_shape for law in trio))
    except RuntimeError as error:
        raise ReductionError(
            "batch shapes of posterior, prior and reduced prior",
            got=", ".join(str(tuple(law.batch_shape)) for law in trio),
            allowed="shapes that broadcast",
            fix="expand or reshape one of them",
        ) from error
    return shape


def _check_law(role: str, law: Distribution) -> None:
    base = law
    while hasattr(base, "base_dist") and not isinstance(base, MaskedDistribution | ImproperUniform):
        base = base.base_dist
    if isinstance(base, ImproperUniform):
        raise ReductionError(
            f"{role} ImproperUniform",
            got="an improper law, whose evidence is defined up to a factor only",
            allowed="a proper distribution",
            fix="truncate it (for p(z) ~ 1/|z|: TruncatedLogUniform), or rank by log_alpha or snr instead",
        )
    if isinstance(base, MaskedDistribution):
        raise ReductionError(
            f"{role} MaskedDistribution",
            got="a distribution whose log density is masked",
            allowed="the distribution under the mask",
            fix="pass its base_dist and leave out the masked elements of delta_f",
        )
    if role != "reduced prior" and isinstance(base, Delta):
        raise ReductionError(
            f"{role} Delta",
            got="a point, which has no density",
            allowed="a distribution with a density",
            fix="fit a guide that is not a point estimate (AutoNormal, AutoLaplaceApproximation)",
        )


def _interval(support: Any) -> tuple[Any, Any] | None:
    """Ends of a one-dimensional support, None for any other."""
    if support is constraints.real or type(support) is type(constraints.real):
        return -math.inf, math.inf
    low = getattr(support, "lower_bound", -math.inf)
    high = getattr(support, "upper_bound", math.inf)
    is_bounded = hasattr(support, "lower_bound") or hasattr(support, "upper_bound")
    return (low, high) if is_bounded else None


def _is_within(inner: Any, outer: Any) -> bool:
    """Whether one support lies in another; elementwise ends are left to the closed forms, which answer elementwise."""
    if inner.is_discrete != outer.is_discrete:
        return False
    while isinstance(inner, constraints.independent) and isinstance(outer, constraints.independent):
        inner, outer = inner.base_constraint, outer.base_constraint
    a, b = _interval(_base(inner)), _interval(_base(outer))
    if a is None or b is None:
        return type(_base(inner)) is type(_base(outer))
    if not all(isinstance(end, Number) for end in (*a, *b)):
        return True
    return bool(a[0] >= b[0] and a[1] <= b[1])


def _base(support: Any) -> Any:
    return support.base_constraint if isinstance(support, constraints.independent) else support


def _describe(support: Any) -> str:
    interval = _interval(_base(support))
    if interval is not None and all(isinstance(end, Number) for end in interval):
        return f"[{interval[0]}, {interval[1]}]"
    return "an interval" if interval is not None else str(support)


def in_support(law: Distribution, value: Tensor) -> Tensor:
    """Where ``value`` lies in the support of ``law``, batch shape."""
    inside: Tensor = law.support.check(value)  # type: ignore[union-attr]
    missing = len(law.event_shape) - law.support.event_dim  # type: ignore[union-attr]
    return inside.flatten(-missing).all(-1) if missing > 0 else inside
