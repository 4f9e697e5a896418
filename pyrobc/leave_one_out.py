r"""Leave-one-out from draws of an approximate posterior, all rows at once.

With draws :math:`\theta_s \sim q`, :math:`r_s = p(\theta_s|y)/q(\theta_s)` up to a constant, and ratios
:math:`w_{si} = r_s / p(y_i|\theta_s)`, the largest of them Pareto smoothed row by row (``bmr.pareto``),

.. math:: \text{elpd}_i = \ln \frac{\sum_s w_{si}\, p(y_i|\theta_s)}{\sum_s w_{si}} .

That is ``loo_approximate_posterior`` of ArviZ, to which a test holds it; row by row, as there, ten thousand rows take
longer than the network itself.

References:
    Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC.
    Magnusson, Riis Andersen, Jonasson, Vehtari (2019), Bayesian leave-one-out cross-validation for large data.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pyrobc.bmr.pareto import smooth_log_weights

__all__ = ["leave_one_out"]

Floats = NDArray[np.float64]
_ROWS = 4096  # smoothed at a time, to bound memory


def leave_one_out(log_lik: Floats, ratio: Floats) -> tuple[Floats, Floats]:
    """Expected log density of every row left out, nats, and the k-hat of its importance ratios.

    Ratios that cannot be smoothed are used as they are.  Where the largest of them are equal (every draw predicts the
    row with certainty) they are bounded, and k-hat is -1; where no tail can be fitted, or a draw gives the row no
    probability at all, infinity.

    Args:
        log_lik: of every draw and row, nats, ``[draws, rows]``.
        ratio: log of posterior over guide at every draw, nats up to a constant.
    """
    elpd_i, khat = np.full((2, log_lik.shape[1]), -np.inf)
    khat[:] = np.inf
    is_possible = np.isfinite(log_lik).all(0)
    found = []
    for part in torch.from_numpy(log_lik[:, is_possible]).double().split(_ROWS, dim=1):
        weights, shape = smooth_log_weights(torch.from_numpy(ratio).double()[:, None] - part)
        density = torch.logsumexp(weights + part, 0) - torch.logsumexp(weights, 0)
        found.append(torch.stack([density, torch.nan_to_num(shape, nan=torch.inf, posinf=torch.inf)]))
    if found:
        elpd_i[is_possible], khat[is_possible] = torch.cat(found, 1).numpy()
    return elpd_i, khat
