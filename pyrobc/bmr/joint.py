"""Jointly Normal laws as one mean vector and one covariance, whatever distribution class carries them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from pyrobc.errors import ReductionError

__all__ = ["as_joint_normal", "is_joint_normal"]


def _base(law: Distribution) -> Distribution:
    while isinstance(law, Independent):
        law = law.base_dist
    return law


def is_joint_normal(law: Distribution) -> bool:
    """Whether :func:`as_joint_normal` takes ``law``."""
    base = _base(law)
    if isinstance(base, Normal):
        return True
    return isinstance(base, MultivariateNormal | LowRankMultivariateNormal) and base.batch_shape.numel() == 1


def as_joint_normal(law: Distribution, subject: str) -> tuple[Tensor, Tensor]:
    """Mean (elements,) and covariance (elements, elements), float64, over all batch and event dimensions.

    Raises:
        ReductionError: ``law`` is not a Normal, or is a batch of several full-covariance Normals.
    """
    base = _base(law)
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
