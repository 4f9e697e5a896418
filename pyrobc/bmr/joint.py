"""Normal laws over many elements: as one mean and covariance, their marginals, and what a change of variables makes."""

from __future__ import annotations

from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    constraints,
)
from torch.distributions import transforms as transforms_of
from torch.distributions.constraint_registry import biject_to

from pyrobc.errors import ReductionError

__all__ = ["as_joint_normal", "constrain", "flatten_event", "is_joint_normal", "strip_wrappers", "take_marginal"]


def strip_wrappers(law: Distribution) -> Distribution:
    """The distribution inside Independent and Expanded wrappers."""
    while isinstance(law, Independent | dist.ExpandedDistribution):
        law = law.base_dist
    return law


def is_joint_normal(law: Distribution) -> bool:
    """Whether :func:`as_joint_normal` takes ``law``."""
    base = strip_wrappers(law)
    if isinstance(base, Normal):
        return True
    return isinstance(base, MultivariateNormal | LowRankMultivariateNormal) and base.batch_shape.numel() == 1


def as_joint_normal(law: Distribution, subject: str) -> tuple[Tensor, Tensor]:
    """Mean (elements,) and covariance (elements, elements), float64, over all batch and event dimensions.

    Raises:
        ReductionError: ``law`` is not a Normal, or is a batch of several full-covariance Normals.
    """
    base = strip_wrappers(law)
    if isinstance(base, Normal):
        return base.loc.double().reshape(-1), torch.diag(base.scale.double().square().reshape(-1))
    if not isinstance(base, MultivariateNormal | LowRankMultivariateNormal) or base.batch_shape.numel() != 1:
        raise ReductionError(
            subject,
            got=f"{type(base).__name__} with batch shape {tuple(base.batch_shape)}",
            allowed="Normal, MultivariateNormal or LowRankMultivariateNormal over one vector",
            fix="fit a Gaussian guide, or score site by site with bmr.score",
        )
    if isinstance(base, LowRankMultivariateNormal):
        factor, diagonal = base.cov_factor.double(), base.cov_diag.double()
        covariance = factor @ factor.mT + torch.diag_embed(diagonal)
    else:
        covariance = base.covariance_matrix.double()
    size = base.event_shape.numel()
    return base.loc.double().reshape(size), covariance.reshape(size, size)


def take_marginal(law: Distribution, elements: Tensor, event_dim: int) -> Normal | MultivariateNormal:
    """Marginal, float64, of a joint Normal vector over ``elements`` (batch, event): Normal, or joint over the event."""
    base = strip_wrappers(law)
    if isinstance(base, Normal):
        return dist.Normal(base.loc.double()[elements], base.scale.double()[elements])
    assert isinstance(base, MultivariateNormal | LowRankMultivariateNormal)
    loc = base.loc.double()[elements]
    if event_dim == 0:
        return dist.Normal(loc, base.variance.double()[elements].sqrt())
    flat = elements.flatten(-event_dim)
    if isinstance(base, LowRankMultivariateNormal):
        factor = base.cov_factor.double()[flat]
        covariance = factor @ factor.mT + torch.diag_embed(base.cov_diag.double()[flat])
    else:
        covariance = base.covariance_matrix.double()[flat[..., :, None], flat[..., None, :]]
    return dist.MultivariateNormal(loc.flatten(-event_dim), covariance)


class ConstrainedNormal(TransformedDistribution):
    """Law of T(u) for Normal ``u``, on the support that ``T`` was made for.

    A transform built from an exponential and a shift ends in a map of the real line, and would claim it as its support.
    """

    def __init__(self, base: Distribution, transform: Any, support: Any) -> None:
        self._support = support
        super().__init__(base, [transform])

    @property
    def support(self) -> Any:
        """The support of the site."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> ConstrainedNormal:
        """The same law with a larger batch shape."""
        new: ConstrainedNormal = self._get_checked_instance(ConstrainedNormal, _instance)
        new._support = self._support
        super().expand(batch_shape, _instance=new)
        return new


def constrain(base: Normal | MultivariateNormal, support: Any, event_dim: int) -> Distribution | None:
    """Law of T(u) for Normal ``u`` and Pyro's ``T`` onto ``support``, the last ``event_dim`` dimensions an event.

    A full covariance over an event of several dimensions stays flattened where ``T`` is the identity, and gives None
    (draws only) where it is not.
    """
    inner = support
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    transform = biject_to(inner)
    parts = [transform]
    while any(isinstance(part, transforms_of.ComposeTransform) for part in parts):
        parts = [leaf for part in parts for leaf in getattr(part, "parts", [part])]
    parts = [part for part in parts if not _is_unit(part)]
    is_identity, is_exponential = not parts, len(parts) == 1 and isinstance(parts[0], transforms_of.ExpTransform)
    if isinstance(base, MultivariateNormal):
        if is_identity:
            return base
        return ConstrainedNormal(base, biject_to(support), support) if event_dim == 1 else None
    law: Any = base
    if is_exponential:
        law = dist.LogNormal(base.loc, base.scale)
    elif transform.domain.event_dim > 0:
        return ConstrainedNormal(dist.Independent(base, event_dim), transform, support)
    elif not is_identity:
        law = ConstrainedNormal(base, transform, inner)
    return cast(Distribution, dist.Independent(law, event_dim) if event_dim else law)


def _is_unit(transform: Any) -> bool:
    """Whether an affine map changes nothing."""
    return isinstance(transform, transforms_of.AffineTransform) and bool(
        (torch.as_tensor(transform.loc) == 0).all() and (torch.as_tensor(transform.scale) == 1).all()
    )


def flatten_event(law: Distribution) -> Distribution | None:
    """The same Normal law, or point, with one event dimension holding all of its event; None for other laws.

    Diagonal Normals become MultivariateNormal, float64, so that they can meet a full-covariance posterior.
    """
    batch = law.batch_shape
    base = strip_wrappers(law)
    if isinstance(base, dist.Delta):
        return dist.Delta(base.v.double().reshape(*batch, -1), event_dim=1)
    if isinstance(base, Normal):
        loc, scale = base.loc.double().reshape(*batch, -1), base.scale.double().reshape(*batch, -1)
        return dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    if isinstance(base, MultivariateNormal | LowRankMultivariateNormal) and len(law.event_shape) == 1:
        return dist.MultivariateNormal(base.loc.double(), base.covariance_matrix.double())
    return None
