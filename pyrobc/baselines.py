r"""Published scores that are no change of prior, and where each of them cuts.

A family brings those of its multipliers (``Family.baselines``).  Two more know weights only, and serve every family
with groups: with :math:`W_g` the weights that compute group g (of an input feature, those that read it) and
:math:`\bar\theta_g` its mean multiplier,

.. math::
    \texttt{l2}: -\ln\|\bar\theta_g W_g\|_2, \qquad \texttt{magnitude}: -\ln\,\text{mean}\,|\bar\theta_g W_g|.

Larger says prune, throughout.

References:
    Li, Kadav, Durdanovic, Samet, Graf (2017), Pruning filters for efficient ConvNets: norms of filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrobc.errors import ReductionError
from pyrobc.family import Effective, Family
from pyrobc.gap import Gap, find_gap
from pyrobc.groups import Block
from pyrobc.posterior import Posterior

__all__ = ["Cut", "Measured", "list_baselines", "measure_baseline", "place_cuts"]

Cut = Literal["gap", "published"] | float | Mapping[str, float]
"""Where a baseline prunes: beyond the widest gap, the publication's number, one's own, or one's own by block."""

_NORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "l2": (Tensor.square, "minus log L2 norm of the weights"),
    "magnitude": (Tensor.abs, "minus log mean size of the weights"),
}


@dataclass(frozen=True)
class Measured:
    """Numbers of a baseline by block, their unit, and the cut of the publication (None: chosen by eye there)."""

    values: dict[str, NDArray[np.float64]]
    unit: str
    published_cut: float | None = None


def list_baselines(family: Family) -> list[str]:
    """Labels of the baselines that groups of this family can be scored by; none where it has no groups."""
    return [*family.baselines(), *_NORMS] if family.reduced() else []


def measure_baseline(posterior: Posterior, label: str) -> Measured:
    """The numbers of one baseline."""
    spec, family = posterior.model.spec, posterior.model.family
    if label in _NORMS:
        size, unit = _NORMS[label]
        mean = posterior.mean()
        sums = {block.name: _sum_weights(block, mean, size) for block in spec.blocks}
        values = {}
        for name, (total, count) in sums.items():
            norm = total.sqrt() if label == "l2" else total / count
            values[name] = _to_array(-(norm * mean.gates[name].double()).log())
        return Measured(values, unit)
    baseline, scales = family.baselines()[label], posterior.presence()
    values = {b.name: _to_array(baseline.of(scales[b.name].posterior)) for b in spec.blocks}
    return Measured(values, baseline.unit, baseline.published_cut)


def place_cuts(measured: Measured, label: str, cut: Cut) -> dict[str, Gap]:
    """The cut of every block; without one, the reason.

    Raises:
        ReductionError: a published cut is asked for where the publication has none.
    """
    if cut == "gap":
        return {name: find_gap(numbers) for name, numbers in measured.values.items()}
    if cut == "published" and measured.published_cut is not None:
        cut = measured.published_cut
    if isinstance(cut, str) or (not isinstance(cut, Mapping) and math.isnan(cut)):
        raise ReductionError(
            f"cut of the baseline {label!r}", got=repr(cut), fix="pass cut='gap'",
            allowed="'gap', a number, numbers by block, or 'published' where the publication has one",
        )  # fmt: skip
    return {name: Gap(float(cut[name] if isinstance(cut, Mapping) else cut), math.nan) for name in measured.values}


def _sum_weights(block: Block, mean: Effective, size: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of ``size`` over the weights of every group, and how many there are; float64, ``[groups]``."""
    total, count = torch.zeros(2, block.size, dtype=torch.float64, device=mean.gates[block.name].device)
    for member in block.members:
        weight = mean.parameters.get(member.parameter)
        if weight is None or weight.dim() == 1 or (member.role == "consume") != block.is_input:
            continue
        lines = size(weight.detach().double().transpose(0, member.axis).flatten(1))
        index = torch.as_tensor(member.indices, device=total.device).sort().values
        owner = torch.as_tensor(member.group_of_index(), device=total.device)
        total.index_add_(0, owner, lines[index].sum(1))
        count.index_add_(0, owner, torch.full_like(owner, lines.shape[1], dtype=total.dtype))
    return total, count


def _to_array(values: Tensor) -> NDArray[np.float64]:
    return values.detach().double().cpu().numpy().copy()
