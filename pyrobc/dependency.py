r"""From a network to its ``GroupSpec``: the only file that touches Torch-Pruning.

Torch-Pruning's dependency graph (Fang et al. 2023, "DepGraph") says which channels residual adds, batch norms and
flattens tie together.  What it proposes is not believed but tested: a random half of every block is masked in one copy
and cut in another, and blocks whose outputs differ are left alone, by name and with the reason.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc.errors import GroupError, check_kind
from pyrobc.groups import Block, GroupSpec, Layer, Member, ParameterInfo
from pyrobc.slicing import call_network, mask_groups, slice_groups

__all__ = ["LIFTABLE", "trace_groups"]

LIFTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
_TIED_ALONG = (nn.BatchNorm1d, nn.BatchNorm2d)
_TOLERANCE = 1e-4  # of float32 outputs; a wrong dependency is wrong by orders of magnitude more


def trace_groups(net: nn.Module, example_inputs: Any, *, prune_inputs: bool = True) -> GroupSpec:
    """Find the groups of ``net``; the network is not changed.

    Args:
        net: any tree of modules that torch can run on ``example_inputs``.
        example_inputs: a tensor, a tuple of tensors or a dict of tensors, first axis the examples.
        prune_inputs: whether features read straight from the input by a linear layer are groups too.

    Raises:
        GroupError: the network fails on the example, cannot be traced, or has no prunable group.
    """
    check_kind(net, nn.Module, "network", "a torch.nn.Module", "pass the network itself, not its class or name")
    twin = copy.deepcopy(net).eval()
    for p in twin.parameters():
        if p.is_floating_point():
            p.requires_grad_(True)
    _check_example(example_inputs)
    _check_layers(net)
    calls, layers = _observe(twin, example_inputs)
    left_alone = _unsupported(net, calls)
    blocks = []
    for block, reason in _candidate_blocks(twin, example_inputs, prune_inputs):
        reason = reason or next((_because(m.module, left_alone) for m in block.members if m.module in left_alone), "")
        if reason:
            left_alone.setdefault(block.name, reason)
        else:
            blocks.append(block)
    parameters, tensors = _describe(net)
    spec = GroupSpec(tuple(blocks), parameters, layers, left_alone, tensors)
    spec = _drop_inexact(net, spec, example_inputs)
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
    if not _tensors(example_inputs):
        got = "no tensor" if example_inputs is not None else "None"
    elif any(t.dim() == 0 or len(t) == 0 for t in _tensors(example_inputs)):
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


def _observe(net: nn.Module, example_inputs: Any) -> tuple[dict[str, int], tuple[Layer, ...]]:
    """Run once; count the calls of every layer and its multiply-accumulates per example."""
    calls: dict[str, int] = {}
    macs: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, _: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, LIFTABLE):
                macs[name] = macs.get(name, 0) + output.numel() * module.weight[0].numel()

        return record

    handles = [m.register_forward_hook(hook(n)) for n, m in net.named_modules() if n or not list(m.children())]
    try:
        with torch.no_grad():
            call_network(net, example_inputs)
    except Exception as error:
        raise GroupError(
            "example_inputs",
            got=f"{describe_inputs(example_inputs)}, on which the network raises {type(error).__name__}: {error}",
            allowed="inputs that the network accepts, first axis the examples",
            fix="pass a batch as the network would see it, for instance example_inputs=x[:1]",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    batch = first_tensor(example_inputs).shape[0]
    prefix = {name: f"{name}." if name else "" for name in macs}
    return calls, tuple(Layer(f"{prefix[name]}weight", total // batch, calls[name]) for name, total in macs.items())


def _unsupported(net: nn.Module, calls: Mapping[str, int]) -> dict[str, str]:
    """Layers that can be neither gated nor cut exactly, with the reason."""
    owners: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    reasons: dict[str, str] = {}
    for names in owners.values():
        if len(names) > 1:
            reasons |= {n.rpartition(".")[0]: f"its parameters are tied: {' = '.join(names)}" for n in names}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and 1 < module.groups and not _is_depthwise(module):
            reasons[name] = f"grouped convolution with {module.groups} groups"
        elif isinstance(module, LIFTABLE) and calls.get(name, 0) != 1:
            reasons[name] = f"called {calls.get(name, 0)} times on the example (once is needed)"
    return reasons


def _candidate_blocks(net: nn.Module, example_inputs: Any, prune_inputs: bool) -> Iterable[tuple[Block, str]]:
    """What the dependency graph proposes, each with a reason to refuse it or an empty string."""
    import torch_pruning as tp

    names = {module: name for name, module in net.named_modules()}
    with warnings.catch_warnings(), torch.enable_grad():  # the graph is read off autograd's
        warnings.simplefilter("ignore")
        try:
            graph = tp.DependencyGraph().build_dependency(net, example_inputs=example_inputs)
            proposals = list(graph.get_all_groups(root_module_types=list(LIFTABLE)))
        except Exception as error:
            raise GroupError(
                "tracing the network",
                got=f"{type(error).__name__}: {error}",
                allowed="networks whose forward pass autograd can follow",
                fix="keep the forward pass in torch operations, without detach or data-dependent branches",
            ) from error
    order = {module: i for i, module in enumerate(names)}
    if prune_inputs:
        yield from _input_blocks(graph, names)
    found = [_read_proposal(graph, proposal, names, order) for proposal in proposals]
    yield from sorted(found, key=lambda pair: list(names.values()).index(pair[0].name))


def _input_blocks(graph: Any, names: Mapping[nn.Module, str]) -> Iterable[tuple[Block, str]]:
    # A weight's own transpose shows as an input node that has no inputs itself; real inputs have a module behind them.
    def has_upstream(node: Any) -> bool:
        return any(isinstance(i.module, LIFTABLE + _TIED_ALONG) or has_upstream(i) for i in node.inputs)

    roots = [
        m for m, node in graph.module2node.items() if isinstance(m, nn.Linear) and m in names and not has_upstream(node)
    ]
    is_plain = len(roots) == 1 and "input" not in names.values()
    for module in roots:
        size = module.in_features
        name = "input" if is_plain else f"input:{names[module]}"
        member = _member(_join(names[module], "weight"), 1, "consume", np.arange(size), np.arange(size), size)
        yield Block(name, size, (member,)), ""


def _read_proposal(
    graph: Any, proposal: Any, names: Mapping[nn.Module, str], order: Mapping[nn.Module, int]
) -> tuple[Block, str]:
    members: list[Member] = []
    producers: list[nn.Module] = []
    reason = ""
    size = 1 + max(max(item.root_idxs) for item in proposal)
    for item in proposal:
        module, handler = item.dep.target.module, item.dep.handler
        is_output_side = bool(graph.is_out_channel_pruning_fn(handler))
        if is_output_side and not item.dep.target.outputs:
            reason = "it makes the network's output"
        groups, index = np.asarray(item.root_idxs), np.asarray(item.idxs)
        if module not in names:
            if isinstance(module, nn.Parameter):
                reason = reason or "it is tied to a parameter outside any layer"
            continue
        if isinstance(module, LIFTABLE) and not is_output_side and not _is_depthwise(module):
            members.append(_member(_join(names[module], "weight"), 1, "consume", groups, index, size))
        elif isinstance(module, LIFTABLE + _TIED_ALONG):
            if isinstance(module, LIFTABLE) and not _is_depthwise(module):
                producers.append(module)
            for attribute in ("weight", "bias", "running_mean", "running_var"):
                if getattr(module, attribute, None) is not None:
                    members.append(_member(_join(names[module], attribute), 0, "produce", groups, index, size))
        else:
            reason = reason or f"it is tied to {names[module]} ({type(module).__name__}), which cannot be cut exactly"
    root = min(producers, key=order.__getitem__) if producers else proposal[0].dep.target.module
    if not any(m.role == "consume" for m in members):
        reason = reason or "nothing prunable reads it"
    return Block(names.get(root, "?"), size, tuple(members)), reason


def _member(
    parameter: str, axis: int, role: Literal["produce", "consume"], groups: Any, index: Any, size: int
) -> Member:
    order = np.lexsort((index, groups))
    ptr = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=size))]).astype(np.int64)
    return Member(parameter, axis, role, ptr, np.asarray(index)[order].astype(np.int64))


def _describe(net: nn.Module) -> tuple[dict[str, ParameterInfo], dict[str, tuple[int, ...]]]:
    modules = dict(net.named_modules())
    parameters: dict[str, ParameterInfo] = {}
    for name, p in net.named_parameters():
        path, _, attribute = name.rpartition(".")
        kind: Literal["weight", "bias", "scale", "other"] = "other"
        if isinstance(modules[path], LIFTABLE) and attribute in ("weight", "bias"):
            kind = "weight" if attribute == "weight" else "bias"
        elif attribute == "weight" and p.dim() == 1:
            kind = "scale"
        if p.requires_grad:
            parameters[name] = ParameterInfo(tuple(p.shape), kind)
    return parameters, {name: tuple(t.shape) for name, t in net.state_dict(keep_vars=True).items()}


def _drop_inexact(net: nn.Module, spec: GroupSpec, example_inputs: Any) -> GroupSpec:
    """Leave out the blocks for which masking and cutting a random half do not give the same outputs."""
    if _difference(net, spec, [b.name for b in spec.blocks], example_inputs) == "":
        return spec
    kept: list[Block] = []
    left_alone = dict(spec.left_alone)
    for block in spec.blocks:  # one by one, each together with those before it: exact alone may not be exact jointly
        reason = _difference(net, spec, [b.name for b in (*kept, block)], example_inputs)
        if reason:
            left_alone[block.name] = reason
        else:
            kept.append(block)
    return replace(spec, blocks=tuple(kept), left_alone=left_alone)


def _difference(net: nn.Module, spec: GroupSpec, blocks: list[str], example_inputs: Any) -> str:
    rng = np.random.default_rng(0)
    inputs = _vary(example_inputs, rng)
    kept = spec.everything()
    for name in blocks:
        size = spec.block(name).size
        kept[name] = np.sort(rng.permutation(size)[: max(1, size // 2)])
    try:
        with torch.no_grad():
            masked = _tensors(call_network(mask_groups(net, spec, kept).eval(), inputs))
            cut = _tensors(call_network(slice_groups(net, spec, kept).eval(), inputs))
    except Exception as error:
        return f"the network fails once it is cut ({type(error).__name__}: {error})"
    for a, b in zip(masked, cut, strict=True):
        if a.shape != b.shape:
            return f"cutting it changes an output's shape from {tuple(a.shape)} to {tuple(b.shape)}"
        gap = float((a - b).abs().max()) if a.is_floating_point() else float((a != b).any())
        if not gap <= _TOLERANCE * (1 + float(a.abs().max())):
            return f"cutting it changes an output by {gap:.2g}"
    return ""


def _vary(inputs: Any, rng: np.random.Generator) -> Any:
    """Constant reals, such as ``torch.zeros``, would hide what a cut does: put noise in their place."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point() or bool((inputs != inputs.flatten()[0]).any()):
            return inputs
        return torch.as_tensor(rng.standard_normal(inputs.shape)).to(inputs)
    if isinstance(inputs, Mapping):
        return {key: _vary(value, rng) for key, value in inputs.items()}
    return tuple(_vary(value, rng) for value in inputs)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def first_tensor(value: Any) -> Tensor:
    """The first tensor of a tensor, tuple, dict or model-output object."""
    return _tensors(value)[0]


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor of a tensor, tuple, dict or model-output object."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return (
        [t for item in items for t in _tensors(item)]
        if isinstance(items, Iterable) and not isinstance(items, str)
        else []
    )


def describe_inputs(inputs: Any) -> str:
    """Shapes of a tensor, a tuple or a dict of tensors, for messages."""
    if isinstance(inputs, Tensor):
        return f"shape {tuple(inputs.shape)}"
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return ", ".join(f"{key}: {[tuple(t.shape) for t in _tensors(value)]}" for key, value in items)
