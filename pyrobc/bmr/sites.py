r"""Read priors and posterior laws, site by site, from a Pyro model and its guide or draws.

The prior :math:`p(\theta_s)` of a site is what the model samples it from.  It is found by replaying the model against a
few draws from the posterior: where the law of a site changes from draw to draw, it depends on other latent sites (a
horseshoe weight on its scales), so the ratio of priors has to be averaged over draws of them:

.. math:: \Delta F = \ln E_{q(\theta_s, \theta_r)}\left[
    \tilde p(\theta_s \mid \theta_r) / p(\theta_s \mid \theta_r)\right].

The posterior law of a site is the guide's.  Automatic guides are Normal in unconstrained coordinates :math:`u`, with
:math:`\theta = T(u)`: the law of the site is that Normal where ``T`` is the identity, a log-normal where it is the
exponential, a transformed Normal otherwise.  A guide whose law also changes from draw to draw leaves draws only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
)
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, LowRankMultivariateNormal, MultivariateNormal, Normal
from torch.distributions.constraint_registry import biject_to

from pyrobc.bmr.compare import in_support
from pyrobc.bmr.joint import constrain, strip_wrappers, take_marginal
from pyrobc.dists import in_double
from pyrobc.errors import ReductionError, suggest

__all__ = ["Site", "SiteReader", "keep_global_state"]

_NUM_PROBES = 3  # traces compared to find laws that depend on other latent sites
_NUM_DISCRETE_PROBES = 200  # the same, where a latent site is discrete: a value of probability 0.05 is missed by 1e-5


@contextmanager
def keep_global_state(seed: int) -> Iterator[None]:
    """Seed the random numbers inside, and leave the global generators and Pyro's parameter store as they were."""
    store = pyro.get_param_store()
    known = set(store.keys())
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for name in set(store.keys()) - known:
                del store[name]


@dataclass(frozen=True)
class Site:
    """One latent site.

    Attributes:
        name: its name in the model.
        prior: what the model samples it from (in the first trace, where it depends on other sites).
        is_conditional: whether that prior depends on other latent sites.
        law: its posterior law; None where only draws are available.
        part: the automatic guide that holds it in one joint Normal, with its unconstrained elements; None otherwise.
        elements: indices into the mean of that joint Normal, of the unconstrained shape of the site.
    """

    name: str
    prior: Distribution
    is_conditional: bool
    law: Distribution | None
    part: AutoContinuous | None = None
    elements: Tensor | None = None


class SiteReader:
    """Traces of a model replayed against its posterior.

    Args:
        model: a Pyro model.
        guide: the guide fitted to it, or None with ``posterior``.
        posterior: draws, site name to tensor with draws in the first dimension, or an object with ``get_samples()``.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        posterior: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        if (guide is None) == (posterior is None):
            raise ReductionError(
                "posterior",
                got="neither a guide nor draws" if guide is None else "both a guide and draws",
                allowed="one of the two",
                fix="pass guide=, or posterior= a dict of draws",
            )
        self.model, self.guide, self.args, self.kwargs = model, guide, args, dict(kwargs)
        self.draws: dict[str, Tensor] | None = None
        if posterior is not None:
            self.draws = _check_draws(posterior.get_samples() if hasattr(posterior, "get_samples") else posterior)
        elif isinstance(guide, AutoLaplaceApproximation):
            self.guide = guide.laplace_approximation(*args, **self.kwargs)
        self._probes = [self._trace(i) for i in range(_NUM_PROBES)]
        if any(_is_discrete(node) for node in self._probes[0][1].nodes.values()):  # a rare value may change a prior
            self._probes += [self._trace(i) for i in range(_NUM_PROBES, _NUM_DISCRETE_PROBES)]
        nodes = self._probes[0][1].nodes
        self.latent = [
            name
            for name, node in nodes.items()
            if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
        ]
        self._uncovered = [name for name in self.latent if name not in self._probes[0][0].nodes]

    @property
    def num_draws(self) -> int | None:
        """Draws that were given; None for a guide, which has as many as are asked for."""
        return None if self.draws is None else len(next(iter(self.draws.values())))

    def _trace(self, index: int) -> tuple[Any, Any]:
        """A draw from the posterior as a trace, and the model replayed against it."""
        with torch.no_grad():
            drawn = poutine.trace(self._emit(index)).get_trace(*self.args, **self.kwargs)
            replayed = poutine.trace(poutine.replay(self.model, trace=drawn)).get_trace(*self.args, **self.kwargs)
        return drawn, replayed

    def _emit(self, index: int) -> Callable[..., Any]:
        """A callable that samples the latent sites: the guide, or the draws given, in order."""
        if self.draws is None:
            assert self.guide is not None
            return self.guide
        row = {name: values[index % len(values)] for name, values in self.draws.items()}

        def emit(*args: Any, **kwargs: Any) -> None:
            for name, value in row.items():
                pyro.sample(name, dist.Delta(value, event_dim=value.ndim))

        return emit

    def iterate(self, num_draws: int) -> Iterator[tuple[Any, Any]]:
        """Draws from the posterior with the model replayed against each: all that were given, or ``num_draws``."""
        for index in range(num_draws if self.num_draws is None else self.num_draws):
            yield self._trace(index)

    def get_joint(self, part: AutoContinuous) -> Distribution:
        """The joint law of an automatic guide, in unconstrained coordinates."""
        law: Distribution = part.get_posterior(*self.args, **self.kwargs)
        return law

    def read(self, name: str) -> Site:
        """Prior and posterior of the site ``name``.

        Raises:
            ReductionError: the site does not exist, is observed or has an improper prior; the posterior does not cover
                it or is a point.
        """
        drawn, replayed = self._probes[0]
        if name not in self.latent:
            observed = name in replayed.nodes and replayed.nodes[name]["type"] == "sample"
            raise ReductionError(
                f"site {name!r}",
                got="an observed site" if observed else "no such site in the model",
                allowed=f"latent sites: {', '.join(self.latent) or 'none'}",
                fix="score the latent sites its law depends on" if observed else suggest(name, self.latent),
            )
        if name in self._uncovered:
            raise ReductionError(
                f"site {name!r}",
                got="a latent site without a posterior",
                allowed=f"sites that the {'guide samples' if self.draws is None else 'draws contain'}: "
                f"{', '.join(n for n in self.latent if n not in self._uncovered) or 'none'}",
                fix=f"sample {name!r} in the guide" if self.draws is None else f"add draws of {name!r}",
            )
        priors = [trace.nodes[name]["fn"] for _, trace in self._probes]
        _check_proper(name, priors[0], drawn.nodes[name]["value"])
        is_conditional = not _are_same(priors, drawn.nodes[name]["value"])
        if is_conditional and self._uncovered:
            raise ReductionError(
                f"site {name!r}",
                got=f"a prior that depends on sites without a posterior: {', '.join(self._uncovered)}",
                allowed="a posterior over everything the prior depends on",
                fix="sample these sites in the guide too, or add their draws",
            )
        law, part, elements = (None, None, None) if self.draws is not None else self._read_law(name, priors[0])
        return Site(name, priors[0], is_conditional, law, part, elements)

    def _read_law(self, name: str, prior: Distribution) -> tuple[Distribution | None, AutoContinuous | None, Any]:
        part = _find_part(self.guide, name)
        if isinstance(part, AutoDelta):
            raise _refuse_point(name, type(part).__name__)
        if isinstance(part, AutoContinuous):
            joint = self.get_joint(part)
            elements = _locate(part, name)
            if not isinstance(strip_wrappers(joint), Normal | MultivariateNormal | LowRankMultivariateNormal):
                return None, None, None
            event_dim = elements.ndim - len(prior.batch_shape)
            marginal = take_marginal(joint, elements, event_dim)
            is_joint = not isinstance(strip_wrappers(joint), Normal)
            return (
                constrain(marginal, prior.support, event_dim),
                part if is_joint else None,
                elements if is_joint else None,
            )
        traces = [drawn for drawn, _ in self._probes]
        fn = traces[0].nodes[name]["fn"]
        if not isinstance(strip_wrappers(fn), dist.Delta):
            value = traces[0].nodes[name]["value"]
            return (fn if _are_same([t.nodes[name]["fn"] for t in traces], value) else None), None, None
        auxiliary = f"{name}_unconstrained"
        if auxiliary in traces[0].nodes:
            laws = [trace.nodes[auxiliary]["fn"] for trace in traces]
            base = strip_wrappers(laws[0])
            if isinstance(base, Normal) and _are_same(laws, traces[0].nodes[auxiliary]["value"]):
                normal = dist.Normal(base.loc.double(), base.scale.double())
                return constrain(normal, prior.support, len(laws[0].event_shape)), None, None
        elif not any(n["type"] == "sample" and n["infer"].get("is_auxiliary") for n in traces[0].nodes.values()):
            raise _refuse_point(name, "Delta")
        return None, None, None


def _is_discrete(node: Any) -> bool:
    is_latent = node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    return is_latent and bool(node["fn"].support.is_discrete)


def _refuse_point(name: str, got: str) -> ReductionError:
    return ReductionError(
        f"site {name!r}",
        got=f"{got}, a point estimate",
        allowed="draws, or a guide with a density: AutoNormal, AutoMultivariateNormal, AutoLaplaceApproximation",
        fix="fit AutoNormal, or AutoLaplaceApproximation around the same point",
    )


def _check_draws(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    lengths = {len(values) if values.ndim else 0 for values in draws.values()}
    if len(lengths) != 1 or 0 in lengths or not all(bool(values.isfinite().all()) for values in draws.values()):
        raise ReductionError(
            "posterior draws",
            got=", ".join(f"{name} {tuple(values.shape)}" for name, values in draws.items()) or "an empty dict",
            allowed="finite tensors with the same number of draws in the first dimension",
            fix="pass mcmc.get_samples(), or stack the draws",
        )
    return dict(draws)


def _check_proper(name: str, prior: Distribution, value: Tensor) -> None:
    is_improper = isinstance(strip_wrappers(prior), dist.ImproperUniform)
    wide = in_double(prior)  # unchecked: values outside the support are refused here, by name
    if is_improper or not bool((in_support(wide, value) & wide.log_prob(value).isfinite()).all()):
        raise ReductionError(
            f"site {name!r}",
            got=f"prior {type(strip_wrappers(prior)).__name__}, "
            + ("improper" if is_improper else "with no density at the draws"),
            allowed="proper priors: without a normalised prior there is no Bayes factor",
            fix="truncate the prior, or give it a finite scale",
        )


def _are_same(laws: list[Distribution], value: Tensor) -> bool:
    """Whether all laws have the type, shape and density (at ``value``) of the first."""
    first = laws[0].log_prob(value)
    return all(
        type(strip_wrappers(law)) is type(strip_wrappers(laws[0]))
        and law.batch_shape == laws[0].batch_shape
        and torch.allclose(law.log_prob(value), first, rtol=1e-7, atol=1e-7, equal_nan=True)
        for law in laws[1:]
    )


def _find_part(guide: Any, name: str) -> Any:
    """The member of an AutoGuideList that samples ``name``, or the guide itself."""
    if isinstance(guide, AutoGuideList):
        for part in guide:
            prototype: Any = getattr(part, "prototype_trace", None)
            if prototype is not None and name in prototype.nodes:
                return _find_part(part, name)
    return guide


def _locate(part: AutoContinuous, name: str) -> Tensor:
    """Indices of a site in the guide's flat latent vector, of the site's unconstrained shape."""
    position, prototype = 0, cast(Any, part.prototype_trace)
    for other, node in prototype.iter_stochastic_nodes():
        shape = biject_to(node["fn"].support).inv(node["value"]).shape
        if other == name:
            return torch.arange(position, position + shape.numel()).reshape(shape)
        position += shape.numel()
    raise KeyError(name)
