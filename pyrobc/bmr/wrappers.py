r"""What Pyro wraps around a distribution, taken off before a change of prior is looked up.

``plain`` returns an equal law without expansion, with nested ``Independent`` merged, exponentials as Gammas and affine
or exponential transforms of a Normal as a Normal or LogNormal.  ``unwrap`` then finds what three laws have in common:
the same number of event dimensions over a batch, or the same transforms.  Evidence does not depend on the
parameterisation (the Jacobians of q, p and the reduced prior cancel), and adds up over independent elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    Exponential,
    ExpTransform,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

from pyrobc.dists import Restricted

__all__ = ["Trio", "plain", "unwrap"]

Trio = tuple[Distribution, Distribution, Distribution]


def plain(law: Distribution) -> Distribution:
    """An equal law in its simplest class."""
    if isinstance(law, ExpandedDistribution):
        return plain(law.base_dist)
    if isinstance(law, Independent):
        base, num_dims = plain(law.base_dist), law.reinterpreted_batch_ndims
        while isinstance(base, Independent):
            base, num_dims = base.base_dist, num_dims + base.reinterpreted_batch_ndims
        return dist.Independent(base, num_dims, validate_args=False) if num_dims else base
    if isinstance(law, Restricted):
        return Restricted(plain(law.base), law.lower, law.upper, validate_args=False)
    if isinstance(law, Exponential):
        return dist.Gamma(torch.ones_like(law.rate), law.rate, validate_args=False)
    if _is_map(law):
        return _fold(law)
    return law


def _flatten(transforms: Iterable[Any]) -> Iterator[Any]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flatten(transform.parts)
        else:
            yield transform


def _fold(law: Any) -> Distribution:
    """A Normal absorbs affine maps; exp turns it into a LogNormal; anything else stays."""
    base, transforms = plain(law.base_dist), list(_flatten(law.transforms))
    while transforms and isinstance(base, Normal):
        head = transforms[0]
        if isinstance(head, AffineTransform) and not head.event_dim:
            scale = torch.as_tensor(head.scale).abs()
            base = dist.Normal(head.loc + head.scale * base.loc, scale * base.scale, validate_args=False)
        elif isinstance(head, ExpTransform):
            base = dist.LogNormal(base.loc, base.scale, validate_args=False)
        else:
            break
        transforms = transforms[1:]
    return dist.TransformedDistribution(base, transforms, validate_args=False) if transforms else base


def unwrap(trio: Trio) -> tuple[Trio, int, Callable[[Distribution], Distribution]] | None:
    """What the three laws share: inner laws, event dimensions to sum over, and how to wrap the reduced posterior again.

    None where nothing is shared, so that the laws themselves are to be looked up.
    """
    q, p, reduced = trio
    if isinstance(q, Independent) and isinstance(p, Independent):
        num_dims = q.reinterpreted_batch_ndims
        inner = _without_events(reduced, num_dims)
        if p.reinterpreted_batch_ndims == num_dims and inner is not None:
            return (
                (q.base_dist, p.base_dist, inner),
                num_dims,
                lambda law: dist.Independent(law, num_dims, validate_args=False),
            )
    if isinstance(q, Independent) or isinstance(p, Independent) or isinstance(reduced, Independent):
        joint = _as_joint_normals(trio)
        return None if joint is None else (joint, 0, lambda law: law)
    maps: list[Any] = [law for law in trio if _is_map(law)]
    if len(maps) == 3 and maps[0].transforms == maps[1].transforms == maps[2].transforms:
        transforms = maps[0].transforms
        bases = (maps[0].base_dist, maps[1].base_dist, maps[2].base_dist)
        return bases, 0, lambda law: dist.TransformedDistribution(law, transforms, validate_args=False)
    return None


def _is_map(law: Distribution) -> bool:
    """Whether ``law`` is a transformed distribution that has no class of its own."""
    return type(law) in (TransformedDistribution, dist.TransformedDistribution)


def _without_events(law: Distribution, num_dims: int) -> Distribution | None:
    """``law`` with its ``num_dims`` rightmost event dimensions as batch dimensions, if they are independent."""
    if isinstance(law, Independent) and law.reinterpreted_batch_ndims == num_dims:
        inner: Distribution = law.base_dist
        return inner
    if isinstance(law, dist.Delta) and law.event_dim >= num_dims:
        # the log density of a point moves no evidence between elements
        return dist.Delta(law.v, event_dim=law.event_dim - num_dims, validate_args=False)
    return None


def _as_joint_normals(trio: Trio) -> Trio | None:
    """Independent Normals beside a joint Normal become joint Normals themselves."""
    laws = []
    for law in trio:
        if isinstance(law, Independent):
            if law.reinterpreted_batch_ndims != 1 or not isinstance(law.base_dist, Normal):
                return None
            law = dist.MultivariateNormal(
                law.base_dist.loc, scale_tril=torch.diag_embed(law.base_dist.scale), validate_args=False
            )
        elif not isinstance(law, MultivariateNormal | LowRankMultivariateNormal):
            return None
        laws.append(law)
    return laws[0], laws[1], laws[2]
