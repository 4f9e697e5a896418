r"""Jointly Normal posterior with full covariance: any change of mean and covariance, and exact deletion of a subset.

Posterior :math:`N(m, C)`, prior :math:`N(m_0, C_0)`, reduced prior :math:`N(m_r, C_r)` over ``elements``; precisions
:math:`P = C^{-1}`.  The evidence gained is

.. math::
    \Delta F = \tfrac12\left[\ln|P_r| + \ln|P| - \ln|P_0| - \ln|\tilde P|\right]
        - \tfrac12\left[m^\top P m + m_r^\top P_r m_r - m_0^\top P_0 m_0 - \tilde m^\top \tilde P \tilde m\right],
    \qquad \tilde P = P + P_r - P_0.

No precision is formed.  In the coordinates :math:`\theta = m_0 + Lz`, :math:`C = LL^\top`, with
:math:`z = L^{-1}(m - m_0)`, :math:`e = m_r - m_0`, :math:`A = L_r^{-1}L`, :math:`B = L_0^{-1}L`,
:math:`\Lambda = A^\top A - B^\top B` and :math:`G = I + \Lambda = L^\top \tilde P L`, the squares combine into products
that do not cancel, however narrow the reduced prior is:

.. math::
    \Delta F = \ln\frac{|L_0|}{|L_r|} - \tfrac12 \ln|G| - \tfrac12\left[
        z^\top G^{-1} \Lambda z - 2 z^\top G^{-1} f + f^\top G^{-1} (L^{-1}e - B^\top L_0^{-1} e)\right],
    \quad f = A^\top L_r^{-1} e, \\
    \tilde m = m_0 + L G^{-1} (z + f), \qquad \tilde C = L G^{-1} L^\top,

undefined where G is not positive definite.

**Exact deletion** of the elements I, held at c, is the Savage-Dickey density ratio; no tiny variance is involved:

.. math::
    \Delta F = \ln N(c; m_I, C_{II}) - \ln N(c; m_{0I}, C_{0II}), \qquad
    \theta_K \mid \theta_I = c \;\sim\; N\!\left(m_K + C_{KI} C_{II}^{-1}(c - m_I),\;
    C_{KK} - C_{KI} C_{II}^{-1} C_{IK}\right)

which presumes the kept prior is the conditional of the full one (for a prior with independent elements: the same).

References:
    Friston and Penny, Post hoc Bayesian model selection (2011).
    Dickey, The Weighted Likelihood Ratio, Linear Hypotheses on Normal Location Parameters (1971).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from pyro.distributions import MultivariateNormal as PyroMultivariateNormal
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from pyrobc.bmr.registry import Reduction, register_reduction
from pyrobc.dists import in_double
from pyrobc.dists.cholesky import log_det, whiten
from pyrobc.errors import ReductionError

__all__ = ["delete", "reduce_multivariate_normal"]

_INADMISSIBLE = "the reduced posterior has no positive definite precision"


def _joint(dist: Distribution) -> tuple[Tensor, Tensor]:
    """Mean (..., elements) and Cholesky factor (..., elements, elements) of a jointly Normal law over one event dim."""
    if isinstance(dist, Independent) and isinstance(dist.base_dist, Normal) and dist.reinterpreted_batch_ndims == 1:
        return dist.base_dist.loc, torch.diag_embed(dist.base_dist.scale)
    if isinstance(dist, MultivariateNormal | LowRankMultivariateNormal):
        return dist.loc, dist.scale_tril
    raise ReductionError(
        "joint Normal reduction",
        got=type(dist).__name__,
        allowed="MultivariateNormal, LowRankMultivariateNormal, Normal(...).to_event(1)",
        fix="give the site one event dimension and a Normal law",
    )


def reduce_multivariate_normal(q: Distribution, p: Distribution, reduced: Distribution) -> Reduction:
    """Full-covariance Normal to Normal, batch by batch; undefined where no Normal posterior exists."""
    (loc, factor), (loc_p, factor_p), (loc_r, factor_r) = (_joint(d) for d in (q, p, reduced))
    batch = torch.broadcast_shapes(loc.shape, loc_p.shape, loc_r.shape)[:-1]
    size = loc.shape[-1]
    factor, factor_p, factor_r = (f.expand(*batch, size, size) for f in (factor, factor_p, factor_r))
    shift = (loc_r - loc_p).expand(*batch, size)[..., None]
    a_matrix, b_matrix = whiten(factor_r, factor), whiten(factor_p, factor)
    z = whiten(factor, (loc - loc_p).expand(*batch, size)[..., None])
    pull = a_matrix.mT @ whiten(factor_r, shift)
    push = whiten(factor, shift) - b_matrix.mT @ whiten(factor_p, shift)
    gain = a_matrix.mT @ a_matrix - b_matrix.mT @ b_matrix
    eye = torch.eye(size, dtype=loc.dtype, device=loc.device)
    growth, failed = torch.linalg.cholesky_ex(eye + gain)
    is_defined = failed == 0
    growth = torch.where(is_defined[..., None, None], growth, eye)
    solved = torch.cholesky_solve(torch.cat([gain @ z - 2.0 * pull, push, z + pull], -1), growth)
    energy = (z.mT @ solved[..., :1] + pull.mT @ solved[..., 1:2])[..., 0, 0]
    delta_f = log_det(factor_p) - log_det(factor_r) - log_det(growth) - 0.5 * energy
    delta_f = torch.where(is_defined, delta_f, math.nan)
    root = whiten(growth, factor.mT)  # root^T root = reduced covariance
    moved = loc_p + (factor @ solved[..., 2:])[..., 0]
    covariance = root.mT @ root
    posterior = PyroMultivariateNormal(moved, scale_tril=_factor(covariance), validate_args=False)
    return Reduction(delta_f, posterior, reason="" if bool(is_defined.all()) else _INADMISSIBLE)


def _factor(covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return torch.where((failed == 0)[..., None, None], factor, math.nan)


for _triple in product((MultivariateNormal, LowRankMultivariateNormal), repeat=3):
    register_reduction(*_triple)(reduce_multivariate_normal)


def delete(q: Distribution, p: Distribution, index: Tensor | Sequence[int], value: Tensor | float = 0.0) -> Reduction:
    """Score deleting the elements ``index`` of a jointly Normal site exactly, all of them together.

    Args:
        q: posterior: MultivariateNormal, LowRankMultivariateNormal or ``Normal.to_event(1)`` over (elements,), batched.
        p: its prior, of one of the same types.
        index: which elements go: positions (deleted,), or a boolean mask (elements,).
        value: what they are held at; broadcasts against (deleted,).

    Returns:
        ``delta_f`` of the batch shape; ``posterior``: the conditional law of the kept elements, in their order, None if
        nothing is kept.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> q = dist.MultivariateNormal(torch.tensor([0.3, 2.0]), torch.tensor([[0.04, 0.01], [0.01, 0.09]]))
        >>> p = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> gone = delete(q, p, [0])
        >>> round(float(gone.delta_f), 5), round(float(gone.posterior.mean), 4)
        (0.48444, 1.925)
    """
    memo: dict[int, object] = {}
    (loc, factor), (loc_p, factor_p) = (_joint(in_double(d, memo)) for d in (q, p))
    size = loc.shape[-1]
    is_gone = _as_mask(index, size, loc.device)
    gone, kept = is_gone.nonzero()[:, 0], (~is_gone).nonzero()[:, 0]
    held = torch.as_tensor(value, dtype=torch.float64, device=loc.device).expand(
        torch.broadcast_shapes(torch.as_tensor(value).shape, (len(gone),))
    )
    covariance, covariance_p = factor @ factor.mT, factor_p @ factor_p.mT
    part, shift, quadratic = _standardise(held, loc, covariance, gone)
    part_p, _, quadratic_p = _standardise(held, loc_p, covariance_p, gone)
    delta_f = log_det(part_p) - log_det(part) - 0.5 * (quadratic - quadratic_p)
    if not len(kept):
        return Reduction(delta_f)
    cross = whiten(part, covariance[..., gone, :][..., kept])
    moved = loc[..., kept] + (cross.mT @ shift)[..., 0]
    left = covariance[..., kept, :][..., kept] - cross.mT @ cross
    return Reduction(delta_f, PyroMultivariateNormal(moved, scale_tril=_factor(left), validate_args=False))


def _standardise(held: Tensor, loc: Tensor, covariance: Tensor, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factor of C_II, whitened deviation and its square."""
    part = torch.linalg.cholesky(covariance[..., gone, :][..., gone])
    shift = whiten(part, (held - loc[..., gone])[..., None])
    return part, shift, shift.square().sum((-2, -1))


def _as_mask(index: Tensor | Sequence[int], size: int, device: torch.device) -> Tensor:
    chosen = torch.as_tensor(index, device=device)
    if chosen.dtype == torch.bool and chosen.shape == (size,):
        return chosen
    is_gone = torch.zeros(size, dtype=torch.bool, device=device)
    if chosen.dtype == torch.bool or chosen.ndim != 1 or bool(((chosen < 0) | (chosen >= size)).any()):
        raise ReductionError(
            "index of delete",
            got=f"{tuple(chosen.shape)} {chosen.dtype} {chosen.flatten()[:8].tolist()}",
            allowed=f"positions from 0 to {size - 1}, or a boolean mask of shape ({size},)",
            fix="list each element to be deleted once",
        )
    is_gone[chosen.long()] = True
    return is_gone
