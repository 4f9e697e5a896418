r"""The rows that a decision looks at: a random sample where there are many, and what it says about all of them.

Of ``N`` rows ``m`` are looked at, a simple random sample ``S``.  With :math:`e_i` the expected log density of row i,
known on ``S``, and a surrogate :math:`a_i`, the log density under the posterior-mean network, which one pass gives for
all rows,

.. math::
    \hat e = \sum_{i=1}^N a_i + \frac Nm \sum_{i \in S} d_i, \qquad d_i = e_i - a_i, \qquad
    \text{SE}_\text{sub} = N \sqrt{\Big(1 - \frac mN\Big)\frac{s_d^2}{m}}

(the difference estimator) is unbiased for :math:`\sum_i e_i` over the choice of ``S`` whatever the surrogate, and sharp
where it is close; :math:`s_d^2` is the variance of d with denominator m - 1.

References:
    Magnusson, Riis Andersen, Jonasson, Vehtari (2020), Leave-one-out cross-validation for Bayesian model comparison in
    large data.
    Cochran (1977), Sampling techniques, section 7.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import RandomSampler

from pyrobc.batches import as_loader, count_rows, move, repeatable, split_batch
from pyrobc.calling import evaluating
from pyrobc.errors import DataError
from pyrobc.family import Effective
from pyrobc.posterior import Posterior

__all__ = ["DecisionRows", "estimate_total", "take_rows"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DecisionRows:
    """Rows looked at.

    Attributes:
        inputs: of the rows looked at.
        targets: of the rows looked at.
        index: their numbers in the pass over the data.
        surrogate: log density of every row of the data under the posterior-mean network, nats; None if all were taken.
    """

    inputs: Any
    targets: Tensor
    index: NDArray[np.int64]
    surrogate: Floats | None


def take_rows(posterior: Posterior, data: Any, max_rows: int, seed: int) -> DecisionRows:
    """All rows of the data, or a simple random sample of ``max_rows`` with the surrogate of all.

    Raises:
        DataError: there are fewer than two rows.
    """
    loader = as_loader(data, batch_size=min(max_rows, 1024), shuffle=False)
    with repeatable(loader, seed):
        total = count_rows(loader)
    is_sampled = total > max_rows
    wanted = np.arange(min(total, max_rows))
    if is_sampled and not _is_shuffled(loader):
        wanted = np.sort(np.random.default_rng(seed).choice(total, max_rows, replace=False))
    mean = posterior.mean()
    inputs, targets, surrogate, start = [], [], [], 0
    with repeatable(loader, seed):  # a loader that shuffles gives the same rows again
        for batch in loader:
            x, y = (move(part, posterior.model.anchor) for part in split_batch(batch))
            if is_sampled:
                surrogate.append(_score_mean(posterior, mean, x, y))
            here = wanted[(wanted >= start) & (wanted < start + len(y))] - start
            if len(here):
                picked = torch.as_tensor(here, device=y.device)
                inputs.append(_pick(x, picked))
                targets.append(y[picked])
            start += len(y)
    joined = torch.cat(targets) if targets else torch.empty(0)
    if len(joined) < 2:
        raise DataError(
            "evidence rows",
            got=f"{len(joined)} of {start}",
            allowed="at least two rows",
            fix="pass the training loader",
        )
    index = wanted[: len(joined)]  # a loader may drop its last rows
    return DecisionRows(_join(inputs), joined, index, np.concatenate(surrogate) if is_sampled else None)


def estimate_total(values: Floats, rows: DecisionRows) -> tuple[float, float]:
    """Sum of ``values`` over all rows of the data, and its standard error from having looked at some."""
    if rows.surrogate is None:
        return float(values.sum()), 0.0
    total, seen = len(rows.surrogate), len(values)
    gap = values - rows.surrogate[rows.index]
    error = total * np.sqrt((1 - seen / total) * gap.var(ddof=1) / seen)
    return float(rows.surrogate.sum() + total * gap.mean()), float(error)


def _is_shuffled(loader: Any) -> bool:
    """Whether its first rows are a random sample already."""
    return bool(getattr(loader, "shuffle", False)) or isinstance(getattr(loader, "sampler", None), RandomSampler)


@torch.no_grad()
def _score_mean(posterior: Posterior, mean: Effective, inputs: Any, targets: Tensor) -> Floats:
    model, laws = posterior.model, posterior.laws()
    with evaluating(model):
        outputs = model.run(mean, inputs)
    law = model.likelihood.distribution(outputs, {name: laws[name].mean for name in model.likelihood.priors(outputs)})
    return np.asarray(law.log_prob(targets).double().cpu().numpy())


def _pick(inputs: Any, index: Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[index]
    if isinstance(inputs, Mapping):
        return {key: part[index] for key, part in inputs.items()}
    return tuple(part[index] for part in inputs)


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], Mapping):
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
