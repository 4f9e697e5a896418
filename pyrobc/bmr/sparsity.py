r"""Sparsity learned from prices: spike-and-slab with a learned inclusion rate, and tuned reduced priors.

**Spike and slab.**  Every group is kept (:math:`z_g = 1`) with probability :math:`\pi \sim \mathrm{Beta}(a, b)` or
fixed at its spike, and the evidence of ``z`` over keeping everything is :math:`\sum_g (1 - z_g)\,\Delta F_g` (exact
where groups are independent in posterior and prior).  Mean-field variational Bayes over ``z`` and :math:`\pi`
(Marković, Friston and Kiebel 2024) iterates

.. math:: \rho_g = \sigma(\zeta - \Delta F_g), \quad A = a + \textstyle\sum_g \rho_g,\quad
    B = b + \sum_g (1 - \rho_g), \quad \zeta = \psi(A) - \psi(B)

and each step raises the bound on the log evidence gained, in nats,

.. math:: \mathcal L = \sum_g \big[(1 - \rho_g)\Delta F_g + H(\rho_g)\big] + \ln B(A, B) - \ln B(a, b).

A group is kept where :math:`\rho_g \ge 1/2`, that is :math:`\Delta F_g \le \zeta`.  The iteration is one of a single
number, :math:`\zeta \leftarrow g(\zeta)`, so that memory does not grow with the groups.  Of more than a million, every
n-th leads to a :math:`\zeta` from which Newton's steps on :math:`g(\zeta) - \zeta` need a handful of passes over all,
with :math:`g' = (\psi'(A) + \psi'(B)) \sum_g \rho_g (1 - \rho_g)`; where that is near one, plain steps go on.

**Tuned reduced prior.**  :math:`\max_\eta\; \sum \Delta F(\tilde p_\eta) + \ln p(\eta)` by gradient (empirical Bayes).

**Regularised horseshoe** (Piironen and Vehtari 2017): :math:`\tilde p_i = N(0, \gamma_i^2)` with
:math:`\gamma_i^2 = c^2\tau^2\lambda_i^2 / (c^2 + \tau^2\lambda_i^2)`, :math:`\lambda_i \sim C^+(0, 1)`,
:math:`\tau \sim C^+(0, \tau_0)`, :math:`c^2 \sim \mathrm{InvGamma}(s, r)`.  A Normal posterior over
:math:`(\ln\lambda, \ln\tau, \ln c^2)` maximises :math:`E[\sum_i \Delta F_i(\gamma_i)] - \mathrm{KL}`; the full model is
never refitted.  The scale reported is the one with the mean precision, :math:`\hat\gamma_i = E[\gamma_i^{-2}]^{-1/2}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.distributions import Beta, Normal
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.bmr.registry import Reduction, reduce
from pyrobc.errors import ReductionError
from pyrobc.selection import split_flat

__all__ = ["HorseshoeFit", "LearnedInclusion", "fit_horseshoe", "learn_inclusion", "learn_log_odds", "optimise_reduced"]

_SAMPLE = 1 << 20  # prices at most that are all looked at in every step
_STEEP = 0.95  # slope of the iteration above which Newton's steps are not trusted


@dataclass(frozen=True)
class LearnedInclusion:
    """Inclusion probabilities under a learned rate.

    Attributes:
        inclusion: probability that each group is kept, shape (groups,); 1 where the price is undefined.
        kept: boolean, shape (groups,).
        log_odds: the learned prior log-odds of keeping a group, nats: the threshold on ΔF.
        rate: posterior of the inclusion rate.
        bound: lower bound on the log evidence gained over keeping everything, nats.
    """

    inclusion: Tensor
    kept: Tensor
    log_odds: Tensor
    rate: Beta
    bound: Tensor


def learn_inclusion(
    delta_f: Tensor, prior: tuple[float, float] = (1.0, 1.0), *, tolerance: float = 1e-10, max_steps: int = 1000
) -> LearnedInclusion:
    """Learn the inclusion rate from the prices of deleting each group.

    Args:
        delta_f: nats, shape (groups,).  NaN and +inf are kept and teach nothing; -inf is a group that must stay.
        prior: shapes (a, b) of the Beta prior of the inclusion rate.
        tolerance: stop when the log-odds change by less.
        max_steps: iterations before giving up.

    Raises:
        ReductionError: shapes that are not positive, no price that is defined, or no convergence.
    """
    log_odds, shape_a, shape_b, last = _iterate_log_odds(delta_f, prior, tolerance, max_steps)
    prices = delta_f.detach().double().reshape(-1)
    is_defined = ~prices.isnan() & (prices < torch.inf)
    a, b = torch.tensor(prior, dtype=torch.float64)
    known = prices[is_defined]
    rho = torch.sigmoid(last - known)
    gain = torch.where(known.isneginf(), 0.0, (1 - rho) * known)
    entropy = -torch.xlogy(rho, rho) - torch.xlogy(1 - rho, 1 - rho)
    bound = (gain + entropy).sum() + _log_beta(shape_a, shape_b) - _log_beta(a, b)
    inclusion = torch.ones_like(prices)
    inclusion[is_defined] = rho
    kept = ~(is_defined & (prices > log_odds))
    return LearnedInclusion(
        inclusion.reshape(delta_f.shape), kept.reshape(delta_f.shape), log_odds, Beta(shape_a, shape_b), bound
    )


def learn_log_odds(
    delta_f: Tensor, prior: tuple[float, float] = (1.0, 1.0), *, tolerance: float = 1e-10, max_steps: int = 1000
) -> Tensor:
    """``learn_inclusion(...).log_odds`` alone, without memory that grows with the groups."""
    return _iterate_log_odds(delta_f, prior, tolerance, max_steps)[0]


def _iterate_log_odds(
    delta_f: Tensor, prior: tuple[float, float], tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log odds, shapes of the rate's Beta posterior, and the log odds that these came from."""
    prices = delta_f.detach().reshape(-1)
    chunks = split_flat(prices)
    counts = [int((chunk < torch.inf).sum()) for chunk in chunks]  # NaN is not less
    total = sum(counts)
    if min(prior) <= 0 or not total:
        raise ReductionError(
            "inclusion rate",
            got=f"prior {prior}, {total} defined prices",
            allowed="positive Beta shapes and at least one defined price",
            fix="look at the reasons of the prices",
        )
    a, b = torch.tensor(prior, dtype=torch.float64)
    log_odds, is_near = a.digamma() - b.digamma(), False
    sample = prices[:: -(-len(prices) // _SAMPLE)]
    if len(sample) < len(prices) and bool((sample < torch.inf).any()):
        log_odds, is_near = _iterate_log_odds(sample, prior, tolerance, max_steps)[0], True
    for _ in range(max_steps):
        included, slope = torch.zeros(2, dtype=torch.float64)
        for chunk, count in zip(chunks, counts, strict=True):
            known = chunk if count == len(chunk) else chunk[chunk < torch.inf]
            rho = torch.sigmoid(log_odds - known.double())
            included += rho.sum()
            slope += rho.sum() - rho.dot(rho) if is_near else 0.0
        shape_a, shape_b = a + included, b + (total - included)
        previous, log_odds = log_odds, shape_a.digamma() - shape_b.digamma()
        change = log_odds - previous
        if change.abs() < tolerance:
            return log_odds, shape_a, shape_b, previous
        slope *= shape_a.polygamma(1) + shape_b.polygamma(1)
        if is_near and slope < _STEEP:
            log_odds = previous + change / (1 - slope)
    raise ReductionError(
        "inclusion rate",
        got=f"no convergence in {max_steps} steps",
        allowed="a change of the log-odds below the tolerance",
        fix="raise max_steps",
    )


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return a.lgamma() + b.lgamma() - (a + b).lgamma()


def optimise_reduced(
    q: Distribution,
    p: Distribution,
    family: Callable[[Tensor], Distribution],
    start: Tensor,
    *,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    max_steps: int = 200,
) -> tuple[Tensor, Reduction]:
    """Choose the reduced prior of a family that gains the most evidence, by L-BFGS.

    Args:
        q: posterior.
        p: prior it answers to.
        family: from unconstrained hyper-parameters to a reduced prior with a closed form against ``q`` and ``p``.
        start: hyper-parameters to start from, any shape.
        log_prior: log density of the hyper-parameters, nats, scalar; default flat.
        max_steps: iterations at most.

    Returns:
        The hyper-parameters, float64, and the reduction they give.

    Raises:
        ReductionError: the price is undefined at ``start`` or where the search went.
    """
    eta = start.detach().double().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([eta], max_iter=max_steps, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def lose() -> Tensor:
        optimiser.zero_grad()
        loss = -reduce(q, p, family(eta), num_draws=0).delta_f.sum()
        loss = loss if log_prior is None else loss - log_prior(eta)
        loss.backward()
        return loss

    optimiser.step(lose)
    found = eta.detach()
    reduction = reduce(q, p, family(found), num_draws=0)
    if not (found.isfinite().all() and reduction.delta_f.isfinite().all()):
        raise ReductionError(
            "tuned reduced prior",
            got=f"a price that is not finite ({reduction.reason or 'divergence'})",
            allowed="finite prices along the search",
            fix="start nearer to the full prior, or pass log_prior",
        )
    return found, reduction


@dataclass(frozen=True)
class HorseshoeFit:
    """Regularised horseshoe fitted to a posterior.

    Attributes:
        scale: effective prior scale of each element, in units of the element, shape of the posterior.
        reduction: what the Normal priors of these scales are worth, elementwise.
        global_scale: posterior median of the global scale.
        slab: posterior median of the slab scale.
        bound: lower bound on the log evidence gained with all scales integrated out, nats, mean over the last steps.
    """

    scale: Tensor
    reduction: Reduction
    global_scale: Tensor
    slab: Tensor
    bound: Tensor


def fit_horseshoe(
    q: Normal,
    p: Normal,
    *,
    global_scale: float = 0.1,
    slab: tuple[float, float] = (2.0, 6.0),
    num_steps: int = 1500,
    num_particles: int = 16,
    lr: float = 0.05,
    seed: int = 0,
) -> HorseshoeFit:
    """Fit a regularised horseshoe to a Normal posterior by stochastic gradients on its prices.

    A posterior wider than its prior, which noise in a fit can leave, is taken as wide as the prior: the data say
    nothing about that element, and the price of a wide reduced prior would be undefined.

    Args:
        q: posterior, Normal over elements.
        p: its Normal prior.
        global_scale: scale of the half-Cauchy prior of the global scale.
        slab: shape and rate of the inverse-Gamma prior of the squared slab scale.
        num_steps: Adam steps; the rate falls to zero along a cosine.
        num_particles: draws per step.
        lr: first learning rate.
        seed: of the draws.
    """
    loc = q.loc.detach().double()
    prior = Normal(p.loc.detach().double(), p.scale.detach().double())
    posterior = Normal(loc, torch.minimum(q.scale.detach().double(), prior.scale))
    generator = torch.Generator().manual_seed(seed)
    size = loc.numel()
    start = torch.zeros(size + 2, dtype=torch.float64)
    start[size], start[size + 1] = math.log(global_scale), math.log(slab[1] / (slab[0] + 1))
    mean, log_sd = start.requires_grad_(), torch.full_like(start, -1.0).requires_grad_()
    optimiser = torch.optim.Adam([mean, log_sd], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    bounds = []
    for _ in range(num_steps):
        noise = torch.randn(num_particles, size + 2, generator=generator, dtype=torch.float64)
        draws = mean + log_sd.exp() * noise
        gamma = _scales(draws, loc.shape)
        gained = reduce(posterior, prior, Normal(torch.zeros_like(gamma), gamma)).delta_f.reshape(num_particles, -1)
        log_p = _log_hyperprior(draws, global_scale, slab)
        entropy = log_sd.sum() + 0.5 * (size + 2) * math.log(2 * math.pi * math.e)
        bound = (gained.sum(1) + log_p).mean() + entropy
        optimiser.zero_grad()
        (-bound).backward()
        optimiser.step()
        schedule.step()
        bounds.append(bound.detach())
    with torch.no_grad():
        noise = torch.randn(1000, size + 2, generator=generator, dtype=torch.float64)
        gamma = _scales(mean + log_sd.exp() * noise, loc.shape)
        effective = gamma.pow(-2).mean(0).rsqrt()
        reduction = reduce(posterior, prior, Normal(torch.zeros_like(effective), effective))
    final = mean.detach()
    return HorseshoeFit(
        scale=effective,
        reduction=reduction,
        global_scale=final[size].exp(),
        slab=(0.5 * final[size + 1]).exp(),
        bound=torch.stack(bounds[-num_steps // 10 :]).mean(),
    )


def _scales(draws: Tensor, shape: torch.Size) -> Tensor:
    """Prior scales gamma, (particles, *shape), from (log local, log global, log squared slab) draws."""
    log_free, log_slab = 2 * (draws[:, :-2] + draws[:, -2:-1]), draws[:, -1:]
    log_square = log_free + log_slab - torch.logaddexp(log_free, log_slab)
    return (0.5 * log_square).exp().reshape(-1, *shape)


def _log_hyperprior(draws: Tensor, global_scale: float, slab: tuple[float, float]) -> Tensor:
    """Log density of the draws in log coordinates, nats, shape (particles,)."""
    log_local, log_global, log_slab = draws[:, :-2], draws[:, -2] - math.log(global_scale), draws[:, -1]
    half_cauchy = math.log(2 / math.pi) + log_local - torch.nn.functional.softplus(2 * log_local)
    half_cauchy_global = math.log(2 / math.pi) + log_global - torch.nn.functional.softplus(2 * log_global)
    shape, rate = slab
    inverse_gamma = shape * math.log(rate) - math.lgamma(shape) - shape * log_slab - rate * (-log_slab).exp()
    return half_cauchy.sum(1) + half_cauchy_global + inverse_gamma
