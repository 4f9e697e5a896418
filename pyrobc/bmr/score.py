r"""``bmr.score``: price reduced priors on the sites of any Pyro model, from the posterior that is already fitted.

For each site with prior :math:`p` and posterior :math:`q`, and each of its batch elements,

.. math:: \Delta F = \ln E_q[\tilde p(\theta) / p(\theta)] \quad\text{(nats; larger says prune)},

in closed form where the types have one, otherwise by Pareto-smoothed importance sampling with its error.  Changing the
prior of one element needs only that element's marginal posterior; changing several at once (``joint=True``, or a
site with event dimensions) needs their joint law, and the full covariance of a Gaussian guide is used:

.. math:: \Delta F = \ln \frac{q(\theta_I = c)}{p(\theta_I = c)}
    + \ln E_{q(\theta_J \mid \theta_I = c)}\left[\frac{\tilde p(\theta_J)}{p(\theta_J \mid \theta_I = c)}\right]

for sites ``I`` that are deleted and sites ``J`` whose prior changes (Friston and Penny 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from pyrobc.bmr.draws import estimate_from_draws
from pyrobc.bmr.joint import as_joint_normal, flatten_event, is_joint_normal, strip_wrappers
from pyrobc.bmr.multivariate_normal import delete
from pyrobc.bmr.reduced import ReducedRule, check_support, match_reduced, naming_site
from pyrobc.bmr.registry import Reduction, reduce
from pyrobc.bmr.sites import Site, SiteReader, keep_global_state
from pyrobc.bmr.table import ScoreTable
from pyrobc.errors import ReductionError

__all__ = ["score"]


def score(
    model: Callable[..., Any],
    guide: Callable[..., Any] | Mapping[str, Tensor] | None = None,
    *,
    reduced: Mapping[str, Distribution | ReducedRule],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    posterior: Any = None,
    joint: bool = False,
    num_draws: int = 1000,
    seed: int = 0,
) -> ScoreTable:
    """Score reduced priors on sites of ``model`` without refitting.

    Args:
        model: any Pyro model with proper priors.
        guide: its fitted guide: hand-written, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal,
            AutoLowRankMultivariateNormal, AutoLaplaceApproximation, or an AutoGuideList of these.  Guides without a
            density per site (flows) are scored from draws.
        reduced: the reduced prior of each site to score: a distribution that broadcasts to the site's prior, or a rule
            from the prior to one, such as ``lambda prior: Restricted(prior, -0.1, 0.1)``.  ``Delta(v)`` deletes.
        args: positional arguments of model and guide.
        kwargs: keyword arguments of both.
        posterior: instead of a guide, draws: a dict of site name to tensor with draws first, or an MCMC object.  A dict
            may also stand in the guide's place.  The error reported takes the draws as independent.
        joint: change all priors at once and return one row; default each batch element of each site by itself.
        num_draws: draws from the guide for reductions without a closed form; 0 refuses them.
        seed: of those draws.  The global random state is left as it was.

    Returns:
        A table with one row per batch element of each site, or a single row.

    Raises:
        ReductionError: a site that does not exist, is observed or has no posterior; an improper prior; a reduced prior
            with other support or shape; a discrete site without a closed form.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     with pyro.plate("units", 2):
        ...         pyro.sample("w", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     with pyro.plate("units", 2):
        ...         pyro.sample("w", dist.Normal(torch.tensor([0.3, 2.0]), 0.2))
        >>> table = score(model, guide, reduced={"w": dist.Delta(torch.tensor(0.0))})
        >>> [round(value, 4) for value in table.delta_f.tolist()]
        [0.4844, -48.3906]
    """
    if not reduced:
        raise ReductionError("reduced", got="an empty mapping", allowed="at least one site", fix="{'site': prior}")
    if isinstance(guide, Mapping):  # draws in the guide's place
        guide, posterior = None, guide
    with keep_global_state(seed):
        reader = SiteReader(model, guide, posterior, args, kwargs or {})
        sites = [reader.read(name) for name in reduced]
        laws = {site.name: match_reduced(site.name, site.prior, reduced[site.name]) for site in sites}
        for site in sites:
            check_support(site.name, site.prior, laws[site.name])
        labels = {name: type(strip_wrappers(law)).__name__ for name, law in laws.items()}
        if joint:
            name = " + ".join(laws)
            reductions = {name: _reduce_jointly(reader, sites, laws, reduced, num_draws)}
            labels = {name: " + ".join(labels.values())}
        else:
            reductions = {site.name: _reduce_site(reader, site, laws[site.name], reduced, num_draws) for site in sites}
    return ScoreTable(reductions, labels)


def _reduce_site(
    reader: SiteReader,
    site: Site,
    law: Distribution,
    reduced: Mapping[str, Distribution | ReducedRule],
    num_draws: int,
) -> Reduction:
    if site.is_conditional or site.law is None:
        if cast(Any, site.prior.support).is_discrete:
            raise ReductionError(
                f"site {site.name!r}",
                got="a discrete site whose law depends on other sites, or has draws only",
                allowed="discrete sites with a fixed prior and a closed form",
                fix="marginalise the site, or score a continuous one",
            )
        return estimate_from_draws(reader, [site], reduced, num_draws)
    prior, q = site.prior, site.law
    if isinstance(q, MultivariateNormal):
        flat = flatten_event(prior), flatten_event(law)
        if flat[0] is not None and flat[1] is not None:
            prior, law = flat[0], flat[1]
        elif q.event_shape != prior.event_shape:
            return estimate_from_draws(reader, [site], reduced, num_draws)
    with naming_site(site.name):
        return reduce(q, prior, law, num_draws=num_draws)


def _reduce_jointly(
    reader: SiteReader,
    sites: list[Site],
    laws: dict[str, Distribution],
    reduced: Mapping[str, Distribution | ReducedRule],
    num_draws: int,
) -> Reduction:
    """All sites at once: a sum over blocks that are independent in the posterior."""
    if any(site.is_conditional or site.law is None for site in sites):
        return estimate_from_draws(reader, sites, reduced, num_draws, joint=True)
    blocks: dict[int, list[Site]] = {}
    for site in sites:
        blocks.setdefault(id(site if site.part is None else site.part), []).append(site)
    parts = []
    for block in blocks.values():
        if block[0].part is None:
            parts.append(_reduce_site(reader, block[0], laws[block[0].name], reduced, num_draws))
        elif all(is_joint_normal(s.prior) and _is_identity(s) for s in block) and all(
            isinstance(strip_wrappers(laws[s.name]), dist.Delta) or is_joint_normal(laws[s.name]) for s in block
        ):
            parts.append(_reduce_joint_normal(reader, block, laws))
        else:
            parts.append(estimate_from_draws(reader, block, reduced, num_draws, joint=True))
    khats = [part.khat.double().max() for part in parts if part.khat is not None]
    return Reduction(
        torch.stack([part.delta_f.double().sum() for part in parts]).sum(),
        mcse=torch.stack([part.mcse.double().expand(part.delta_f.shape).square().sum() for part in parts]).sum().sqrt(),
        khat=torch.stack(khats).max() if khats else None,
        reason="; ".join(dict.fromkeys(part.reason for part in parts if part.reason)),
    )


def _is_identity(site: Site) -> bool:
    return isinstance(strip_wrappers(site.law), dist.Normal | MultivariateNormal) if site.law is not None else False


def _reduce_joint_normal(reader: SiteReader, block: list[Site], laws: dict[str, Distribution]) -> Reduction:
    """Sites of one full-covariance guide: delete some exactly, then change the prior of the others."""
    assert block[0].part is not None
    elements = torch.cat([s.elements.reshape(-1) for s in block if s.elements is not None])
    loc, covariance = as_joint_normal(reader.get_joint(block[0].part), "guide")
    q = dist.MultivariateNormal(loc[elements], covariance[elements][:, elements])
    p = _stack([as_joint_normal(s.prior, f"prior of site {s.name!r}") for s in block])
    is_gone = torch.cat([_is_point(laws[s.name]).expand(s.elements.numel()) for s in block if s.elements is not None])
    if not is_gone.any():
        return reduce(q, p, _stack([as_joint_normal(laws[s.name], "reduced prior") for s in block]))
    points = [_values(laws[s.name]) for s in block if _is_point(laws[s.name])]
    gone = delete(q, p, is_gone, torch.cat(points))
    if is_gone.all():
        return gone
    kept = [as_joint_normal(laws[s.name], "reduced prior") for s in block if not _is_point(laws[s.name])]
    index = (~is_gone).nonzero()[:, 0]
    left = dist.MultivariateNormal(p.loc[index], p.covariance_matrix[index][:, index])  # sites are independent in p
    assert gone.posterior is not None
    changed = reduce(gone.posterior, left, _stack(kept))
    return Reduction(gone.delta_f + changed.delta_f, changed.posterior, reason=changed.reason)


def _is_point(law: Distribution) -> Tensor:
    return torch.tensor(isinstance(strip_wrappers(law), dist.Delta))


def _values(law: Distribution) -> Tensor:
    base = strip_wrappers(law)
    assert isinstance(base, dist.Delta)
    return base.v.double().reshape(-1)  # type: ignore[no-any-return]


def _stack(normals: list[tuple[Tensor, Tensor]]) -> dist.MultivariateNormal:
    """Independent Normal vectors as one."""
    return dist.MultivariateNormal(torch.cat([m for m, _ in normals]), torch.block_diag(*[c for _, c in normals]))
