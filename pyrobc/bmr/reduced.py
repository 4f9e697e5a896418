"""Bring a reduced prior to the shape of the prior it replaces, and refuse what cannot replace it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributions import Distribution

from pyrobc.bmr.compare import check_comparable
from pyrobc.errors import ReductionError

__all__ = ["ReducedRule", "check_support", "match_reduced", "naming_site"]

ReducedRule = Callable[[Any], Distribution]


def match_reduced(site: str, prior: Distribution, wanted: Distribution | ReducedRule) -> Distribution:
    """The reduced prior with the batch and event shape of the prior; refuses what cannot be compared with it."""
    law: Any = wanted if isinstance(wanted, Distribution) else wanted(prior)
    name = f"reduced prior of site {site!r}"
    if not isinstance(law, Distribution):
        raise ReductionError(
            name, got=type(law).__name__, allowed="a distribution, or a rule that returns one", fix="return the law"
        )
    extra = len(prior.event_shape) - len(law.event_shape)
    shape = prior.batch_shape + prior.event_shape
    try:
        if extra < 0:
            raise ValueError
        batch = torch.broadcast_shapes(law.batch_shape, shape[: len(shape) - len(law.event_shape)])
        if batch + law.event_shape != shape:
            raise ValueError
    except (RuntimeError, ValueError):
        raise ReductionError(
            name,
            got=f"batch shape {tuple(law.batch_shape)}, event shape {tuple(law.event_shape)}",
            allowed=f"what broadcasts to batch {tuple(prior.batch_shape)}, event {tuple(prior.event_shape)}",
            fix="pass one law per element, or a scalar law for all",
        ) from None
    law = law.expand(batch)
    return law.to_event(extra) if extra else law  # type: ignore[no-any-return]


def check_support(site: str, prior: Distribution, law: Distribution) -> None:
    """Refuse a reduced prior that is improper or has mass where the prior of the site has none."""
    with naming_site(site):
        check_comparable((prior, prior, law))


@contextmanager
def naming_site(site: str) -> Iterator[None]:
    """Put the name of the site into the refusals raised inside."""
    try:
        yield
    except ReductionError as error:
        subject = f"site {site!r}, {error.subject}"
        raise ReductionError(subject, got=error.got, allowed=error.allowed, fix=error.fix) from error
