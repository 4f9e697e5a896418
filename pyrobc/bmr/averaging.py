r"""Model probabilities, inclusion probabilities and the averaged posterior, from the prices of a search.

With :math:`\Delta F_M` the log evidence of candidate ``M`` over the full model and :math:`\Pr(M)` its prior
probability,

.. math::
    \Pr(M \mid y) \propto \Pr(M)\, e^{\Delta F_M}, \qquad
    \Pr(g \text{ kept} \mid y) = \sum_{M \ni g} \Pr(M \mid y), \qquad
    q(\theta) = \sum_M \Pr(M \mid y)\, q_M(\theta),

relative to the candidates that were priced: all subsets after an exhaustive search, otherwise those that were visited.
:math:`\Pr(M)` keeps each group independently with probability :math:`\pi`; or :math:`\pi \sim \mathrm{Beta}(a, b)` is
integrated out, :math:`\Pr(M) = B(a + k, b + K - k) / B(a, b)` for ``k`` of ``K`` groups kept, which corrects for
multiplicity (Scott and Berger 2010).

A deleted group is a point mass in :math:`q_M`; the mean and covariance of the mixture are exact (law of total
variance).
Undefined prices (NaN) and infinite ones get probability zero and are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Beta

from pyrobc.bmr.deletions import Deletions
from pyrobc.bmr.search import Search
from pyrobc.errors import ReductionError

__all__ = ["ModelAverage", "average_models", "compute_inclusion", "weigh_models"]


def weigh_models(search: Search, inclusion: float | Beta = 0.5) -> Tensor:
    """Posterior probability of each candidate, shape (models,), summing to 1.

    Args:
        search: the priced candidates.
        inclusion: prior probability that a group is kept, or its Beta law.

    Raises:
        ReductionError: an inclusion probability outside (0, 1), or no candidate with a finite price.
    """
    num_groups = search.deleted.shape[1]
    num_kept = (~search.deleted).sum(1).double()
    if isinstance(inclusion, Beta):
        a, b = inclusion.concentration1.double(), inclusion.concentration0.double()
        log_prior = _log_beta(a + num_kept, b + num_groups - num_kept) - _log_beta(a, b)
    else:
        if not 0 < inclusion < 1:
            raise ReductionError(
                "inclusion probability",
                got=repr(inclusion),
                allowed="a number strictly between 0 and 1, or a Beta",
                fix="pass 0.5 for no preference, Beta(1, 1) to learn it",
            )
        log_odds = torch.tensor(inclusion, dtype=torch.float64).logit()
        log_prior = num_kept * log_odds  # the factor (1 - pi)^K is common
    if not search.delta_f.isfinite().any():
        raise ReductionError(
            "model probabilities",
            got=f"{len(search.delta_f)} candidates, none with a finite price",
            allowed="at least one defined price",
            fix="look at the reasons in bmr.score; the posterior covariance may not be positive definite",
        )
    log_weight = torch.where(search.delta_f.isfinite(), search.delta_f + log_prior, -torch.inf)
    return log_weight.softmax(0)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return a.lgamma() + b.lgamma() - (a + b).lgamma()


def compute_inclusion(search: Search, weights: Tensor) -> Tensor:
    """Probability that each group is kept, shape (groups,), under model probabilities ``weights`` (models,)."""
    return weights @ (~search.deleted).double()


@dataclass(frozen=True)
class ModelAverage:
    """Bayesian model average of the kept posteriors.

    Attributes:
        inclusion: probability that each group is kept, shape (groups,), over the models averaged.
        loc: mean of the mixture, shape (elements,).
        covariance: its covariance, shape (elements, elements), including the spread between models.
        weights: probability of each model averaged, best first.
        models: those models, in the same order.
        num_undefined: candidates left out because their price is undefined or infinite.
    """

    inclusion: Tensor
    loc: Tensor
    covariance: Tensor
    weights: Tensor
    models: Search
    num_undefined: int


def average_models(
    deletions: Deletions, search: Search, inclusion: float | Beta = 0.5, *, window: float = 8.0
) -> ModelAverage:
    """Average the kept posteriors of all candidates within ``window`` nats of the most probable.

    Args:
        deletions: what ``search`` priced.
        search: the candidates.
        inclusion: prior probability that a group is kept, or its Beta law.
        window: Occam's window in nats (8 drops models 3,000 times less probable than the best); ``inf`` averages all.
    """
    weights = weigh_models(search, inclusion)
    inside = (weights >= weights.max() * torch.exp(torch.tensor(-window))) & (weights > 0)
    order = weights.argsort(descending=True, stable=True)
    order = order[inside[order]]
    models = Search(search.deleted[order], search.delta_f[order], search.names)
    kept = weights[order] / weights[order].sum()
    num_elements = deletions.loc.numel()
    loc, second = torch.zeros(num_elements, dtype=torch.float64), torch.zeros_like(deletions.covariance)
    for deleted, weight in zip(models.deleted.split(1024), kept.split(1024), strict=True):
        locs, covariances = deletions.condition(deleted)
        loc += weight @ locs
        second += torch.einsum("m,mij->ij", weight, covariances + locs[:, :, None] * locs[:, None, :])
    return ModelAverage(
        inclusion=compute_inclusion(models, kept),
        loc=loc,
        covariance=second - loc[:, None] * loc,
        weights=kept,
        models=models,
        num_undefined=int((~search.delta_f.isfinite()).sum()),
    )
