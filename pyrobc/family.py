r"""What a sparsity method is: a prior, the guide that answers to it, and the simpler priors that reduction may try.

A family is one file in ``guides/``: a final class that subclasses :class:`Family` and sets ``name``.  Importing it
registers it; ``families()`` imports every module of ``pyrobc.guides`` and every entry point ``pyrobc.families``.  A
family sees a ``GroupSpec`` and tensors.  It never sees a network, a threshold or a decision.

Sites.  Parameters of the network keep their paths as site names (``features.0.weight``); a block's scales are its
siblings (``features.0.gate``).  The joint prior is a product over sites unless a family overrides ``sample_prior``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.dists import Restricted
from pyrobc.dists.normal_kl import sum_kl
from pyrobc.errors import FamilyError, suggest
from pyrobc.groups import GroupSpec
from pyrobc.kinds import check_setting
from pyrobc.meanfield import MeanFieldGuide

__all__ = [
    "Baseline",
    "Effective",
    "Family",
    "GroupScale",
    "Laws",
    "ReducedPrior",
    "Reference",
    "UngatedFamily",
    "families",
    "make_family",
    "normal_prior",
    "restrict_to",
]


Laws = Mapping[str, Any]
"""Distributions by site name; ``Any``, because what a law offers (``loc``, ``base_dist``) depends on its class."""


class Reference(NamedTuple):
    """A publication; ``bibtex`` is the entry to cite."""

    key: str
    authors: str
    title: str
    year: int
    venue: str
    url: str = ""

    def bibtex(self) -> str:
        """The BibTeX entry."""
        url = f",\n  url = {{{self.url}}}" if self.url else ""
        return (
            f"@misc{{{self.key},\n  author = {{{self.authors}}},\n  title = {{{self.title}}},\n"
            f"  year = {{{self.year}}},\n  howpublished = {{{self.venue}}}{url}\n}}"
        )


@dataclass(frozen=True)
class Effective:
    """What one draw of the sites means for the network.

    Attributes:
        gates: multiplier of each group where it is read, by block; shape ``[groups]`` or ``[draws, groups]``, where
            draws divide the examples of a minibatch into equal runs; no blocks at all where every multiplier is one.
        parameters: weights, biases and other trainable parameters by path (their means where ``variances`` has them).
        variances: variances of Normal weights and biases that have not been drawn: the pre-activations will be
            (local reparameterisation, Kingma, Salimans and Welling 2015).
    """

    gates: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    variances: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupScale:
    """Posterior and prior law of the multiplier of each group of a block; batch shape ``[groups]``.

    Attributes:
        posterior: law under the guide.
        prior: law under the prior.
        size: None where the multiplier is a gate, or tells whether the group is there (0 or 1).  Where it is the size
            of the group's own weights, its value in the network that is deployed.
    """

    posterior: Distribution
    prior: Distribution
    size: Tensor | None = None


@dataclass(frozen=True)
class ReducedPrior:
    """A simpler prior for a group's multiplier.

    Attributes:
        label: name used in tables and plans.
        of: ``(prior, threshold) -> reduced prior``; ``threshold`` is the multiplier below which a group is negligible.
        event: ``threshold -> (lower, upper)`` when the reduction is the prior restricted to that interval; None when it
            is a point or another smooth prior, which exclude nothing that the full prior had mass on.
    """

    label: str
    of: Callable[[Distribution, Tensor], Distribution]
    event: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Baseline:
    """A published score that is no change of prior: one number per group, larger says prune, cut where a gap is.

    Attributes:
        label: name used in tables and plans.
        of: posterior law of a block's multipliers -> score of each group.
        unit: what the number is.
        published_cut: number above which the publication prunes; None where it chooses by eye.
    """

    label: str
    of: Callable[[Any], Tensor]
    unit: str
    published_cut: float | None = None


def restrict_to(label: str, event: Callable[[Tensor], tuple[Tensor, Tensor]]) -> ReducedPrior:
    """The reduction to an interval of multipliers that may depend on the threshold."""

    def of(prior: Distribution, threshold: Tensor) -> Distribution:
        return Restricted(prior, *event(threshold))

    return ReducedPrior(label, of, event)


class Family(ABC):
    """Abstract; every subclass that sets ``name`` is final and registers itself, unless ``is_registered=False``.

    Class attributes:
        name: registry key.
        posterior_on: whether noise sits on gates (weights are points) or on weights as well.
        has_closed_form_kl: every site's KL is analytic.
        path: the road of ``fit`` that is the method's own (see there).
        kl_is_bound: the KL counts variables that the sites leave out, and so bounds that of the sites from above.
        default_reduction: key into ``reduced()`` that decisions use.
        references: what to cite.
    """

    name: ClassVar[str] = ""
    posterior_on: ClassVar[Literal["gate", "weight"]]
    has_closed_form_kl: ClassVar[bool] = True
    path: ClassVar[Literal["fast", "traced", "moments"]] = "fast"
    kl_is_bound: ClassVar[bool] = False
    default_reduction: ClassVar[str] = "rope"
    references: ClassVar[tuple[Reference, ...]] = ()

    def __init_subclass__(cls, is_registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not is_registered or inspect.isabstract(cls) or not cls.__dict__.get("name"):
            return
        other = _REGISTRY.get(cls.name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise FamilyError(
                f"family {cls.name!r}",
                got=f"a second registration, by {cls.__module__}",
                allowed=f"one; {other.__module__} has it",
                fix="give the new family another name",
            )
        _REGISTRY[cls.name] = cls

    @abstractmethod
    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """Independent prior of every site, on ``like``'s device and in its dtype."""

    @abstractmethod
    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """A guide with exactly the prior's sites, started from the network's parameters ``start``."""

    @abstractmethod
    def combine(self, values: Mapping[str, Tensor], spec: GroupSpec) -> Effective:
        """What drawn sites mean for the network (deterministic)."""

    @abstractmethod
    def draw_local(self, laws: Laws, spec: GroupSpec, num_examples: int) -> Effective:
        """One low-variance draw for a minibatch: noise per example, weights left as mean and variance."""

    @abstractmethod
    def mean(self, laws: Laws, spec: GroupSpec) -> Effective:
        """Posterior mean of gates and parameters: what is deployed."""

    @abstractmethod
    def scales(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """Posterior and prior law of every group's multiplier, by block; no blocks where every multiplier is one."""

    def presence(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """What reductions act on: the multipliers, unless something else says how much of a group is there."""
        return self.scales(laws, priors, spec)

    def weight_log_odds(self, laws: Laws, spec: GroupSpec) -> dict[str, Tensor]:
        """Posterior log odds that each weight is zero, by parameter; none where the family does not say."""
        return {}

    @abstractmethod
    def reduced(self) -> dict[str, ReducedPrior]:
        """The simpler priors that may be tried, by label."""

    def baselines(self) -> dict[str, Baseline]:
        """Published scores to compare with, by label; override where the method has one."""
        return {}

    def sample_prior(self, priors: Laws) -> dict[str, Tensor]:
        """Sample every site in Pyro; override for priors whose sites depend on each other."""
        return {name: pyro.sample(name, law) for name, law in priors.items()}

    def kl(self, laws: Laws, priors: Laws) -> dict[str, Tensor]:
        """KL(guide || prior) of every site in nats (scalars), from closed forms."""
        return {name: sum_kl(law, priors[name]) for name, law in laws.items()}

    def kl_weights(self, spec: GroupSpec, num_data: int) -> Mapping[str, float]:
        """Weights of sites' KLs in the loss, besides the temperature; 1 where left out, as everywhere in the ELBO."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Constructor arguments, for plans and checkpoints."""
        return {k: getattr(self, k) for k in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        return f"{type(self).__name__}({arguments})"


class UngatedFamily(Family):
    """Abstract: Normal laws of parameters and no gates, so that every multiplier in the network is one."""

    posterior_on: ClassVar[Literal["gate", "weight"]] = "weight"

    def combine(self, values: Mapping[str, Tensor], spec: GroupSpec) -> Effective:
        """Parameters as they are."""
        like = next(iter(values.values()))
        ones = {block.name: like.new_ones(block.size) for block in spec.blocks}
        return Effective(ones, {name: values[name] for name in spec.parameters})

    def draw_local(self, laws: Laws, spec: GroupSpec, num_examples: int) -> Effective:
        """Means and variances of weights and biases: little is left to draw."""
        normals = {name: laws[name].base_dist for name in spec.parameters}
        drawn = {n: q.rsample() for n, q in normals.items() if spec.parameters[n].kind in ("scale", "other")}
        means = {name: normal.loc for name, normal in normals.items()} | drawn
        return Effective({}, means, {n: q.variance for n, q in normals.items() if n not in drawn})

    def mean(self, laws: Laws, spec: GroupSpec) -> Effective:
        """Posterior means."""
        return self.combine({name: law.mean for name, law in laws.items()}, spec)

    def scales(self, laws: Laws, priors: Laws, spec: GroupSpec) -> dict[str, GroupScale]:
        """None."""
        return {}


_REGISTRY: dict[str, type[Family]] = {}


def families() -> dict[str, type[Family]]:
    """Every family by name: the built-in files of ``pyrobc.guides`` and installed entry points, discovered."""
    import pyrobc.guides as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group="pyrobc.families"):
        point.load()
    return dict(sorted(_REGISTRY.items()))


def make_family(family: Family | str, **settings: Any) -> Family:
    """A family from its name and settings; an instance passes through.

    Raises:
        FamilyError: unknown name (the nearest is suggested) or settings that the family does not take.
    """
    if isinstance(family, Family):
        if settings:
            raise FamilyError(
                f"settings of family {family!r}",
                got=", ".join(settings),
                allowed="settings together with a name; an instance has its own",
                fix=f"pass family={family.name!r}, or build the instance with these settings",
            )
        return family
    known = families()
    if family not in known:
        fix = f"pass an instance, {family.__name__}()" if isinstance(family, type) else suggest(str(family), known)
        raise FamilyError("family", got=repr(family), allowed=", ".join(known), fix=fix)
    accepted = inspect.signature(known[family]).parameters
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise FamilyError(
            f"settings of family {family!r}",
            got=", ".join(unknown),
            allowed=", ".join(accepted) or "none",
            fix=suggest(unknown[0], accepted),
        )
    for key, value in settings.items():
        check_setting(f"setting {key!r} of family {family!r}", accepted[key], value)
    return known[family](**settings)


def normal_prior(shape: tuple[int, ...], scale: float, like: Tensor, loc: float = 0.0) -> Distribution:
    """Independent Normals over a whole tensor as one site."""
    one = dist.Normal(like.new_full((), loc), like.new_full((), scale), validate_args=False)
    law: Distribution = one.expand(torch.Size(shape)).to_event(len(shape))
    return law
