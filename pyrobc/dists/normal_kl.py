r"""KL of a whole tensor of Normals against one Normal as a single number, in one pass forward and one backward.

.. math::
    KL = \tfrac12\sum_i\Big[\frac{(m_i - \mu)^2 + s_i^2}{S^2} - 1 - \ln\frac{s_i^2}{S^2}\Big]\ \text{nats}, \qquad
    \frac{\partial KL}{\partial m_i} = \frac{m_i - \mu}{S^2}, \quad
    \frac{\partial KL}{\partial s_i} = \frac{s_i}{S^2} - \frac1{s_i},

over the entries that are kept.  It is the registered elementwise divergence, summed (a test holds them equal), at a
fifth of the memory traffic, which is what a step costs where layers are large and batches small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from pyrobc.dists.pruned_normal import PrunedNormal

__all__ = ["sum_kl"]


def sum_kl(law: Distribution, prior: Distribution) -> Tensor:
    """KL(law || prior) as one number, nats, whatever the batch and event shapes."""
    q: Any = law.base_dist if isinstance(law, Independent) else law
    p: Any = prior.base_dist if isinstance(prior, Independent) else prior
    is_normal = isinstance(q, Normal | PrunedNormal) and isinstance(p, Normal) and q.batch_shape == p.batch_shape
    if is_normal and _is_one(p.loc) and _is_one(p.scale):
        kept = q.kept if isinstance(q, PrunedNormal) else None
        center, scale = (part.detach().flatten()[0] for part in (p.loc, p.scale))
        value: Tensor = _SumKl.apply(q.loc, q.scale, kept, center, scale)
        return value
    return kl_divergence(law, prior).sum()


def _is_one(value: Tensor) -> bool:
    """Whether a tensor is one number, expanded, that nobody trains."""
    return value.numel() > 0 and not any(value.stride()) and not value.requires_grad


class _SumKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, spread: Tensor, kept: Tensor | None, center: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, spread, kept, center, scale)
        away, width = (loc - center).flatten(), spread.flatten()
        if kept is None:
            count, log_width = torch.full_like(scale, width.numel()), width.log().sum()
        else:
            mask = kept.flatten()
            away, count, log_width = away * mask, mask.sum(), torch.where(mask, width, 1.0).log().sum()
        return 0.5 * (away.dot(away) + width.dot(width)) / scale**2 - log_width + count * (scale.log() - 0.5)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        loc, spread, kept, center, scale = ctx.saved_tensors
        (gradient,) = gradients
        to_loc, inverse = (loc - center).mul_(gradient / scale**2), spread.reciprocal()
        if kept is not None:
            to_loc, inverse = to_loc.mul_(kept), torch.where(kept, inverse, 0.0)
        return to_loc, torch.sub(spread * scale**-2, inverse).mul_(gradient), None, None, None
