r"""What a plan saves: the three columns of the published tables, and the bytes that are there.

Louizos, Ullrich and Welling (2017) count the weights of linear and convolution layers, no biases and no headers.
*Pruning*: dense weights over weights of the smaller dense network.  *Fast prediction*: 32 bits each over :math:`b_l`
bits for each weight that is left in layer ``l``.  *Maximum compression*: 32 bits for each distinct value of a layer and
the entropy of its weights (``bits.published_rates``).  These are estimates.  The last row is a file: every byte of it,
architecture, biases and tables included, against the float32 parameters before.

Bits per weight come from the plan, or from the posterior by the published rule: :math:`b_l = 1 + e + t_l`, with
:math:`t_l` the mean significand bits of the variances in the layer (``bits.layer_bits``).  A weight is what it is times
the multiplier of the group it reads, which are independent:

.. math:: \mathrm{Var}[zw] = \mathrm{Var}[z]\,E[w]^2 + E[z]^2\,\mathrm{Var}[w] + \mathrm{Var}[z]\,\mathrm{Var}[w].

Weights are then rounded to multiples of :math:`2^{-t_l}` for the last two rows, and biases by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc import codec
from pyrobc.bits import MAX_SIGNIFICAND, PublishedRates, layer_bits, published_rates, round_to_grid
from pyrobc.errors import FamilyError, OutputError, PlanError
from pyrobc.export import load, planned_steps

if TYPE_CHECKING:
    from pyrobc.plan import Plan
    from pyrobc.posterior import Posterior

__all__ = ["CompressionTable", "LayerCount", "compression_table"]

_FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCount:
    """Weights of one layer before and after, and bits for each that is left."""

    name: str
    dense: int
    kept: int
    bits: int


@dataclass(frozen=True)
class CompressionTable:
    """What ``compression_table`` returns; ``str`` and ``print`` give Markdown.

    Attributes:
        layers: counts by layer.
        rates: the published columns, full precision.
        dense_bytes: float32 parameters before, biases included.
        num_bytes: bytes of the coded file; None where no network was given, or the format does not hold it.
        notes: why a row is missing.
    """

    layers: tuple[LayerCount, ...]
    rates: PublishedRates
    dense_bytes: int
    num_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """``name``, ``before``, ``after`` and ``ratio`` of each measure; the last two of the four if they are known."""
        before = sum(layer.dense for layer in self.layers)
        after = sum(layer.kept for layer in self.layers)
        stored = sum(layer.kept * layer.bits for layer in self.layers)
        table: list[tuple[str, float, float, float]] = [
            ("pruning, weights", before, after, self.rates.pruning),
            ("fast prediction, bits", _FLOAT_BITS * before, stored, self.rates.fast),
        ]
        if self.rates.maximum is not None:
            coded = _FLOAT_BITS * before / self.rates.maximum
            table.append(("maximum compression, bits", _FLOAT_BITS * before, coded, self.rates.maximum))
        if self.num_bytes is not None:
            ratio = self.dense_bytes / self.num_bytes
            table.append(("coded file, bytes", self.dense_bytes, self.num_bytes, ratio))
        return [dict(zip(("name", "before", "after", "ratio"), row, strict=True)) for row in table]

    def __str__(self) -> str:
        """Two Markdown tables and the notes."""
        rates = [
            [row["name"], f"{row['before']:,}", f"{row['after']:,.0f}", f"{row['ratio']:.2f}\u00d7"]
            for row in self.rows
        ]
        layers = [[part.name, f"{part.dense:,}", f"{part.kept:,}", str(part.bits)] for part in self.layers]
        tables = [
            _to_markdown(["", "before", "after", "ratio"], rates),
            _to_markdown(["layer", "weights before", "after", "bits each"], layers),
        ]
        return "\n\n".join([*tables, *self.notes])


def compression_table(
    plan: Plan,
    network: nn.Module | str | Path | None = None,
    *,
    posterior: Posterior | None = None,
    exponent: int = 3,
) -> CompressionTable:
    """The published compression rates of a plan, and the bytes of the network that it leaves.

    Args:
        plan: gives pruning, and the bits of fast prediction (``plan.bits``) unless a posterior is given.
        network: the compact network, or an ``.rbc`` file of it, whose numbers are then counted as they are stored; with
            neither but with a posterior, its mean.  It gives maximum compression and bytes.
        posterior: of the compact network, or of the one before the cut; gives bits by the published rule.
        exponent: exponent bits of that rule; 3 is published, ``bits.exponent_bits`` of the weights has a reason.

    Raises:
        PlanError: the network or the posterior is not the plan's.
        FamilyError: the posterior's multipliers have no variance in closed form.
        OutputError: the file is missing or damaged.

    Example:
        >>> table = compression_table(plan, posterior=result.posterior)  # doctest: +SKIP
        >>> print(table)  # doctest: +SKIP
    """
    left = plan.network_left()
    tensors = dict.fromkeys([*(part.tensor for part in plan.slices), *plan.network])  # JSON keeps the order of slices
    names = [name for name in tensors if len(plan.network[name]) > 1 and name.rpartition(".")[2] == "weight"]
    significands: dict[str, int] = {}
    widths = {name: plan.bits.get(name, _FLOAT_BITS) for name in names}
    if posterior is not None:
        posterior = _fit_to_plan(posterior, plan, left)
        for name, variance in _find_variances(posterior).items():
            significands[name], total = layer_bits(variance, exponent=exponent)
            widths |= {name: total} if name in widths else {}
        network = posterior.to_module() if network is None else network
    values, num_bytes = None, None
    notes: tuple[str, ...] = ()
    if network is not None:
        net = load(network) if isinstance(network, str | Path) else network
        state = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
        _check_shapes(f"network {network}" if net is not network else "network", state, left)
        if net is not network:
            steps, num_bytes = {}, Path(str(network)).stat().st_size
        else:
            steps = _choose_steps(state, plan, significands)
            num_bytes, notes = _count_bytes(net, steps)
        values = [_round(state[name], steps.get(name)) for name in names]
    dense, kept = ([prod(shapes[name]) for name in names] for shapes in (plan.network, left))
    bits = [widths[name] for name in names]
    rates = published_rates(dense, kept, bits, values)
    layers = tuple(LayerCount(*row) for row in zip(names, dense, kept, bits, strict=True))
    return CompressionTable(layers, rates, _FLOAT_BITS // 8 * plan.parameters[0], num_bytes, notes)


def _fit_to_plan(posterior: Posterior, plan: Plan, left: Mapping[str, tuple[int, ...]]) -> Posterior:
    tensors = dict(posterior.model.spec.tensors)
    if tensors == dict(plan.network) and tensors != left:
        return posterior.restricted({name: np.asarray(groups) for name, groups in plan.kept().items()})
    if tensors != left:
        raise PlanError(
            "posterior", got="that of another network", allowed="that of the plan's network, before or after the cut",
            fix="pass the posterior and the plan of one result",
        )  # fmt: skip
    return posterior


def _find_variances(posterior: Posterior) -> dict[str, NDArray[np.float64]]:
    """Posterior variance of what is not deleted: weights as deployed, their group's multiplier included, and biases."""
    spec = posterior.model.spec
    try:
        gates = {name: _moments(scale.posterior) for name, scale in posterior.scales().items()}
    except NotImplementedError as error:
        raise FamilyError(
            f"bits from the posterior of {posterior.model.family!r}", got="multipliers without a variance",
            allowed="laws whose mean and variance are known", fix="leave posterior out",
        ) from error  # fmt: skip
    laws, factors = posterior.laws(), posterior.guide.by_site()
    found = {}
    for name in spec.parameters:
        mean, variance = _moments(laws[name])
        if mean.dim() > 1:
            gate_mean, gate_variance = mean.new_ones(mean.shape[1]), mean.new_zeros(mean.shape[1])
            for block in (b for b in spec.blocks if b.name in gates):  # folded scales are in the weights already
                for member in (m for m in block.consumers if m.parameter == name):
                    index = torch.as_tensor(member.indices).sort().values
                    gate_mean[index], gate_variance[index] = (m[member.group_of_index()] for m in gates[block.name])
            gate_mean, gate_variance = (m.reshape(-1, *[1] * (mean.dim() - 2)) for m in (gate_mean, gate_variance))
            variance = gate_variance * mean.square() + gate_mean.square() * variance + gate_variance * variance
        kept = getattr(factors[name], "kept", None)
        found[name] = (variance if kept is None or kept.all() else variance[kept.cpu()]).numpy()
    return found


def _moments(law: Distribution) -> tuple[Tensor, Tensor]:
    return law.mean.detach().double().cpu(), law.variance.detach().double().cpu()


def _choose_steps(state: Mapping[str, Tensor], plan: Plan, significands: Mapping[str, int]) -> dict[str, float]:
    """Steps of the grids: those of the plan, by significand bits where it has none and these are known."""
    return {n: 2.0**-bits for n, bits in significands.items() if bits < MAX_SIGNIFICAND} | planned_steps(plan, state)


def _count_bytes(net: nn.Module, steps: Mapping[str, float]) -> tuple[int | None, tuple[str, ...]]:
    try:
        return codec.encode(net, steps=steps)[1].num_bytes, ()
    except OutputError as error:
        return None, (f"No coded file: {error.subject}: {error.got}, which the format does not hold.",)


def _round(weights: Tensor, step: float | None) -> NDArray[Any]:
    values = weights.double().numpy()
    return values if step is None else round_to_grid(values, step)


def _check_shapes(subject: str, state: Mapping[str, Tensor], left: Mapping[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != left:
        name = next(n for n in sorted({*shapes, *left}) if shapes.get(n) != left.get(n))
        raise PlanError(
            subject, got=f"{name} of shape {shapes.get(name)}", allowed=f"{left.get(name)}, which the plan leaves",
            fix="pass the network that the plan was applied to",
        )  # fmt: skip


def _to_markdown(header: list[str], rows: list[list[str]]) -> str:
    """Aligned, so that it reads as text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in [header, rule, *rows]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
