r"""What the network's output says about the targets: Categorical, Normal with a learned scale, Bernoulli.

Each also says how well a row is predicted by the other rows' targets alone, whatever the inputs: what a fit must beat.
With reference priors (Jeffreys' for frequencies, :math:`1/\sigma` for location and scale) the predictive law of row i
given the others is, of n rows of which :math:`n_k` have class k of K,

.. math::
    p(y_i = k \mid y_{-i}) = \frac{n_k - 1 + 1/2}{n - 1 + K/2}, \qquad
    y_i \mid y_{-i} \sim t_{n-2}\Big(\bar y_{-i},\; s_{-i}\sqrt{1 + \tfrac1{n-1}}\Big),

the first also for each 0 or 1 with K = 2, the second for each real output, :math:`s^2` with denominator n - 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.errors import ConfigError, DataError, suggest
from pyrobc.meanfield import Factor, LogNormalFactor
from pyrobc.moments import Moments

__all__ = ["Bernoulli", "Categorical", "Likelihood", "Normal", "make_likelihood"]


class Likelihood(ABC):
    """Targets given outputs; parameters of its own are latent sites like any other."""

    name: ClassVar[str]
    loss_name: ClassVar[str]

    @abstractmethod
    def distribution(self, outputs: Tensor, values: Mapping[str, Tensor]) -> Distribution:
        """Law of the targets, batch shape ``[rows]``."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What users call the error, per row: wrong label (0 or 1), or squared error."""

    @abstractmethod
    def predict_constant(self, targets: Tensor, num_classes: int) -> Tensor:
        """Log density of every row's target given those of the other rows, in nats, float64, shape ``[rows]``.

        Args:
            targets: of all rows.
            num_classes: outputs of the network, which classes are as many as.
        """

    @abstractmethod
    def check(self, targets: Tensor, outputs: Tensor) -> None:
        """Raise a ``DataError`` for targets that this likelihood cannot have produced."""

    @abstractmethod
    def curvature(self, moments: Moments, values: Mapping[str, Tensor]) -> Tensor:
        """Trace of covariance times minus the Hessian of the log likelihood in the outputs, at their mean, per row.

        Half of it is what noise of the outputs costs in expected log likelihood, to second order, in nats.
        """

    def priors(self, like: Tensor) -> dict[str, Distribution]:
        """Prior of the likelihood's own sites."""
        return {}

    def factors(self, like: Tensor) -> dict[str, Factor]:
        """Variational factors of the likelihood's own sites."""
        return {}


class Categorical(Likelihood):
    """Class labels from logits ``[rows, classes]``."""

    name = "categorical"
    loss_name = "error"

    def distribution(self, outputs: Tensor, values: Mapping[str, Tensor]) -> Distribution:
        """Categorical over the last axis."""
        return dist.Categorical(logits=outputs, validate_args=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One where the most probable class is not the target."""
        return (outputs.argmax(-1) != targets).to(outputs.dtype)

    def curvature(self, moments: Moments, values: Mapping[str, Tensor]) -> Tensor:
        """Of probabilities p: the sum of p times variance, less the variance of their mean under p."""
        p = moments.mean.softmax(-1)
        if not moments.is_full:
            return (p * (1 - p) * moments.variance).sum(-1)
        return (p * moments.variance).sum(-1) - torch.einsum("ri,rij,rj->r", p, moments.covariance, p)

    def predict_constant(self, targets: Tensor, num_classes: int) -> Tensor:
        """By how often the other rows have the class."""
        labels = targets.long()  # bytes count too
        return _predict_frequency(torch.bincount(labels, minlength=num_classes)[labels], len(labels), num_classes)

    def check(self, targets: Tensor, outputs: Tensor) -> None:
        """Integer labels between 0 and the number of outputs."""
        classes = outputs.shape[-1]
        if targets.is_floating_point() or targets.dim() != 1:
            is_column = targets.shape[1:].numel() == 1
            raise DataError(
                "labels",
                got=f"{targets.dtype} of shape {tuple(targets.shape)}",
                allowed="integers of shape (rows,)",
                fix=f"pass class numbers, for instance {'y.flatten().long()' if is_column else 'y.argmax(1)'}",
            )
        if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= classes):
            raise DataError(
                "labels",
                got=f"values from {int(targets.min())} to {int(targets.max())}",
                allowed=f"0 to {classes - 1}, as the network has {classes} outputs",
                fix="number the classes from 0, or give the network more outputs",
            )


class Normal(Likelihood):
    """Real targets with one learned noise scale, ``scale ~ LogNormal(0, 1)``."""

    name = "normal"
    loss_name = "squared error"

    def distribution(self, outputs: Tensor, values: Mapping[str, Tensor]) -> Distribution:
        """Normal around the outputs; trailing axes are one event."""
        law: Distribution = dist.Normal(outputs, values["y.scale"], validate_args=False).to_event(outputs.dim() - 1)
        return law

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error, summed over outputs."""
        return (outputs - targets).square().reshape(len(outputs), -1).sum(1)

    def curvature(self, moments: Moments, values: Mapping[str, Tensor]) -> Tensor:
        """Variances in units of the noise's: exact, as the log likelihood is quadratic."""
        return moments.variance.flatten(1).sum(1) / values["y.scale"].square()

    def predict_constant(self, targets: Tensor, num_classes: int) -> Tensor:
        """Student's t around the mean of the other rows; NaN below three rows, or where the others do not differ."""
        y, n = targets.double().reshape(len(targets), -1), len(targets)
        if n < 3:
            return y.new_full((n,), torch.nan)
        centred = y - y.mean(0)
        mean = -centred / (n - 1)  # of the others, from the mean of all
        squares = (centred.square().sum(0) - centred.square() * (n / (n - 1))).clamp_min(0.0)
        scale = (squares / (n - 2) * (n / (n - 1))).sqrt()
        law = dist.StudentT(n - 2.0, mean, scale, validate_args=False)
        return torch.where((scale > 0).all(1), law.log_prob(centred).sum(1), torch.nan)

    def check(self, targets: Tensor, outputs: Tensor) -> None:
        """Finite reals of the outputs' shape."""
        _check_reals(targets, outputs)

    def priors(self, like: Tensor) -> dict[str, Distribution]:
        """LogNormal(0, 1) on the scale."""
        return {"y.scale": dist.LogNormal(like.new_zeros(()), like.new_ones(()), validate_args=False)}

    def factors(self, like: Tensor) -> dict[str, Factor]:
        """A log-normal started at a scale of one."""
        return {"y.scale": LogNormalFactor(like.new_zeros(()), log_scale=-3.0)}


class Bernoulli(Likelihood):
    """Zeros and ones from logits."""

    name = "bernoulli"
    loss_name = "error"

    def distribution(self, outputs: Tensor, values: Mapping[str, Tensor]) -> Distribution:
        """Independent Bernoullis; trailing axes are one event."""
        law: Distribution = dist.Bernoulli(logits=outputs, validate_args=False).to_event(outputs.dim() - 1)
        return law

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of wrong signs per row."""
        wrong = (outputs > 0) != (targets > 0.5)
        return wrong.to(outputs.dtype).reshape(len(outputs), -1).mean(1)

    def curvature(self, moments: Moments, values: Mapping[str, Tensor]) -> Tensor:
        """p(1 - p) times the variance of each logit."""
        p = moments.mean.sigmoid()
        return (p * (1 - p) * moments.variance).flatten(1).sum(1)

    def predict_constant(self, targets: Tensor, num_classes: int) -> Tensor:
        """By how often the other rows have a one, output by output."""
        y = targets.double().reshape(len(targets), -1)
        ones = y.sum(0)
        return _predict_frequency(torch.where(y > 0.5, ones, len(y) - ones), len(y), 2).sum(1)

    def check(self, targets: Tensor, outputs: Tensor) -> None:
        """Zeros and ones of the outputs' shape."""
        _check_reals(targets, outputs)
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise DataError(
                "targets",
                got=f"values from {float(targets.min()):g} to {float(targets.max()):g}",
                allowed="0 and 1",
                fix="encode the two outcomes as 0.0 and 1.0",
            )


_LIKELIHOODS: dict[str, type[Likelihood]] = {c.name: c for c in (Bernoulli, Categorical, Normal)}


def make_likelihood(likelihood: Likelihood | str) -> Likelihood:
    """A likelihood from its name; an instance passes through."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in _LIKELIHOODS:
        raise ConfigError(
            "likelihood",
            got=repr(likelihood),
            allowed=", ".join(_LIKELIHOODS),
            fix=suggest(str(likelihood), _LIKELIHOODS),
        )
    return _LIKELIHOODS[likelihood]()


def _predict_frequency(count: Tensor, rows: int, classes: int) -> Tensor:
    """Of ``count`` rows with the same class, this one among them."""
    return torch.log((count.double() - 0.5) / (rows - 1 + 0.5 * classes))


def _check_reals(targets: Any, outputs: Tensor) -> None:
    if not targets.is_floating_point() or targets.shape != outputs.shape:
        raise DataError(
            "targets",
            got=f"{targets.dtype} of shape {tuple(targets.shape)}",
            allowed=f"real numbers of the outputs' shape {tuple(outputs.shape)}",
            fix="reshape the targets, for instance y.float().unsqueeze(-1)",
        )
    if not bool(torch.isfinite(targets).all()):
        raise DataError(
            "targets", got="NaN or infinite values", allowed="finite numbers", fix="drop or impute those rows"
        )
