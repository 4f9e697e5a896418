r"""Gates on groups that weights follow: a guide that is a product over sites but for weights behind their gates.

A weight or bias that produces group ``g`` is Normal where the gate of ``g`` is open and keeps its prior where it is
closed (``dists.gated_normal``).  ``distributions`` gives each such site its law where it is read, with the gate's
probability in the divergence; the program samples gates first, and weights given the gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc.dists import GatedNormal, Switch
from pyrobc.dists.switch import switch_on
from pyrobc.groups import GroupSpec, Kept
from pyrobc.meanfield import Factor, MeanFieldGuide

__all__ = ["GatedGuide", "SwitchFactor"]

_FIRST_LOG_ODDS = math.log(0.99 / 0.01)
_LARGEST_LOG_ODDS = 15.0


class SwitchFactor(Factor):
    """Gates, started open with probability 0.99."""

    prior_log_odds: Tensor

    def __init__(self, prior: Switch, lr_scale: float) -> None:
        super().__init__()
        self.temperature, self.lr_scale = prior.temperature, lr_scale
        self.log_odds = nn.Parameter(torch.full_like(prior.log_odds, _FIRST_LOG_ODDS))
        self.register_buffer("prior_log_odds", prior.log_odds)

    def distribution(self) -> Distribution:
        """All gates of a block as one site."""
        law = Switch(self.log_odds, self.prior_log_odds, self.temperature, validate_args=False)
        joint: Distribution = law.to_event(1)
        return joint

    def project_(self) -> None:
        """Keep the gates where both of their probabilities are numbers."""
        self.log_odds.data.clamp_(-_LARGEST_LOG_ODDS, _LARGEST_LOG_ODDS)


class GatedGuide(MeanFieldGuide):
    """Factors by site, of which weights and biases follow the gate of the group that they produce."""

    def __init__(self, factors: Mapping[str, Factor], spec: GroupSpec, weight_scale: float) -> None:
        super().__init__(factors)
        self.spec, self.weight_scale = spec, weight_scale

    def distributions(self) -> dict[str, Distribution]:
        """The law of every site, of gated weights that where they are read."""
        laws = super().distributions()
        sites: dict[str, Any] = self.by_site()
        odds = {block.name: sites[f"{block.name}.gate"].log_odds for block in self.spec.blocks}
        for name, log_odds in _spread_over_rows(self.spec, odds, math.inf).items():
            law: Any = laws[name]
            gated = GatedNormal(law.base_dist.loc, law.base_dist.scale, log_odds, self.weight_scale, False)
            laws[name] = gated.to_event(law.reinterpreted_batch_ndims)
        return laws

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample gates, then weights given the gates."""
        laws: dict[str, Any] = self.distributions()
        sites = [f"{block.name}.gate" for block in self.spec.blocks]
        values = {site: pyro.sample(site, laws[site]) for site in sites}
        gates = {site.removesuffix(".gate"): switch_on(value) for site, value in values.items()}
        rows = _spread_over_rows(self.spec, gates, 1.0)
        for name, law in laws.items():
            if name in rows:
                law = law.base_dist.given(rows[name]).to_event(rows[name].dim())
            if name not in values:
                values[name] = pyro.sample(name, law)
        return values

    def restricted(self, spec: GroupSpec, kept: Kept) -> MeanFieldGuide:
        """The guide after a cut, with its groups."""
        small = super().restricted(spec, kept)
        assert isinstance(small, GatedGuide)
        small.spec = spec.restricted(kept)
        return small


def _spread_over_rows(spec: GroupSpec, values: Mapping[str, Tensor], rest: float) -> dict[str, Tensor]:
    """Values of groups at the weights and biases that produce them, broadcasting; ``rest`` where none does."""
    found: dict[str, Tensor] = {}
    for block in spec.blocks:
        for member in block.members:
            name, info = member.parameter, spec.parameters.get(member.parameter)
            if member.role == "produce" and info is not None and info.kind in ("weight", "bias"):
                value = values[block.name]
                rows = found.get(name, value.new_full((info.shape[0],), rest))
                index = torch.as_tensor(np.sort(member.indices), device=value.device)
                owner = torch.as_tensor(member.group_of_index(), device=value.device)
                found[name] = rows.index_copy(0, index, value.index_select(0, owner))
    return {name: rows.reshape(-1, *(1,) * (len(spec.parameters[name].shape) - 1)) for name, rows in found.items()}
