r"""The change of prior by importance sampling, for every triple without a closed form.

With draws :math:`\theta_s \sim q` and weights :math:`w_s = \tilde p(\theta_s)/p(\theta_s)`, the largest of them Pareto
smoothed,

.. math::
    \Delta F = \ln \frac1S \sum_s w_s, \qquad
    \text{MCSE} = \sqrt{\frac1S\left(\frac{\overline{w^2}}{\bar w^2} - 1\right)} \quad\text{(delta method)},

undefined where k-hat exceeds the limit for S draws: the reduced prior then has its mass where q has no draws.
The gradient is that of :math:`\ln\bar w` at fixed smoothed weights, :math:`\sum_s w_s \nabla\ln w_s / \sum_s w_s`.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry, Pareto Smoothed Importance Sampling (2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.bmr.compare import in_support
from pyrobc.bmr.pareto import khat_limit, smooth_log_weights
from pyrobc.bmr.reduction import Reduction
from pyrobc.errors import ReductionError

__all__ = ["average_log_ratios", "estimate_reduction"]

_COLUMNS = 4096  # groups smoothed at a time, to bound memory


def estimate_reduction(
    q: Distribution,
    p: Distribution,
    reduced: Distribution,
    *,
    num_draws: int = 1000,
    generator: torch.Generator | None = None,
) -> Reduction:
    """Estimate the evidence gained from ``num_draws`` draws of ``q``; the reduced posterior is not available."""
    names = ", ".join(type(law).__name__ for law in (q, p, reduced))
    if q.support.is_discrete:  # type: ignore[union-attr]
        raise ReductionError(
            f"reduction ({names})",
            got="a discrete site without a closed form",
            allowed="Bernoulli, Categorical, or a reduced prior Delta",
            fix="register one with pyrobc.bmr.register_reduction, or marginalise the site out of the model",
        )
    if num_draws < 1:
        raise ReductionError(
            f"reduction ({names})",
            got=f"num_draws={num_draws} and no closed form for these types",
            allowed="a closed form, or num_draws >= 100",
            fix="pass num_draws=1000, or register one with pyrobc.bmr.register_reduction",
        )
    with _forked(generator):
        draws = q.rsample((num_draws,)) if q.has_rsample else q.sample((num_draws,))
    return average_log_ratios(_log_density(reduced, draws) - _log_density(p, draws))


def _log_density(law: Distribution, draws: Tensor) -> Tensor:
    is_inside = in_support(law, draws)
    return torch.where(is_inside, law.log_prob(draws), -math.inf)


def average_log_ratios(log_weights: Tensor) -> Reduction:
    """Evidence gained from ln w of shape (draws, *batch): ln of the mean weight, its error and its k-hat."""
    num_draws, shape = log_weights.shape[0], log_weights.shape[1:]
    flat = log_weights.reshape(num_draws, -1)
    values = flat.detach().double()
    is_broken = (torch.isnan(values) | torch.isposinf(values)).any(0)
    values = torch.where(is_broken, torch.zeros_like(values), values)
    parts = [smooth_log_weights(part) for part in values.split(_COLUMNS, dim=1)]
    smooth, khat = torch.cat([s for s, _ in parts], 1), torch.cat([k for _, k in parts])
    total = torch.logsumexp(smooth, 0)
    share = torch.exp(smooth - torch.where(torch.isfinite(total), total, torch.zeros_like(total)))
    mcse = (share.square().sum(0) - 1.0 / num_draws).clamp(min=0.0).sqrt()
    limit = khat_limit(num_draws)
    is_defined = ~is_broken & (khat <= limit)
    live = torch.where((share > 0) & is_defined, flat, torch.zeros_like(flat))
    carried = (share * (live - live.detach())).sum(0)
    delta_f = torch.where(is_defined, total - math.log(num_draws) + carried, math.nan)
    return Reduction(
        delta_f.reshape(shape),
        mcse=torch.where(is_defined, mcse, math.nan).reshape(shape),
        khat=khat.reshape(shape),
        reason=_explain(is_broken, khat, limit),
    )


def _explain(is_broken: Tensor, khat: Tensor, limit: float) -> str:
    if bool(is_broken.any()):
        return "the posterior has draws where the full prior has no density"
    if bool((khat > limit).any()):
        worst = float(khat.max())
        return f"Pareto k-hat {worst:.2f} above {limit:.2f}: too few draws where the reduced prior has its mass"
    return ""


@contextmanager
def _forked(generator: torch.Generator | None) -> Iterator[None]:
    """Draw from ``generator`` (distributions take none themselves) and leave the global stream as it was."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
