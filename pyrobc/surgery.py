"""Apply a plan: a physically smaller plain module, returned only if it computes what the masked network computes."""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc.attention import match_attention
from pyrobc.calling import call_network, first_tensor
from pyrobc.errors import PlanError, SurgeryError
from pyrobc.kinds import check_kind
from pyrobc.plan import Plan
from pyrobc.slicing import slice_tensors

__all__ = ["apply", "mask"]

TOLERANCE = 1e-5
"""Largest difference between masked and cut outputs, relative to the larger of one and the largest output."""


@runtime_checkable
class Fitted(Protocol):
    """Anything that can give a plain network at its posterior mean."""

    def to_module(self) -> nn.Module:
        """The plain network."""
        ...


def apply(plan: Plan, target: nn.Module | Fitted, *, example_inputs: Any = None) -> nn.Module:
    """Cut ``target`` by ``plan``.

    Args:
        plan: what to keep.
        target: a fitted posterior (its mean network is cut) or a plain network of the plan's shapes.
        example_inputs: inputs for the check; random ones of the planned shape if None.

    Returns:
        An ordinary module in evaluation mode; ``target`` is not changed.

    Raises:
        PlanError: the network is another one, or is already cut.
        SurgeryError: masked and cut outputs differ.
    """
    check_kind(plan, Plan, "plan", "what bc.decide or bc.read_plan returns", "pass apply(plan, net)")
    net = match_attention(target if isinstance(target, nn.Module) else target.to_module(), plan.network)
    _check_network(plan, net)
    indices = {(part.tensor, part.axis): np.asarray(part.kept) for part in plan.slices}
    small = slice_tensors(net, indices, {part.tensor for part in plan.slices if part.role == "select"}).eval()
    _check_size(plan, net, small)
    small.requires_grad_(True)
    inputs = _probe(plan, net) if example_inputs is None else example_inputs
    with torch.no_grad():
        expected, got = (first_tensor(call_network(n, inputs)) for n in (mask(plan, net).eval(), small))
    gap = float((expected - got).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise SurgeryError(
            "cut network",
            got=f"outputs that differ from the masked network's by {gap:.3g}",
            allowed=f"a relative difference up to {TOLERANCE:g}",
            fix="check that the plan was made for this architecture, and report it if so",
        )
    return small


def mask(plan: Plan, net: nn.Module) -> nn.Module:
    """A copy of ``net`` of the same size with the columns that read pruned groups, or their rows, at zero."""
    masked = copy.deepcopy(match_attention(net, plan.network))
    tensors = dict(masked.named_parameters())
    with torch.no_grad():
        for part in plan.slices:
            if part.role in ("produce", "read"):
                continue
            tensor = tensors[part.tensor]
            gone = np.setdiff1d(np.arange(tensor.shape[part.axis]), part.kept)
            tensor.index_fill_(part.axis, torch.as_tensor(gone, device=tensor.device), 0.0)
    return masked


def _check_size(plan: Plan, net: nn.Module, small: nn.Module) -> None:
    """The slices must leave as many trainable parameters as the plan says."""
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    before, after = (sum(dict(n.named_parameters())[name].numel() for name in trainable) for n in (net, small))
    if before == plan.parameters[0] and after != plan.parameters[1]:
        raise PlanError(
            "plan",
            got=f"slices that leave {after} parameters",
            allowed=f"slices that leave the {plan.parameters[1]} it announces",
            fix="write it again with decide() or compress",
        )


def _check_network(plan: Plan, net: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    if shapes == dict(plan.network):
        return
    differing = [n for n in sorted({*shapes, *plan.network}) if shapes.get(n) != plan.network.get(n)]
    name = differing[0]
    raise PlanError(
        f"network for this plan: {name}",
        got=f"shape {shapes.get(name)} ({len(differing)} tensors differ)",
        allowed=f"shape {plan.network.get(name)}",
        fix="apply the plan to the network it was made for, before any cut",
    )


def _probe(plan: Plan, net: nn.Module) -> Tensor:
    shape = plan.provenance.get("input_shape")
    like = next(iter(net.parameters()))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, *shape, generator=generator).to(like)  # type: ignore[misc]
