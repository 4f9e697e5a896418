"""A mean-field guide with one factor per site, sampled directly so that every KL can be analytic.

``MeanFieldGuide`` is an ordinary Pyro guide.  Site names contain dots, which ``nn.Module`` does not allow in the names
of children, so factors are stored under the name with ``/`` for ``.``.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc.dists.log_scale_normal import LogScaleNormal
from pyrobc.dists.pruned_normal import PrunedNormal
from pyrobc.groups import GroupSpec, Ints, Kept

__all__ = ["Factor", "LogNormalFactor", "MeanFieldGuide", "NormalFactor", "PointFactor", "slice_site"]


class Factor(nn.Module):
    """The variational law of one site; every parameter of a factor has the shape of the site, but the ``unsliced``.

    Along axes that share a number it has one.
    """

    lr_scale: float = 1.0
    """Multiplier of the learning rate for this factor's parameters."""
    unsliced: tuple[str, ...] = ()
    """Parameters that do not have the shape of the site, and stay whole when groups are cut away."""

    @abstractmethod
    def distribution(self) -> Distribution:
        """The law at the current parameters; all dimensions are event dimensions."""

    def project_(self) -> None:
        """Put parameters back into their legal range, in place, after an optimiser step; set what has a closed form."""

    def parameters_by_rate(self) -> dict[float, list[nn.Parameter]]:
        """All parameters, by the multiplier of their learning rate."""
        return {self.lr_scale: list(self.parameters())}


class PointFactor(Factor):
    """A point mass: maximum a posteriori for this site."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def distribution(self) -> Distribution:
        """Delta at ``value``."""
        return dist.Delta(self.value, event_dim=self.value.dim(), validate_args=False)


class NormalFactor(Factor):
    """Independent Normals; ``scale = exp(log_scale)``, kept at or below ``max_scale``.

    Entries that are not ``kept`` have been deleted: they are points at zero, and stay so.
    """

    kept: Tensor

    def __init__(self, loc: Tensor, log_scale: float, max_scale: float | None = None) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, log_scale))
        self.max_scale = max_scale
        self.register_buffer("kept", torch.ones_like(loc, dtype=torch.bool))
        self.is_whole = True
        self._found: tuple[Tensor, int, Tensor] | None = None
        self.register_load_state_dict_post_hook(_note_pruned)

    def mean(self) -> Tensor:
        """Where the means are, pruned entries aside."""
        return self.loc

    def distribution(self) -> Distribution:
        """Normal(loc, exp(log_scale)), at zero where pruned."""
        loc = self.mean()
        if self.is_whole:
            whole: Distribution = LogScaleNormal(loc, self.log_scale, validate_args=False).to_event(loc.dim())
            return whole
        law: Distribution = PrunedNormal(loc, self.log_scale.exp(), self.kept, False, self._index()).to_event(loc.dim())
        return law

    def _index(self) -> Tensor:
        """Positions of kept entries, found once for each mask."""
        if self._found is None or self._found[0] is not self.kept or self._found[1] != self.kept._version:
            self._found = self.kept, self.kept._version, self.kept.flatten().nonzero().squeeze(1)
        return self._found[2]

    def keep_(self, kept: Tensor) -> None:
        """Delete the entries that are not in ``kept``, boolean, for good."""
        self.kept &= kept
        self.loc.data.masked_fill_(~self.kept, 0.0)  # a product would first make numbers of the mask
        _note_pruned(self)

    def project_(self) -> None:
        """Clip the scale (Louizos, Ullrich and Welling 2017 clip the first layers'); what is deleted stays at zero."""
        if not self.is_whole:  # an optimiser's momentum outlives a deletion in the middle of a fit
            self.loc.data.masked_fill_(~self.kept, 0.0)
        if self.max_scale is not None:
            self.log_scale.data.clamp_(max=float(np.log(self.max_scale)))


def _note_pruned(factor: nn.Module, _: Any = None) -> None:
    """Ask once, not in every step, whether anything is pruned."""
    cast(NormalFactor, factor).is_whole = bool(cast(Tensor, factor.kept).all())


class LogNormalFactor(Factor):
    """Independent log-normals; ``scale = exp(log_scale)`` of the logarithm."""

    def __init__(self, loc: Tensor, log_scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, log_scale))

    def distribution(self) -> Distribution:
        """LogNormal(loc, exp(log_scale))."""
        law: Distribution = dist.LogNormal(self.loc, self.log_scale.exp(), validate_args=False).to_event(self.loc.dim())
        return law


class MeanFieldGuide(PyroModule):
    """One factor per site."""

    def __init__(self, factors: Mapping[str, Factor]) -> None:
        super().__init__()
        self.factors = nn.ModuleDict()
        self.add(factors)

    def add(self, factors: Mapping[str, Factor]) -> None:
        """Factors of further sites."""
        self.factors.update({name.replace(".", "/"): factor for name, factor in factors.items()})

    def by_site(self) -> dict[str, Factor]:
        """Factors by site name."""
        return {key.replace("/", "."): factor for key, factor in self.factors.items()}  # type: ignore[misc]

    def distributions(self) -> dict[str, Distribution]:
        """The law of every site at the current parameters."""
        return {name: factor.distribution() for name, factor in self.by_site().items()}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site in Pyro; takes whatever the model takes and reads none of it."""
        return {name: pyro.sample(name, cast(Any, law)) for name, law in self.distributions().items()}

    def project_(self) -> None:
        """Put every factor's parameters back into their legal range."""
        with torch.no_grad():
            for factor in self.by_site().values():
                factor.project_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for ``torch.optim``, grouped by the factor ``lr_scale`` on the learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for factor in self.by_site().values():
            for scale, parameters in factor.parameters_by_rate().items():
                groups.setdefault(scale, []).extend(parameters)
        return [{"params": params, "lr_scale": scale} for scale, params in groups.items()]

    def count_deleted(self) -> int:
        """Entries that have been deleted for good."""
        masks = [factor.kept for factor in self.by_site().values() if isinstance(factor, NormalFactor)]
        return sum(mask.numel() - int(mask.count_nonzero()) for mask in masks)

    def restricted(self, spec: GroupSpec, kept: Kept) -> MeanFieldGuide:
        """The guide of the network after a cut: removed groups' factors are sliced away, the rest carries over."""
        small = copy.deepcopy(self)
        indices = spec.kept_indices(kept)
        for site, factor in small.by_site().items():
            for name, parameter in list(factor.named_parameters(recurse=False)):
                if name in factor.unsliced:
                    continue
                value = slice_site(site, parameter.detach(), spec, kept, indices)
                setattr(factor, name, nn.Parameter(value.clone()))
            for name, buffer in list(factor.named_buffers(recurse=False)):
                factor.register_buffer(name, slice_site(site, buffer, spec, kept, indices).clone())
        return small


def slice_site(
    site: str, value: Tensor, spec: GroupSpec, kept: Kept, indices: Mapping[tuple[str, int], Ints]
) -> Tensor:
    """What a cut leaves of a tensor of a site's shape: kept rows and columns of a parameter, kept groups of a block.

    An axis along which the tensor has one number for all of the parameter's stays.

    ``indices`` is ``spec.kept_indices(kept)``, worked out once for many sites.
    """
    if site in spec.parameters:
        for axis in range(value.dim()):
            if (site, axis) in indices and value.shape[axis] == spec.tensors[site][axis]:
                value = value.index_select(axis, torch.as_tensor(indices[site, axis], device=value.device))
        return value
    block = spec.by_name.get(site.rpartition(".")[0])
    if block is not None and value.shape == (block.size,):
        return value[torch.as_tensor(kept[block.name], device=value.device)]
    return value
