r"""Regression models whose evidence is known: linear (conjugate), logistic, Poisson and ARD, as ordinary Pyro models.

**Linear, known noise.**  :math:`y = X\beta + \varepsilon`, :math:`\varepsilon \sim N(0, \sigma^2 I)`,
:math:`\beta \sim N(m_0, C_0)`, with ``X`` of shape (rows, features).  With :math:`C_0 = L L^\top`,
:math:`\beta = m_0 + L z` and :math:`z \sim N(0, I)` the posterior is a least-squares problem in ``z``,

.. math::
    A = \begin{pmatrix} X L / \sigma \\ I \end{pmatrix} = Q R, \qquad
    b = \begin{pmatrix} (y - X m_0) / \sigma \\ 0 \end{pmatrix}, \qquad
    \beta \mid y \sim N\!\big(m_0 + L R^{-1} Q^\top b,\; L R^{-1} R^{-\top} L^\top\big),

    \ln p(y) = -\tfrac{n}{2}\ln 2\pi\sigma^2 - \sum_i \ln |R_{ii}| - \tfrac12 \lVert b - Q Q^\top b \rVert^2 .

Everything follows from the triangular factor of :math:`(A\; b)`, so the normal equations, which square the condition
number, are never formed.

**Linear, unknown noise** (Normal-Gamma).  The same with :math:`\beta \mid \tau \sim N(m_0, C_0/\tau)`, noise precision
:math:`\tau \sim \mathrm{Gamma}(a, b_0)`.  With :math:`\sigma = 1` above and
:math:`S = \lVert b - QQ^\top b \rVert^2`: :math:`a_n = a + n/2`, :math:`b_n = b_0 + S/2`,
:math:`\beta \mid \tau, y \sim N(m, C/\tau)`, and

.. math::
    \ln p(y) = -\tfrac{n}{2}\ln 2\pi - \sum_i \ln |R_{ii}|
        + a \ln b_0 - \ln\Gamma(a) + \ln\Gamma(a_n) - a_n \ln b_n .

**Logistic and Poisson** share the linear predictor; their evidence has no closed form.  **ARD** gives each feature its
own precision :math:`\alpha_j \sim \mathrm{Gamma}`, so a feature's prior depends on another latent site.

All log evidences are in nats and include every constant.

References:
    Bishop, *Pattern Recognition and Machine Learning*, chapters 3 and 7 (2006); MacKay, *Bayesian
    Interpolation* (1992).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrobc.errors import DataError

__all__ = [
    "ARDRegression",
    "LinearFit",
    "LinearRegression",
    "LogisticRegression",
    "PoissonRegression",
    "fit_linear",
]


@dataclass(frozen=True)
class LinearFit:
    """Exact posterior of a linear regression.

    Attributes:
        weights: posterior of the weights, shape (features,).  With unknown noise it is the law of the weights
            *given unit noise precision*: the covariance is divided by the precision.
        noise: posterior of the noise precision; None where the noise was given.
        log_evidence: ln p(y), nats, scalar.
    """

    weights: dist.MultivariateNormal
    noise: dist.Gamma | None
    log_evidence: Tensor


def fit_linear(
    x: Tensor,
    y: Tensor,
    prior: dist.MultivariateNormal,
    noise: float | dist.Gamma,
) -> LinearFit:
    """Compute the exact posterior and log evidence of a linear regression, in float64.

    Args:
        x: predictors, shape (rows, features).
        y: responses, shape (rows,).
        prior: law of the weights, event shape (features,); per unit of noise precision when ``noise`` is a Gamma.
        noise: standard deviation of the noise, in units of ``y``, or the prior of its precision.

    Raises:
        DataError: shapes that do not fit, values that are not finite, a noise that is not positive.
    """
    x, y = x.double(), y.double()
    _check_data(x, y)
    if prior.event_shape != x.shape[1:]:
        raise DataError(
            "prior of the weights",
            got=f"event shape {tuple(prior.event_shape)}",
            allowed=f"({x.shape[1]},), one entry per column of x",
            fix="build the prior from the columns that are kept",
        )
    if not isinstance(noise, dist.Gamma) and not 0 < noise < math.inf:
        raise DataError(
            "noise", got=repr(noise), allowed="a positive standard deviation, or a Gamma", fix="pass noise > 0"
        )
    scale = 1.0 if isinstance(noise, dist.Gamma) else float(noise)
    num_rows, num_features = x.shape
    loc, tril = prior.loc.double(), prior.scale_tril.double()
    design = torch.cat([x @ tril / scale, torch.eye(num_features, dtype=x.dtype)])
    target = torch.cat([(y - x @ loc) / scale, x.new_zeros(num_features)])
    factor = torch.linalg.qr(torch.cat([design, target[:, None]], dim=1), mode="r").R
    root = torch.linalg.solve_triangular(factor[:-1, :-1], tril, upper=True, left=False)
    law = dist.MultivariateNormal(loc + root @ factor[:-1, -1], covariance_matrix=root @ root.mT)
    half_log_det = factor.diagonal()[:-1].abs().log().sum()
    residual = factor[-1, -1].square()
    constant = -0.5 * num_rows * math.log(2 * math.pi) - num_rows * math.log(scale) - half_log_det
    if not isinstance(noise, dist.Gamma):
        return LinearFit(law, None, constant - 0.5 * residual)
    shape, rate = noise.concentration.double(), noise.rate.double()
    shape_n, rate_n = shape + 0.5 * num_rows, rate + 0.5 * residual
    log_evidence = constant + shape * rate.log() - shape.lgamma() + shape_n.lgamma() - shape_n * rate_n.log()
    return LinearFit(law, dist.Gamma(shape_n, rate_n), log_evidence)


def _check_data(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.shape != x.shape[:1] or x.shape[0] == 0 or x.shape[1] == 0:
        raise DataError(
            "regression data",
            got=f"x of shape {tuple(x.shape)}, y of shape {tuple(y.shape)}",
            allowed="x of shape (rows, features) and y of shape (rows,), both at least 1",
            fix="reshape the data; a single predictor is x[:, None]",
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise DataError("regression data", got="NaN or inf", allowed="finite values", fix="drop or impute those rows")


def _sample_weights(x: Tensor, scale: Tensor) -> Tensor:
    """Sample site ``weights``, one per column of ``x``, from N(0, scale^2)."""
    with pyro.plate("features", x.shape[1]):
        weights: Tensor = pyro.sample("weights", dist.Normal(x.new_zeros(x.shape[1]), scale.expand(x.shape[1])))
    return weights


@dataclass(frozen=True)
class LinearRegression:
    """Linear regression without intercept: centre ``x`` and ``y`` first.

    Sites: ``weights`` (plate ``features``), ``precision`` (only with a Gamma ``noise``), ``y`` (plate ``data``).

    Attributes:
        weight_scale: prior standard deviation of the weights (of the weights per unit noise with a Gamma ``noise``).
        noise: standard deviation of the noise, or the Gamma prior of its precision.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> fit = LinearRegression(noise=1.0).fit_exactly(x, torch.tensor([1.0, 2.0]))
        >>> round(float(fit.weights.loc), 4)
        0.8333
    """

    weight_scale: float = 1.0
    noise: float | dist.Gamma = 1.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative model for predictors ``x`` of shape (rows, features)."""
        weight_scale = x.new_tensor(self.weight_scale)
        if isinstance(self.noise, dist.Gamma):
            scale = pyro.sample("precision", self.noise).to(x.dtype).rsqrt()
            weight_scale = weight_scale * scale
        else:
            scale = x.new_tensor(self.noise)
        weights = _sample_weights(x, weight_scale)
        with pyro.plate("data", x.shape[0]):
            response: Tensor = pyro.sample("y", dist.Normal(weights @ x.mT, scale), obs=y)
        return response

    def prior(self, num_features: int) -> dist.MultivariateNormal:
        """The law of the weights as one float64 vector."""
        scale_tril = self.weight_scale * torch.eye(num_features, dtype=torch.float64)
        return dist.MultivariateNormal(torch.zeros(num_features, dtype=torch.float64), scale_tril=scale_tril)

    def fit_exactly(self, x: Tensor, y: Tensor) -> LinearFit:
        """Exact posterior and log evidence, nats: see :func:`fit_linear`."""
        return fit_linear(x, y, self.prior(x.shape[-1]), self.noise)


@dataclass(frozen=True)
class LogisticRegression:
    """Bernoulli responses, logit link.

    Sites: ``intercept``, ``weights`` (plate ``features``), ``y`` (plate ``data``).
    """

    weight_scale: float = 1.0
    intercept_scale: float = 5.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative model for predictors ``x`` of shape (rows, features)."""
        logits = _sample_predictor(x, self.weight_scale, self.intercept_scale)
        with pyro.plate("data", x.shape[0]):
            response: Tensor = pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)
        return response


@dataclass(frozen=True)
class PoissonRegression:
    """Counts, log link.

    Sites: ``intercept``, ``weights`` (plate ``features``), ``y`` (plate ``data``).
    """

    weight_scale: float = 1.0
    intercept_scale: float = 5.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative model for predictors ``x`` of shape (rows, features)."""
        log_rate = _sample_predictor(x, self.weight_scale, self.intercept_scale)
        with pyro.plate("data", x.shape[0]):
            response: Tensor = pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)
        return response


def _sample_predictor(x: Tensor, weight_scale: float, intercept_scale: float) -> Tensor:
    """Sample sites ``intercept`` and ``weights``; return the linear predictor, shape (..., rows)."""
    intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), x.new_tensor(intercept_scale)))
    weights = _sample_weights(x, x.new_tensor(weight_scale))
    return weights @ x.mT + intercept


@dataclass(frozen=True)
class ARDRegression:
    """Linear regression with automatic relevance determination: a precision per feature.

    Sites: ``relevance`` (precisions) and ``weights`` (plate ``features``), ``y`` (plate ``data``).

    Attributes:
        shape: shape of the Gamma prior of each precision.
        rate: its rate.
        noise: standard deviation of the noise.
    """

    shape: float = 1.0
    rate: float = 1.0
    noise: float = 1.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative model for predictors ``x`` of shape (rows, features)."""
        prior = dist.Gamma(x.new_tensor(self.shape), x.new_tensor(self.rate))
        with pyro.plate("features", x.shape[1]):
            relevance = pyro.sample("relevance", prior.expand([x.shape[1]]))
            weights = pyro.sample("weights", dist.Normal(x.new_zeros(()), relevance.rsqrt()))
        with pyro.plate("data", x.shape[0]):
            response: Tensor = pyro.sample("y", dist.Normal(weights @ x.mT, x.new_tensor(self.noise)), obs=y)
        return response
