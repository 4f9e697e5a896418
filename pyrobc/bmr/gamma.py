r"""Gamma, inverse Gamma and Wishart: conjugate laws of rates, variances and precisions.

A conjugate posterior is the prior plus what the data added to its natural parameters.  The reduced posterior is the
reduced prior plus the same, and with the log normaliser :math:`L = -\ln\int` of the unnormalised density

.. math:: \tilde s = q + r - p, \qquad \Delta F = L(q) + L(r) - L(p) - L(\tilde s).

* Gamma(shape a, rate b), the rate of a Poisson or exponential likelihood, and InverseGamma(a, b), a variance:
  :math:`L(a, b) = a \ln b - \ln\Gamma(a)`; defined where :math:`\tilde a, \tilde b > 0`.
* Wishart(:math:`\nu`, scale V) over (d, d) precisions: natural parameters :math:`\nu` and :math:`V^{-1}`,
  :math:`L = -\tfrac12\nu\,(d \ln 2 + \ln|V|) - \ln\Gamma_d(\nu/2)`; defined where :math:`\tilde\nu > d - 1` and
  :math:`\tilde V^{-1}` is positive definite.

References:
    Friston, Litvak, Oswal et al., Bayesian model reduction and empirical Bayes for group (DCM) studies (2016).
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Gamma, InverseGamma, Wishart

from pyrobc.bmr.registry import Reduction, register_reduction
from pyrobc.dists.cholesky import log_det

__all__ = ["reduce_gamma", "reduce_inverse_gamma", "reduce_wishart"]

_INADMISSIBLE = "the reduced posterior would need a concentration or rate that is not positive"


def _log_norm(concentration: Tensor, rate: Tensor) -> Tensor:
    return concentration * torch.log(rate) - torch.lgamma(concentration)


def _conjugate(
    q: Gamma | InverseGamma, p: Gamma | InverseGamma, reduced: Gamma | InverseGamma
) -> tuple[Tensor, Tensor, Tensor, str]:
    concentration = q.concentration + reduced.concentration - p.concentration
    rate = q.rate + reduced.rate - p.rate
    is_defined = (concentration > 0) & (rate > 0)
    safe_concentration = torch.where(is_defined, concentration, torch.ones_like(concentration))
    safe_rate = torch.where(is_defined, rate, torch.ones_like(rate))
    delta_f = (
        _log_norm(q.concentration, q.rate)
        + _log_norm(reduced.concentration, reduced.rate)
        - _log_norm(p.concentration, p.rate)
        - _log_norm(safe_concentration, safe_rate)
    )
    reason = "" if bool(is_defined.all()) else _INADMISSIBLE
    return torch.where(is_defined, delta_f, math.nan), safe_concentration, safe_rate, reason


@register_reduction(Gamma, Gamma, Gamma)
def reduce_gamma(q: Gamma, p: Gamma, reduced: Gamma) -> Reduction:
    """Gamma to Gamma, elementwise."""
    delta_f, concentration, rate, reason = _conjugate(q, p, reduced)
    return Reduction(delta_f, dist.Gamma(concentration, rate, validate_args=False), reason=reason)


@register_reduction(InverseGamma, InverseGamma, InverseGamma)
def reduce_inverse_gamma(q: InverseGamma, p: InverseGamma, reduced: InverseGamma) -> Reduction:
    """InverseGamma to InverseGamma, elementwise."""
    delta_f, concentration, rate, reason = _conjugate(q, p, reduced)
    return Reduction(delta_f, dist.InverseGamma(concentration, rate, validate_args=False), reason=reason)


def _wishart_log_norm(df: Tensor, log_det_scale: Tensor, size: int) -> Tensor:
    log_gamma: Tensor = torch.special.multigammaln(0.5 * df, size)
    return -0.5 * df * (size * math.log(2.0) + log_det_scale) - log_gamma


@register_reduction(Wishart, Wishart, Wishart)
def reduce_wishart(q: Wishart, p: Wishart, reduced: Wishart) -> Reduction:
    """Wishart to Wishart, matrix by matrix."""
    size = q.event_shape[-1]
    df = q.df + reduced.df - p.df
    factor, failed = torch.linalg.cholesky_ex(q.precision_matrix + reduced.precision_matrix - p.precision_matrix)
    is_defined = (failed == 0) & (df > size - 1)
    eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
    factor = torch.where(is_defined[..., None, None], factor, eye)
    df = torch.where(is_defined, df, torch.full_like(df, float(size)))
    terms = [_wishart_log_norm(law.df, 2.0 * log_det(law._unbroadcasted_scale_tril), size) for law in (q, reduced, p)]
    delta_f = terms[0] + terms[1] - terms[2] - _wishart_log_norm(df, -2.0 * log_det(factor), size)
    posterior = Wishart(df, covariance_matrix=torch.cholesky_inverse(factor), validate_args=False)
    reason = "" if bool(is_defined.all()) else "the reduced posterior would not be a proper Wishart"
    return Reduction(torch.where(is_defined, delta_f, math.nan), posterior, reason=reason)
