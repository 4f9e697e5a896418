r"""When is a group negligible?  The multiplier below which it carries less than a share of the next layer's input.

Group ``g`` of a block feeds a layer through columns :math:`W_{:,i}, i \in g`, times its multiplier :math:`z_g`, on
inputs with root mean square :math:`r_i`.  Its standard contribution to the layer's pre-activations and its share are

.. math::
    c_g^2 = \sum_{i\in g} r_i^2 \sum_j E[w_{ji}]^2, \qquad
    \text{share}_g = z_g\, c_g / T,\quad T^2 = \sum_i E[z_{g(i)}]^2\, r_i^2 \sum_j E[w_{ji}]^2,

so ``share < epsilon`` is the event :math:`z_g < \epsilon T / c_g`: the ROPE.  With several readers the smallest
threshold counts.  Where a reader sees what is gated already, its :math:`r_i` is divided by the gate's mean.

A dimension of attention's queries feeds products with keys in place of a layer.  There :math:`c_g` is the root of the
product of what queries and keys have there, :math:`\sum_i r_i^2 E[w_{gi}]^2 + E[b_g]^2` each (of independent inputs),
and :math:`T^2` the sum over all dimensions of :math:`E[z_g]^2 c_g^2`.

A group whose weights carry nothing, or whose readers receive nothing from anywhere (a layer that died), stays below
its share at every multiplier: its ROPE is the whole support, the
posterior probability of it is one whatever the data say, and the threshold infinite.  So that thresholds and odds are
finite, a threshold ends where the prior leaves a mass of :math:`10^{-12}` above it: the posterior odds of an unlearnt
multiplier (:math:`q = p`) are :math:`10^{12}` there, beyond any level that is asked for.  (A cap at 99% of the prior
would put a floor of 0.01 under every probability of being needed, and a rule that bounds the rate of false removals at
0.01 could remove nothing.)  Without gates the multiplier is the size of the group's own weights, to which what it
carries is proportional: its threshold is the same, in units of the size that is deployed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrobc.dists import interval_log_mass
from pyrobc.family import Effective, GroupScale
from pyrobc.groups import Block, GroupSpec
from pyrobc.selection import CHUNK

__all__ = ["DEFAULT_EPSILON", "find_sizes", "negligible_thresholds"]

DEFAULT_EPSILON = 1e-2
"""Share of a layer's input below which a group is negligible, unless the user says otherwise."""

_SMALLEST_MASS_ABOVE = 1e-12


def negligible_thresholds(
    spec: GroupSpec,
    mean: Effective,
    input_rms: Mapping[str, Tensor],
    epsilon: float,
    priors: Mapping[str, Distribution] | None = None,
    sizes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Multiplier of each group below which its share is under ``epsilon``, by block, float64.

    Args:
        spec: the groups.
        mean: posterior mean of gates and parameters: the network that is deployed, which carries no noise.
        input_rms: root mean square of every input channel of each reading layer, by weight path; ones if absent.
        epsilon: the largest negligible share.
        priors: prior law of the multipliers, by block, for the cap; None for no cap.
        sizes: multipliers of the network that is deployed where they are no gates (``GroupScale.size``), by block.
    """
    power: dict[str, Tensor] = {}
    received: dict[str, Tensor] = {}
    for block in spec.blocks:
        for member in block.readers:
            name = member.parameter
            if name not in power:
                power[name] = _column_power(name, mean, input_rms)
                received[name] = power[name].clone()
            index = torch.as_tensor(member.indices, device=power[name].device).sort().values
            owner = torch.as_tensor(member.group_of_index(), device=power[name].device)
            gate = mean.gates[block.name].double()[owner].square()
            if member.role == "read":
                power[name][index] /= gate.clamp_min(1e-300)
            received[name][index] = power[name][index] * gate
    thresholds = {}
    for block in spec.blocks:
        like = mean.gates[block.name].double()
        bound = torch.full_like(like, torch.inf) if priors is None else _prior_cap(priors[block.name], like)
        unit = sizes[block.name].clamp_min(1e-30) if sizes else torch.ones_like(like)
        if not block.readers:
            carried = _product_power(block, mean, input_rms)
            total = (carried * like.square()).sum()
            bound = torch.minimum(bound, unit * epsilon * _measure_room(total, carried))
        for member in block.readers:
            index = torch.as_tensor(member.indices, device=bound.device).sort().values
            owner = torch.as_tensor(member.group_of_index(), device=bound.device)
            carried = bound.new_zeros(block.size).index_add(0, owner, power[member.parameter][index])
            total = received[member.parameter].sum()
            bound = torch.minimum(bound, unit * epsilon * _measure_room(total, carried))
        thresholds[block.name] = bound
    return thresholds


def _measure_room(total: Tensor, carried: Tensor) -> Tensor:
    """Multiplier at which a group would carry all that is received; beyond any where one of the two is nothing."""
    is_something = (carried > 0) & (total > 0)
    return torch.where(is_something, total / carried.clamp_min(1e-300), 1e300).sqrt()


def _product_power(block: Block, mean: Effective, input_rms: Mapping[str, Tensor]) -> Tensor:
    """Power of queries times that of keys, by group."""
    power = torch.ones_like(mean.gates[block.name], dtype=torch.float64)
    for member in (m for m in block.members if m.parameter.endswith("weight")):
        weight, bias = mean.parameters[member.parameter].detach().double(), f"{member.module}.bias".lstrip(".")
        rows = weight.square() @ input_rms.get(member.parameter, weight.new_ones(weight.shape[1])).double().square()
        if bias in mean.parameters:
            rows = rows + mean.parameters[bias].detach().double().square()
        power = power * rows[torch.as_tensor(member.indices, device=power.device)]
    return power


def find_sizes(scales: Mapping[str, GroupScale]) -> dict[str, Tensor]:
    """Multipliers of the network that is deployed, by block, where they are no gates."""
    return {name: scale.size for name, scale in scales.items() if scale.size is not None}


def _column_power(weight: str, mean: Effective, input_rms: Mapping[str, Tensor]) -> Tensor:
    found = mean.parameters[weight].detach()
    rows = max(1, CHUNK * found.shape[0] // max(1, found.numel()))  # float64 for so many at a time
    power = torch.zeros(found.shape[1], dtype=torch.float64, device=found.device)
    for part in found.split(rows):
        power += part.double().square().transpose(0, 1).flatten(1).sum(1)
    return power * input_rms[weight].double().square() if weight in input_rms else power


def _prior_cap(prior: Distribution, like: Tensor) -> Tensor:
    """The size of multiplier with prior probability 1e-12 above it, by bisection on its logarithm."""
    low, high = torch.full_like(like, -50.0), torch.full_like(like, 50.0)
    top = torch.full_like(like, torch.inf)
    for _ in range(60):
        middle = (low + high) / 2
        size = middle.exp()
        above = torch.logaddexp(interval_log_mass(prior, size, top), interval_log_mass(prior, -top, -size))
        is_below = above > math.log(_SMALLEST_MASS_ABOVE)
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return low.exp()
