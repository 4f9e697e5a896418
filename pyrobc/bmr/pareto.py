r"""Pareto smoothing of importance weights, batched.

The largest :math:`M = \lfloor\min(S/5, 3\sqrt S)\rfloor` of S weights are replaced by the quantiles of a generalised
Pareto law fitted to their excesses over the next smaller one.  Its shape, k-hat, says how heavy the tail is: the mean
of the weights can be trusted below :math:`\min(1 - 1/\log_{10} S,\, 0.7)`.

The fit is the profile posterior mean of Zhang and Stephens: for the excesses :math:`x_1 \le \dots \le x_n` and a grid
of :math:`b_i = 1/x_n + (1 - \sqrt{m/(i - \frac12)})/(3 x_{n/4})`,

.. math::
    k(b) = \tfrac1n \sum_j \ln(1 - b x_j), \qquad \ell(b) = n\,[\ln(-b/k(b)) - k(b) - 1], \qquad
    \hat b = \frac{\sum_i b_i e^{\ell(b_i)}}{\sum_i e^{\ell(b_i)}}, \quad \hat\sigma = -k(\hat b)/\hat b,

with k shrunk towards one half by ten pseudo-observations.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry, Pareto Smoothed Importance Sampling (2024).
    Zhang and Stephens, A New and Efficient Estimation Method for the Generalized Pareto Distribution (2009).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["fit_pareto_tail", "khat_limit", "smooth_log_weights"]

_PRIOR_SCALE = 3.0
_PRIOR_DRAWS = 10.0
_BOUNDED = -1.0  # shape of a uniform law: reported where the largest weights are all equal


def khat_limit(num_draws: int) -> float:
    """Largest k-hat at which the mean of ``num_draws`` weights can be trusted."""
    return min(1.0 - 1.0 / math.log10(num_draws), 0.7) if num_draws > 10 else 0.0


def fit_pareto_tail(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k and scale sigma of a generalised Pareto law for ``excess`` (tail, batch), ascending and positive."""
    count = excess.shape[0]
    num_grid = 30 + int(math.sqrt(count))
    step = torch.arange(1, num_grid + 1, dtype=excess.dtype, device=excess.device)[:, None] - 0.5
    quartile = excess[max(int(count / 4.0 + 0.5) - 1, 0)]
    grid = (1.0 - torch.sqrt(num_grid / step)) / (_PRIOR_SCALE * quartile) + 1.0 / excess[-1]
    shape = torch.log1p(-grid[:, None] * excess).mean(1)
    profile = count * (torch.log(-grid / shape) - shape - 1.0)
    mean = (grid * torch.softmax(profile, 0)).sum(0)
    fitted = torch.log1p(-mean * excess).mean(0)
    return (fitted * count + 0.5 * _PRIOR_DRAWS) / (count + _PRIOR_DRAWS), -fitted / mean


def smooth_log_weights(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth the tail of ``log_weights`` (draws, batch).

    Returns:
        Smoothed log weights in the order of the draws, not normalised, and k-hat (batch): -1 where the largest weights
        are all equal, +inf where too few draws have any weight to fit a tail.
    """
    num_draws = log_weights.shape[0]
    num_tail = math.floor(min(0.2 * num_draws, 3.0 * math.sqrt(num_draws)))
    if num_tail < 5:
        return log_weights, torch.full(log_weights.shape[1:], math.inf, dtype=log_weights.dtype)
    top = log_weights.amax(0)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    tail, index = torch.topk(log_weights - top, num_tail + 1, dim=0)
    tail, index = tail.flip(0), index.flip(0)  # ascending; the first is the cutoff
    cutoff = tail[0].exp()
    excess = tail[1:].exp() - cutoff
    is_flat = excess[-1] <= 1e-12
    is_fitted = ~is_flat & (excess[max(int(num_tail / 4.0 + 0.5) - 1, 0)] > 0)
    shape, scale = fit_pareto_tail(torch.where(is_fitted, excess, torch.ones_like(excess).cumsum(0)))
    prob = (torch.arange(num_tail, dtype=shape.dtype, device=shape.device)[:, None] + 0.5) / num_tail
    is_exponential = shape.abs() < 1e-10
    safe = torch.where(is_exponential, torch.ones_like(shape), shape)
    spread = torch.where(is_exponential, -torch.log1p(-prob), torch.expm1(-safe * torch.log1p(-prob)) / safe)
    quantile = torch.log(cutoff + scale * spread).clamp(max=0.0) + top
    replaced = torch.where(is_fitted, quantile, tail[1:] + top)
    khat = torch.where(is_fitted, shape, torch.where(is_flat, _BOUNDED, math.inf))
    return log_weights.scatter(0, index[1:], replaced), khat
