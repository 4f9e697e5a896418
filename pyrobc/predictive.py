"""Mean and covariance of a fitted network's outputs, and the plain network that keeps them."""

from __future__ import annotations

from typing import Any, Literal

import torch

from pyrobc.batches import move
from pyrobc.calling import first_tensor
from pyrobc.folding import FoldedFamily, fold_scales
from pyrobc.moments import Moments
from pyrobc.posterior import Posterior
from pyrobc.propagation import MomentNetwork, Relu

__all__ = ["keep_covariance", "propagate"]


@torch.no_grad()
def propagate(
    posterior: Posterior,
    inputs: Any,
    *,
    covariance: Literal["full", "diagonal"] = "diagonal",
    relu: Relu = "first_order",
) -> Moments:
    """Mean and covariance of the outputs for known inputs, without draws; any family with Normal weights.

    Args:
        posterior: of a network that is a chain of layers; a group's scale is folded into its weights (``fold_scales``).
        inputs: rows.
        covariance: between layers: ``full`` costs the square of the features in memory, ``diagonal`` no more than a
            second pass.
        relu: ``first_order``, or ``exact`` for the moments of a rectified Normal.

    Raises:
        FamilyError: the family's weights are points.
        GroupError: the network is no chain, or has a layer without a rule.
    """
    rows = move(first_tensor(inputs), posterior.model.anchor)
    result: Moments = keep_covariance(posterior, covariance=covariance, relu=relu)(rows)
    return result


@torch.no_grad()
def keep_covariance(
    posterior: Posterior, *, covariance: Literal["full", "diagonal"] = "diagonal", relu: Relu = "first_order"
) -> MomentNetwork:
    """A plain network at the posterior mean that keeps the variance of its weights and needs no Pyro."""
    folded = posterior if isinstance(posterior.model.family, FoldedFamily) else fold_scales(posterior)
    laws = folded.laws()
    variances = {name: laws[name].variance for name in folded.model.spec.parameters}
    return MomentNetwork(folded.to_module(), variances, covariance, relu)
