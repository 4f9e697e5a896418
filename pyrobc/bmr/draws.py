r"""Price reduced priors from draws, where the prior or the posterior of a site depends on other sites.

With draws :math:`(\theta_s, \theta_r) \sim q`, the model replayed against each gives the prior of the site under that
draw and the log ratios

.. math:: \ell = \ln \tilde p(\theta_s \mid \theta_r) - \ln p(\theta_s \mid \theta_r),
    \qquad \Delta F = \ln E[e^\ell],

smoothed and diagnosed as any importance sample.  A point has no density against draws: deletion is undefined here.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.bmr.compare import in_support
from pyrobc.bmr.joint import strip_wrappers
from pyrobc.bmr.monte_carlo import average_log_ratios
from pyrobc.bmr.reduced import ReducedRule, match_reduced
from pyrobc.bmr.registry import Reduction
from pyrobc.bmr.sites import Site, SiteReader
from pyrobc.dists import in_double
from pyrobc.errors import ReductionError

__all__ = ["estimate_from_draws"]

_NO_DENSITY = (
    "a point has no density against draws, or under a prior that depends on other sites: "
    "score Restricted(prior, lower, upper) instead"
)


def estimate_from_draws(
    reader: SiteReader,
    sites: list[Site],
    reduced: Mapping[str, Distribution | ReducedRule],
    num_draws: int,
    *,
    joint: bool = False,
) -> Reduction:
    """Price changing the priors of ``sites``: elementwise for one site, all elements and sites together if ``joint``.

    Raises:
        ReductionError: ``num_draws`` is 0 and the posterior is a guide.
    """
    if num_draws == 0 and reader.num_draws is None:
        raise ReductionError(
            ", ".join(f"site {site.name!r}" for site in sites),
            got="num_draws=0 where no closed form applies",
            allowed="num_draws > 0",
            fix="pass num_draws=1000",
        )
    ratios = []
    for drawn, replayed in reader.iterate(num_draws):
        row = []
        for site in sites:
            prior = replayed.nodes[site.name]["fn"]
            law = match_reduced(site.name, prior, reduced[site.name])
            if isinstance(strip_wrappers(law), dist.Delta):
                shape = torch.Size() if joint else prior.batch_shape
                return Reduction(torch.full(shape, torch.nan, dtype=torch.float64), reason=_NO_DENSITY)
            value = drawn.nodes[site.name]["value"]
            ratio = _log_density(law, value) - _log_density(prior, value)
            row.append(ratio.sum() if joint else ratio)
        ratios.append(torch.stack(row).sum(0))
    return average_log_ratios(torch.stack(ratios))


def _log_density(law: Distribution, value: Tensor) -> Tensor:
    """Log density in nats, float64: -inf outside the support, where validation would raise."""
    wide = in_double(law, {})
    return torch.where(in_support(wide, value.double()), wide.log_prob(value.double()), -torch.inf)
