r"""Fold group scales into weights: from a hierarchical posterior to Normal weights with a fitted prior.

When the groups are decided, a scale has done its work.  Its law and that of its weights are replaced by the Normal with
the moments of their product (independent under the guide; Louizos, Ullrich and Welling 2017, for the Normal scale):

.. math::
    E[w] = E[z]\,\mu, \qquad \mathrm{Var}[w] = E[z^2](\sigma^2 + \mu^2) - E[z]^2\mu^2,

and the prior by one Normal for each tensor, of the variance that maximises the ELBO given the posterior,

.. math:: w \sim N(0, S^2), \qquad S^2 = \frac1n\sum_{i\text{ kept}} \big(E[w_i]^2 + \mathrm{Var}[w_i]\big).

A Laplace prior of scale :math:`b = \tfrac1n\sum_i E|w_i|` takes its place on request (the Bayesian lasso; Park and
Casella 2008): it pulls small weights to zero and leaves large ones, and a weight on a grid costs a number of nats that
grows with :math:`|w|`, as its code does,

.. math:: KL(N(m, s^2)\,\|\,\text{Laplace}(b)) = \ln 2b + E|w|/b - \tfrac12\ln(2\pi e s^2), \quad
    E|w| = s\sqrt{2/\pi}\,e^{-m^2/2s^2} + m\,\mathrm{erf}(m/s\sqrt2).

Point weights (a family whose posterior is on gates) have :math:`\sigma = 0`, and their fold keeps the noise of their
gate only.  On request (``width``) they start at least that share of their tensor's root mean square wide: a start for
the next fit, not a posterior, so nothing may be scored before it.

A scale can also be held (``refit_prior(..., scale=)``): the fitted one follows the weights, large where few are left,
and so never keeps them small.

The deployed network is the same up to rounding; what is lost is that weights of a group shared the noise
of their scale.  What is won: each weight's own change of prior is exact under the guide, and a step costs no draws of
scales.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc.errors import FamilyError, suggest
from pyrobc.family import Family, ReducedPrior, UngatedFamily, normal_prior
from pyrobc.groups import GroupSpec
from pyrobc.lift import LiftedModel
from pyrobc.lifted_layers import LiftedLayer
from pyrobc.meanfield import Factor, MeanFieldGuide, NormalFactor, PointFactor
from pyrobc.posterior import Posterior

__all__ = ["FoldedFamily", "check_folded", "find_normals", "fold_scales", "refit_prior"]

_SMALLEST_SCALE = 1e-6
PriorLaw = Literal["normal", "laplace"]


class FoldedFamily(UngatedFamily, is_registered=False):
    """Normal weights that were another family's; it has no scales, so groups are not scored with it.

    Args:
        origin: the family that was folded.
        prior_scales: standard deviation of the prior of every parameter, or scale of a Laplace law.
        law: ``normal`` or ``laplace``, of weights and biases.
        held: scale of the prior of weights, which is then not fitted.
    """

    name: ClassVar[str] = "folded"

    def __init__(
        self, origin: Family, prior_scales: Mapping[str, float], law: PriorLaw = "normal", held: float | None = None
    ) -> None:
        self.origin, self.prior_scales, self.law, self.held = origin, dict(prior_scales), law, held

    def __repr__(self) -> str:
        """Fitted scales to four digits: a checkpoint that was begun on another processor is told by them too."""
        held = self.held if self.held is None else float(f"{self.held:.4g}")
        scales = {name: float(f"{scale:.4g}") for name, scale in self.prior_scales.items()}
        return f"{type(self).__name__}({self.origin!r}, {scales}, {self.law!r}, {held})"

    def prior(self, spec: GroupSpec, like: Tensor) -> dict[str, Distribution]:
        """One law for each tensor; the scales of normalisation layers are Normal around one."""
        laws: dict[str, Distribution] = {}
        for name, info in spec.parameters.items():
            if self.law == "laplace" and info.kind != "scale":
                one = dist.Laplace(like.new_zeros(()), like.new_tensor(self.prior_scales[name]), validate_args=False)
                laws[name] = one.expand(torch.Size(info.shape)).to_event(len(info.shape))
            else:
                center = 1.0 if info.kind == "scale" else 0.0
                laws[name] = normal_prior(info.shape, self.prior_scales[name], like, loc=center)
        return laws

    def guide(self, spec: GroupSpec, start: Mapping[str, Tensor]) -> MeanFieldGuide:
        """Normals at the network's parameters, a tenth of the prior wide."""
        scales = {n: max(0.1 * self.prior_scales[n], _SMALLEST_SCALE) for n in spec.parameters}
        return MeanFieldGuide({n: NormalFactor(start[n], math.log(scales[n])) for n in spec.parameters})

    def reduced(self) -> dict[str, ReducedPrior]:
        """None for groups; single weights are deleted exactly (``pyrobc.weights``)."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The settings of the family that was folded, and the fitted prior."""
        return {
            **self.origin.settings(),
            "folded": self.origin.name,
            "prior_scales": self.prior_scales,
            "law": self.law,
            "held": self.held,
        }


@torch.no_grad()
def fold_scales(posterior: Posterior, width: float | None = None) -> Posterior:
    """The posterior of the same network with group scales folded into Normal weights and a fitted prior.

    A posterior that is folded already gets its prior fitted again.

    Args:
        posterior: what ``fit`` returned; not changed.
        width: least standard deviation that point weights start with, as a share of their tensor's root mean square;
            fit again before anything is scored.  None refuses point weights.

    Raises:
        FamilyError: the family's weights are points, which have no variance to reduce with.
    """
    family = posterior.model.family
    if isinstance(family, FoldedFamily):
        return refit_prior(posterior)
    if family.posterior_on != "weight" and width is None:
        raise FamilyError(
            f"family {family.name!r}",
            got="point weights",
            allowed="a family with Normal weights, such as group_normal_jeffreys, or a width to start from",
            fix="fit such a family for pruning inside what groups keep, or pass width=0.1 and fit what is returned",
        )
    model, spec = posterior.model, posterior.model.spec
    rows = [block.name for block in spec.blocks if block.emitters]
    if rows:
        raise FamilyError(
            f"scales of {', '.join(rows)}", got="gates on rows (a residual stream, or queries)",
            allowed="gates on what layers read", fix="lift without prune_residual and head_dims",
        )  # fmt: skip
    laws = {name: scale.posterior for name, scale in posterior.scales().items()}
    first = {name: law.mean.to(model.anchor) for name, law in laws.items()}
    second = {name: (law.variance + law.mean.square()).to(model.anchor) for name, law in laws.items()}
    factors: dict[str, Factor] = {}
    for site, factor in posterior.guide.by_site().items():
        if site in model.likelihood.priors(model.anchor):
            factors[site] = copy.deepcopy(factor)
        elif site in spec.parameters:
            layer = _find_reader(model, site) if laws else None
            gates = (None, None) if layer is None else (layer.input_gate(first), layer.input_gate(second))
            factors[site] = _fold(factor, *gates)
            if isinstance(factor, PointFactor):
                _widen(factors[site], width or 0.0)
    plain = posterior.to_module()  # frozen weights have no site: what they read is scaled here
    scales = {n: _fit_scale(f, spec.parameters[n].kind) for n, f in factors.items() if n in spec.parameters}
    folded = LiftedModel(
        plain.train(model.net.training), spec, FoldedFamily(family, scales), model.likelihood, model.example_inputs
    )
    folded.num_data = model.num_data
    guide = MeanFieldGuide(factors)
    return Posterior(folded, guide, posterior.num_data, posterior.seed, list(posterior.history), posterior.input_rms)


@torch.no_grad()
def refit_prior(posterior: Posterior, law: PriorLaw | None = None, scale: float | None = None) -> Posterior:
    """The same posterior, its prior fitted again in place (empirical Bayes).

    Args:
        posterior: folded.
        law: ``normal`` or ``laplace``; the one it has if None.
        scale: of the prior of weights, held at this until a law or another scale is passed; biases' is fitted.

    Raises:
        FamilyError: another law, a scale that is not positive, or a posterior that is not folded.
    """
    model, family = posterior.model, check_folded(posterior)
    if law not in (None, *get_args(PriorLaw)):
        allowed = ", ".join(get_args(PriorLaw))
        raise FamilyError("prior of folded weights", got=repr(law), allowed=allowed, fix=suggest(str(law), ["laplace"]))
    if scale is not None and not 0 < scale < math.inf:
        raise FamilyError("scale of the prior", got=repr(scale), allowed="a positive number", fix="pass 0.1, or None")
    if law is not None or scale is not None:
        family.law, family.held = law or family.law, scale
    sites = posterior.guide.by_site()
    scales = {n: _fit_scale(sites[n], info.kind, family.law) for n, info in model.spec.parameters.items()}
    if family.held is not None:
        scales |= {n: family.held for n, info in model.spec.parameters.items() if info.kind == "weight"}
    family.prior_scales = scales
    return posterior


def check_folded(posterior: Posterior) -> FoldedFamily:
    """The family of a folded posterior.

    Raises:
        FamilyError: it is not folded.
    """
    family = posterior.model.family
    if not isinstance(family, FoldedFamily):
        raise FamilyError(
            f"weights of family {family.name!r}", got="a posterior with group scales",
            allowed="a folded posterior: a weight's own law, without its group's scale", fix="call fold_scales first",
        )  # fmt: skip
    return family


def find_normals(posterior: Posterior) -> dict[str, NormalFactor]:
    """Factors of weights and biases; deleting a norm's scale deletes a channel, which is a matter of groups."""
    sites, parameters = posterior.guide.by_site(), posterior.model.spec.parameters
    names = [name for name, info in parameters.items() if info.kind in ("weight", "bias")]
    return {n: f for n in names if isinstance(f := sites[n], NormalFactor)}


def _find_reader(model: LiftedModel, site: str) -> LiftedLayer | None:
    """The layer whose weight ``site`` is, if it reads gated groups."""
    for path, module in model.net.named_modules():
        weight = f"{path}.weight" if path else "weight"
        if weight == site and isinstance(module, LiftedLayer) and module.blocks:
            return module
    return None


def _fold(factor: Factor, first: Tensor | None, second: Tensor | None) -> NormalFactor:
    assert isinstance(factor, NormalFactor | PointFactor)
    loc: Tensor = factor.value if isinstance(factor, PointFactor) else factor.loc
    variance = torch.zeros_like(loc)
    if isinstance(factor, NormalFactor):
        variance = (2 * factor.log_scale).exp().expand_as(loc)
    if first is not None and second is not None:
        shape = (1, -1, *(1,) * (loc.dim() - 2))
        mean = loc * first.reshape(shape)
        variance = second.reshape(shape) * (variance + loc.square()) - mean.square()
        loc = mean
    folded = NormalFactor(loc, 0.0)
    folded.log_scale = nn.Parameter(0.5 * variance.clamp_min(_SMALLEST_SCALE**2).log())
    if isinstance(factor, NormalFactor):
        folded.keep_(factor.kept)
    return folded


def _widen(factor: Factor, share: float) -> None:
    """At least this share of the tensor's root mean square wide."""
    assert isinstance(factor, NormalFactor)
    least = max(share * float(factor.loc.double().square().mean().sqrt()), _SMALLEST_SCALE)
    factor.log_scale.data.clamp_(min=math.log(least))


def _fit_scale(factor: nn.Module, kind: str, law: PriorLaw = "normal") -> float:
    """Root of the mean square, or mean size, under the posterior of what is kept; one where nothing is."""
    assert isinstance(factor, NormalFactor)
    if factor.kept.sum() == 0:
        return 1.0
    if law == "laplace" and kind != "scale":
        m, s = factor.mean()[factor.kept].double(), factor.log_scale[factor.kept].double().exp()
        size = s * math.sqrt(2 / math.pi) * (-0.5 * (m / s).square()).exp() + m * torch.erf(m / (s * math.sqrt(2)))
        return max(float(size.mean()), _SMALLEST_SCALE)
    center = 1.0 if kind == "scale" else 0.0
    power = (factor.mean() - center).square() + (2 * factor.log_scale).exp()
    return max(float(power[factor.kept].double().mean().sqrt()), _SMALLEST_SCALE)
