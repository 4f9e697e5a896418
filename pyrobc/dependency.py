r"""From a network to its ``GroupSpec``.

What ``proposals`` reads off the network's graph is not believed but tested: a random half of every block is masked in
one copy and cut in another, and blocks whose outputs differ are left alone, by name and with the reason.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc.attention import SeparateAttention, separate_attention
from pyrobc.calling import call_network, describe_inputs, first_tensor, map_tensors, tensors_of
from pyrobc.costs import count_macs
from pyrobc.errors import GroupError
from pyrobc.groups import Block, GroupSpec, ParameterInfo
from pyrobc.kinds import check_kind
from pyrobc.probing import probe_blocks
from pyrobc.proposals import LIFTABLE, propose_blocks
from pyrobc.slicing import join_path, mask_groups, slice_groups

__all__ = ["LIFTABLE", "trace_groups"]

_TOLERANCES = {torch.float64: 1e-9}
_TOLERANCE = 1e-4  # of other outputs


def trace_groups(
    net: nn.Module,
    example_inputs: Any,
    *,
    prune_inputs: bool = True,
    prune_residual: bool = False,
    head_dims: bool = False,
) -> GroupSpec:
    """Find the groups of ``net``; the network is not changed.

    Args:
        net: any tree of modules that torch can run on ``example_inputs``.
        example_inputs: a tensor, a tuple of tensors or a dict of tensors, first axis the examples.
        prune_inputs: whether features read straight from the input by a linear layer are groups too.
        prune_residual: whether channels of a residual stream that layer normalisations read are groups too.
        head_dims: whether single dimensions of attention heads are groups, in place of whole heads; in attention of
            ``pyrobc.attention`` and ``nn.MultiheadAttention``, which becomes that.

    Raises:
        GroupError: the network fails on the example, cannot be traced, or has no prunable group.
    """
    check_kind(net, nn.Module, "network", "a torch.nn.Module", "pass the network itself, not its class or name")
    _check_example(example_inputs)
    _check_layers(net)
    outputs = _observe(net, example_inputs)
    net, left_alone = _separate(net, example_inputs)
    outputs = _observe(net, example_inputs) if any(isinstance(m, SeparateAttention) for m in net.modules()) else outputs
    left_alone |= _unsupported(net, outputs)
    unsupported = dict(left_alone)  # a layer whose outputs must stay, such as the last, can lose inputs
    parameters, tensors = _describe(net, outputs)
    blocks, settled, failure = [], set(left_alone), None
    try:
        proposals = propose_blocks(
            _trainable(net), example_inputs, prune_inputs=prune_inputs, prune_residual=prune_residual,
            head_dims=head_dims,
        )  # fmt: skip
        for block, reason in proposals:
            tied = (_because(m.module, unsupported) for m in block.members if m.module in unsupported)
            if reason := reason or next(tied, ""):
                left_alone.setdefault(block.name, reason)
                settled |= {m.module for m in block.members if m.role in ("produce", "emit")}
            elif all(int(m.indices.max()) < tensors[m.parameter][m.axis] for m in block.members):
                blocks.append(block)
    except GroupError as error:
        failure = error
    twin, inputs = _make_precise(net, example_inputs)
    spec = _drop_inexact(twin, GroupSpec(tuple(blocks), parameters, (), left_alone, tensors), inputs)
    whole = [n for n in outputs if n not in settled and getattr(net.get_submodule(n), "groups", 1) == 1]
    spec = _probe_rest(twin, spec, inputs, whole)
    if failure and not spec.blocks:
        raise failure
    spec = replace(spec, layers=count_macs(net, spec.blocks, outputs, len(first_tensor(example_inputs))))
    if not spec.blocks:
        reasons = "; ".join(f"{name}: {why}" for name, why in spec.left_alone.items())
        raise GroupError(
            "network without a prunable group",
            got=reasons or "no linear or convolution layer",
            allowed="at least one linear or convolution layer whose outputs only feed other such layers",
            fix="add a hidden layer, or pass prune_inputs=True to prune input features",
        )
    return spec


def _because(layer: str, left_alone: Mapping[str, str]) -> str:
    return f"it is tied to {layer}, which is left alone: {left_alone[layer]}"


def _check_example(example_inputs: Any) -> None:
    got = ""
    if not tensors_of(example_inputs):
        got = "no tensor" if example_inputs is not None else "None"
    elif any(t.dim() == 0 or len(t) == 0 for t in tensors_of(example_inputs)):
        got = f"no examples ({describe_inputs(example_inputs)})"
    if got:
        raise GroupError(
            "example_inputs",
            got=got,
            allowed="a tensor, a tuple or a dict of tensors, first axis the examples, at least one of them",
            fix="pass a batch as the network would see it, for instance example_inputs=x[:1]",
        )


def _check_layers(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, LIFTABLE) and not isinstance(module.weight, nn.Parameter):
            raise GroupError(
                f"layer {name!r}",
                got="a weight computed from other tensors (a parametrisation such as weight_norm)",
                allowed="layers whose weight is a parameter",
                fix="torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
            )


def _observe(net: nn.Module, example_inputs: Any) -> dict[str, list[torch.Size]]:
    """Run a copy once; the shape of what each layer gave, call by call."""
    shapes: dict[str, list[torch.Size]] = {}
    twin = copy.deepcopy(net).eval()

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, _: Any, output: Any) -> None:
            shapes.setdefault(name, []).append(output.shape)

        return record

    for name, module in twin.named_modules():
        if isinstance(module, LIFTABLE):
            module.register_forward_hook(hook(name))
    try:
        with torch.no_grad():
            call_network(twin, example_inputs)
    except Exception as error:
        raise GroupError(
            "example_inputs",
            got=f"{describe_inputs(example_inputs)}, on which the network raises {type(error).__name__}: {error}",
            allowed="inputs that the network accepts, first axis the examples",
            fix="pass a batch as the network would see it, for instance example_inputs=x[:1]",
        ) from error
    return shapes


def _separate(net: nn.Module, example_inputs: Any) -> tuple[nn.Module, dict[str, str]]:
    """The network with its packed attention as separate layers, if it computes the same then; else why not."""
    packed = [name for name, module in net.named_modules() if isinstance(module, nn.MultiheadAttention)]
    separate = separate_attention(net)
    reason = ""
    if separate is not net:
        copies = (lambda: copy.deepcopy(net)), (lambda: copy.deepcopy(separate))
        reason = _compare(*copies, example_inputs, "separating its tensors")
        net = net if reason else separate
    reason = reason or "MultiheadAttention with rows added to keys and values, or a subclass"
    return net, {name: reason for name in packed if isinstance(net.get_submodule(name), nn.MultiheadAttention)}


def _probe_rest(net: nn.Module, spec: GroupSpec, inputs: Any, layers: list[str]) -> GroupSpec:
    """Find blocks anew for those ``layers`` of which exact blocks do not own all rows, and for all tied to them."""
    made = {
        block.name: {m.module: len(m.indices) for m in block.members if m.axis == 0 and m.module in layers}
        for block in spec.blocks
    }
    owned = sum(map(Counter, made.values()), Counter[str]())
    wrong = {name for name in layers if owned[name] < spec.tensors[join_path(name, "weight")][0]}
    while tied := {n for found in made.values() if wrong & found.keys() for n in found.keys() - wrong}:
        wrong |= tied
    left_alone = dict(spec.left_alone)
    blocks = [block for block in spec.blocks if not wrong & made[block.name].keys()]
    for block, reason in probe_blocks(net, inputs, wrong) if wrong else ():
        if reason:
            left_alone.setdefault(block.name, reason)
        else:
            blocks.append(block)
            for name in {m.module for m in block.members if m.role == "produce"}:
                left_alone.pop(name, None)
    if not wrong:
        return spec
    return _drop_inexact(net, replace(spec, blocks=tuple(blocks), left_alone=left_alone), inputs)


def _trainable(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net).eval()
    for p in twin.parameters():
        if p.is_floating_point():
            p.requires_grad_(True)
    return twin


def _unsupported(net: nn.Module, outputs: Mapping[str, list[torch.Size]]) -> dict[str, str]:
    """Layers that can be neither gated nor cut exactly, with the reason."""
    owners: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    reasons: dict[str, str] = {}
    for names in owners.values():
        if len(names) > 1:
            reasons |= {n.rpartition(".")[0]: f"its parameters are tied: {' = '.join(names)}" for n in names}
    for name, module in net.named_modules():
        if isinstance(module, LIFTABLE) and len(outputs.get(name, [])) != 1:
            reasons[name] = f"called {len(outputs.get(name, []))} times on the example (once is needed)"
    return reasons


def _describe(net: nn.Module, called: Collection[str]) -> tuple[dict[str, ParameterInfo], dict[str, tuple[int, ...]]]:
    parameters: dict[str, ParameterInfo] = {}
    for name, p in net.named_parameters():
        path, _, attribute = name.rpartition(".")
        kind: Literal["weight", "bias", "scale", "other"] = "other"
        if path in called and attribute in ("weight", "bias"):
            kind = "weight" if attribute == "weight" else "bias"
        elif attribute == "weight" and p.dim() == 1:
            kind = "scale"
        if p.requires_grad:
            parameters[name] = ParameterInfo(tuple(p.shape), kind)
    return parameters, {name: tuple(t.shape) for name, t in net.state_dict(keep_vars=True).items()}


def _drop_inexact(net: nn.Module, spec: GroupSpec, inputs: Any) -> GroupSpec:
    """Leave out the blocks for which masking and cutting a random half do not give the same outputs."""
    if _difference(net, spec, [b.name for b in spec.blocks], inputs) == "":
        return spec
    kept: list[Block] = []
    left_alone = dict(spec.left_alone)
    for block in spec.blocks:  # one by one, each together with those before it: exact alone may not be exact jointly
        reason = _difference(net, spec, [b.name for b in (*kept, block)], inputs)
        if reason:
            left_alone[block.name] = reason
        else:
            kept.append(block)
    return replace(spec, blocks=tuple(kept), left_alone=left_alone)


def _make_precise(net: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """A copy of both in float64, where the smallest wrong dependency shows, if the network runs in it."""
    twin = copy.deepcopy(net).double().eval()
    varied = map_tensors(inputs, _vary)
    precise = map_tensors(varied, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    try:
        with torch.no_grad():
            call_network(twin, precise)
    except Exception:
        return copy.deepcopy(net).eval(), varied
    return twin, precise


def _difference(net: nn.Module, spec: GroupSpec, blocks: list[str], inputs: Any) -> str:
    rng = np.random.default_rng(0)
    kept = spec.everything()
    for name in blocks:
        size = spec.block(name).size
        kept[name] = np.sort(rng.permutation(size)[: max(1, size // 2)])
    masked, cut = (lambda: mask_groups(net, spec, kept)), (lambda: slice_groups(net, spec, kept))
    return _compare(masked, cut, inputs, "cutting it")


def _compare(make_one: Callable[[], nn.Module], make_other: Callable[[], nn.Module], inputs: Any, change: str) -> str:
    """Why two networks, which are put in evaluation mode, are not the same function; empty if they are."""
    try:
        with torch.no_grad():
            first, second = (tensors_of(call_network(make().eval(), inputs)) for make in (make_one, make_other))
    except Exception as error:
        return f"{change} makes the network fail ({type(error).__name__}: {error})"
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return f"{change} changes an output's shape from {tuple(a.shape)} to {tuple(b.shape)}"
        gap = float((a - b).abs().max()) if a.is_floating_point() else float((a != b).any())
        if not gap <= _TOLERANCES.get(a.dtype, _TOLERANCE) * (1 + float(a.abs().max())):
            return f"{change} changes an output by {gap:.2g}"
    return ""


def _vary(inputs: Tensor) -> Tensor:
    """Constant reals, such as ``torch.zeros``, would hide what a cut does: put noise in their place."""
    if not inputs.is_floating_point() or bool((inputs != inputs.flatten()[0]).any()):
        return inputs
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(inputs.numel()))
    return noise.to(inputs)
