r"""Train without draws: the expected log likelihood from the mean and covariance that reach the outputs.

The network's outputs have mean :math:`\mu` and covariance :math:`\Sigma` (``pyrobc.propagation``).  Of a row with
target ``y``, in nats,

.. math::
    \text{expected:}\quad & E\ln p(y|z) \approx \ln p(y|\mu) + \tfrac12\mathrm{tr}\big(\Sigma\,\nabla^2\ln p(y|\mu)\big)
    \quad\text{(exact for a Normal likelihood)}, \\
    \text{gaussian:}\quad & -\tfrac12\big[r^\top S^{-1} r + \ln\det S\big], \qquad r = \mathrm{softmax}(\mu) - e_y,
    \quad S = J\Sigma J^\top + \text{jitter}\, I.

The first is the ELBO's own term to second order.  The second is the one of variational density propagation: class
probabilities are observed with Normal noise of the propagated covariance.  It is no expectation of the categorical
likelihood, and what it is added to the KL of is another model; the constant :math:`-\tfrac K2\ln 2\pi` is left out.

Only Normal weights and biases are propagated.  Where a family draws (gates, the affine part of a batch norm), its draws
enter as known numbers.

References:
    Dera, Bouaynaya, Rasool, Shterenberg, Fathallah-Shaykh (2021), PremiUm-CNN: propagating uncertainty towards robust
    convolutional neural networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobc.calling import first_tensor
from pyrobc.errors import FitError
from pyrobc.family import Effective
from pyrobc.lift import LiftedModel
from pyrobc.likelihoods import Categorical
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.moments import Moments
from pyrobc.objective import Loss, analytic_loss
from pyrobc.propagation import Relu, propagate_chain, softmax_moments

__all__ = ["MomentLoss"]


@dataclass(frozen=True)
class MomentLoss:
    """A road for ``fit(..., path=MomentLoss())``.

    Attributes:
        covariance: between layers, ``diagonal`` or ``full``.
        relu: ``first_order`` or ``exact``.
        density: of the targets, ``expected`` or ``gaussian``; see above.
        jitter: of ``gaussian``, variance added to every class.
    """

    covariance: Literal["diagonal", "full"] = "diagonal"
    relu: Relu = "first_order"
    density: Literal["expected", "gaussian"] = "expected"
    jitter: float = 1e-3

    def __call__(self, model: LiftedModel, guide: MeanFieldGuide, num_data: int) -> Loss:
        """``loss(inputs, targets, temperature)`` in nats."""
        if self.density == "gaussian" and not isinstance(model.likelihood, Categorical):
            raise FitError(
                "density='gaussian'", got=f"the likelihood {model.likelihood.name!r}", allowed="class labels",
                fix="leave density out: 'expected' knows every likelihood",
            )  # fmt: skip
        return analytic_loss(model, guide, num_data, self.log_likelihood)

    def log_likelihood(
        self, model: LiftedModel, effective: Effective, inputs: Any, targets: Tensor, values: Mapping[str, Tensor]
    ) -> Tensor:
        """Of every row, nats."""

        def propagate(net: nn.Module, inputs: Any) -> Moments:
            return propagate_chain(net, Moments(first_tensor(inputs), None, self.covariance == "full"), self.relu)

        outputs: Moments = model.call(effective, inputs, propagate)
        if self.density == "gaussian":
            return self.gaussian(softmax_moments(outputs), targets)
        at_mean = model.likelihood.distribution(outputs.mean, values).log_prob(targets)
        return at_mean - 0.5 * model.likelihood.curvature(outputs, values)

    def gaussian(self, probabilities: Moments, targets: Tensor) -> Tensor:
        """Log density of one-hot targets under the Normal with the moments of class probabilities, nats per row."""
        classes = probabilities.mean.shape[-1]
        noise = self.jitter * torch.eye(classes, dtype=probabilities.mean.dtype, device=probabilities.mean.device)
        factor = torch.linalg.cholesky(probabilities.covariance + noise)
        away = (probabilities.mean - F.one_hot(targets, classes)).unsqueeze(-1)
        energy = torch.linalg.solve_triangular(factor, away, upper=False).square().sum((-2, -1))
        log_density: Tensor = -0.5 * energy - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_density
