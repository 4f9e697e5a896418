r"""Does the guide cover the posterior, in full and where a reduction looks?  k-hat of an importance ratio; the ELBO.

A reduction takes q for the posterior.  With :math:`r = p(y, \theta)/q(\theta)`, :math:`w = \tilde p/p` and the reduced
posterior :math:`\tilde q = q\,w/E_q[w]`,

.. math::
    \frac{\tilde p(y)}{p(y)} = \frac{E_q[r\,w]}{E_q[r]} = E_q[w] \cdot \frac{E_{\tilde q}[r]}{E_q[r]}, \qquad
    r \propto \frac{p(y|\theta)\,\tilde p(\theta)}{\tilde q(\theta)} \quad\text{on the support of } \tilde q.

The first factor is :math:`e^{\Delta F}`, in closed form; the second, one where q is the posterior, is what it leaves
out.  Both are importance sampling: k-hat of r at draws of q says whether q covers the posterior, and at draws of
:math:`\tilde q` whether the reduced posterior covers the posterior of the reduced model.  Removed groups have
:math:`\tilde q = \tilde p`, so that their sites cancel.

Its logarithm is bounded by the same draws: by Jensen, :math:`\mathcal L(\tilde q) = E_{\tilde q}[\ln p(y, \theta)
\tilde p/p - \ln \tilde q]` is at most :math:`\ln\tilde p(y)`, and

.. math::
    \mathcal L(\tilde q) - \mathcal L(q) = E_{\tilde q}[\ln r] - E_q[\ln r] \quad\text{(nats, all rows)}

is what a reduction does to the ELBO before anything re-adapts: it equals :math:`\Delta F` where q is the posterior, and
otherwise says what a mean-field :math:`\Delta F`, a sum over groups, leaves out.  Removed groups are exactly zero in
it, and cost no divergence.

The weights w themselves are another matter.  Those of a reduction to an event, :math:`w = 1_I/P(I)`, are bounded: all
their moments are finite, draws would estimate :math:`E_q[w]` with relative variance :math:`(1 - Q)/(SQ)`, and a closed
form needs no draws.  Such a reduction does not make the tail of r heavier either:
:math:`\Pr_{\tilde q}(r > t) = \Pr_q(r > t, I)/Q(I) \le \Pr_q(r > t)/Q(I)`, so its k is at most that of the full fit.

The ratio of two Normals, :math:`N(0, s^2)` over a narrower :math:`N(0, \sigma^2)`, has :math:`k = 1 - \sigma^2/s^2`.

References:
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?: evaluating variational inference.
    Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Independent

from pyrobc.bmr.pareto import smooth_log_weights
from pyrobc.groups import Kept
from pyrobc.meanfield import slice_site
from pyrobc.posterior import Posterior

__all__ = ["draw_log_ratios", "log_ratio", "ratio_khat"]

Floats = NDArray[np.float64]


def ratio_khat(log_ratios: Floats) -> float:
    """k-hat of importance ratios, one per draw; -1 where the largest are equal, infinity where nothing can be told.

    That is with fewer than 25 draws, or ratios that are not numbers; a ratio of zero is one.
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    if np.isnan(values).any() or np.isposinf(values).any():
        return float("inf")
    khat = float(smooth_log_weights(torch.from_numpy(values)[:, None])[1])
    return float("inf") if np.isnan(khat) else khat


def log_ratio(posterior: Posterior, draws: Sequence[Mapping[str, Tensor]], kept: Kept) -> Floats:
    """Log prior minus log guide of the kept sites at each draw.

    A point has no entropy: its log prior counts from its peak, so that a weight which leaves at zero changes nothing.
    A prior that couples the entries of a tensor has no density of a part: its tensors count whole.
    """
    model = posterior.model
    priors, laws = model.priors(), posterior.laws()
    indices = model.spec.kept_indices(kept)
    total = np.zeros(len(draws))
    with torch.no_grad():
        for site, law in laws.items():
            q, p = (d.base_dist if isinstance(d, Independent) else d for d in (law, priors[site]))
            if isinstance(law, Delta):
                if not p.event_shape:  # one that couples the entries keeps them, whatever is cut
                    term = (p.log_prob(law.v) - p.log_prob(p.mode)).double().expand(law.v.shape)
                    total += float(slice_site(site, term, model.spec, kept, indices).sum())
                continue
            for s, values in enumerate(draws):
                value = values[site]
                if p.event_shape:
                    total[s] += float(p.log_prob(value).sum().double() - q.log_prob(value).double().sum())
                    continue
                term = (p.log_prob(value) - q.log_prob(value)).double().expand(value.shape)
                total[s] += float(slice_site(site, term, model.spec, kept, indices).sum())
    return total


def draw_log_ratios(
    posterior: Posterior, inputs: Tensor, targets: Tensor, kept: Kept, *, num_draws: int = 200, seed: int = 0
) -> Floats:
    """Log ratios r at draws of the reduced posterior that keeps ``kept``, nats over all rows the network was fitted to.

    ``ratio_khat`` of them is that of the reduced posterior, their mean is its ELBO, and the difference to those of
    another ``kept`` has a small variance: the draws are the same.
    """
    draws = [posterior.draw(seed * 100_003 + s) for s in range(num_draws)]
    laws = posterior.predictions(inputs, draws, kept)
    fits = np.array([float(law.log_prob(targets).double().sum()) for law in laws])
    return log_ratio(posterior, draws, kept) + posterior.num_data / len(targets) * fits
