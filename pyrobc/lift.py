"""From a plain network and a family to an ordinary Pyro model.

``lift`` copies the network; the user's is never edited.  The model samples every site of the family's prior, computes
the network with what they mean, and observes the targets in a plate: ``poutine.trace``, ``Predictive``, autoguides and
NUTS work on it.  Gates and weights are global latent variables.  Noise per example and local reparameterisation belong
to inference (see ``fit``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from pyrobc.attention import match_attention
from pyrobc.calling import call_network, first_tensor
from pyrobc.dependency import trace_groups
from pyrobc.family import Effective, Family, make_family
from pyrobc.groups import GroupSpec, Kept, Member
from pyrobc.lifted_layers import ChannelGate, LayerLaw, LiftedLayer, OutputGate
from pyrobc.likelihoods import Likelihood, make_likelihood
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.slicing import slice_groups

__all__ = ["LiftedModel", "lift"]

_GATED = (nn.LayerNorm, nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d)  # gated where they end, scale and shift at once


class LiftedModel(PyroModule):
    """A network with a sparsity prior and a likelihood, as a Pyro model ``model(inputs, targets=None)``.

    Attributes:
        spec: its groups.
        num_data: rows of the whole data set, for the scale of minibatches; None takes each batch as all the data.
    """

    anchor: Tensor

    def __init__(
        self, net: nn.Module, spec: GroupSpec, family: Family, likelihood: Likelihood, example_inputs: Any
    ) -> None:
        super().__init__()
        self.spec, self.family, self.likelihood = spec, family, likelihood
        self.num_data: int | None = None
        self.example_inputs = example_inputs
        self._template = (copy.deepcopy(net),)  # in a tuple: not a submodule, so not trained, moved or saved
        self.net = _replace_layers(copy.deepcopy(net), spec)
        self._layers = tuple((n, m) for n, m in self.net.named_modules() if isinstance(m, LiftedLayer))
        self._names = {path: _parameter_names(net, path) for path, _ in self._layers}
        used = [name for names in self._names.values() for name in names if name]
        self._others = tuple(n for n in spec.parameters if n not in used)
        self._gated = _gate_outputs(self.net, spec)
        repeated = {layer.weight.removesuffix("weight").removesuffix(".") for layer in spec.layers if layer.calls > 1}
        self._shared = {n for path in repeated & self._names.keys() for n in self._names[path]} | {
            n for n in used if used.count(n) > 1
        }
        self.register_buffer("anchor", first_parameter(net).detach().new_zeros(()), persistent=False)

    @property
    def template(self) -> nn.Module:
        """The network as it was given, a private copy."""
        return self._template[0]

    def priors(self) -> dict[str, Distribution]:
        """The prior of every site, of the family and of the likelihood, on this model's device and in its dtype."""
        return self.family.prior(self.spec, self.anchor) | self.likelihood.priors(self.anchor)

    def new_guide(self) -> MeanFieldGuide:
        """The family's guide, started from the network's parameters."""
        start = {n: p.detach().to(self.anchor) for n, p in self.template.named_parameters()}
        guide = self.family.guide(self.spec, start)
        guide.add(self.likelihood.factors(self.anchor))
        return guide

    def forward(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        """Sample the sites, run the network, observe (or sample) the targets."""
        values = self.family.sample_prior(self.family.prior(self.spec, self.anchor))
        scales = {name: pyro.sample(name, cast(Any, law)) for name, law in self.likelihood.priors(self.anchor).items()}
        outputs = self.run(self.family.combine(values, self.spec), inputs)
        rows = first_tensor(inputs).shape[0]
        size = rows if targets is None else self.num_data or rows
        with pyro.plate("data", size, subsample=torch.arange(rows, device=outputs.device)):
            return pyro.sample("y", cast(Any, self.likelihood.distribution(outputs, scales)), obs=targets)

    def run(self, effective: Effective, inputs: Any) -> Tensor:
        """The network's output for given gates and parameters; no sampling of sites."""
        return first_tensor(self.call(effective, inputs))

    def call(self, effective: Effective, inputs: Any, function: Callable[[nn.Module, Any], Any] = call_network) -> Any:
        """What ``function`` makes of the network, whose layers have these gates and parameters, and of inputs."""
        parameters, variances = dict(effective.parameters), dict(effective.variances)
        for name in self._shared & variances.keys():  # uses of one weight share its noise, which pre-activations do not
            spread = variances.pop(name).sqrt()
            parameters[name] = parameters[name] + spread * torch.randn_like(spread)
        for weight, bias in self._names.values():  # noise reaches pre-activations through the weight's variance only
            if bias in variances and weight not in variances:
                spread = variances.pop(bias).sqrt()
                parameters[bias] = parameters[bias] + spread * torch.randn_like(spread)
        others = {name: parameters[name] for name in self._others if name in parameters}
        net = cast(nn.Module, self._modules["net"])  # as an attribute, Pyro would enter its tensors as parameters
        for name, axis, gate in self._gated:
            gate.gates = effective.gates
            if name:
                value = others[name] if name in others else net.get_parameter(name)
                others[name] = gate.scale(value, axis, len(first_tensor(inputs)))
        for path, layer in self._layers:
            weight, bias = self._names[path]
            layer.law = LayerLaw(
                effective.gates,
                parameters.get(weight),
                parameters.get(bias),
                variances.get(weight),
                variances.get(bias),
            )
        try:
            if not others:
                return function(net, inputs)
            return functional_call(_Call(net, function), {f"net.{n}": value for n, value in others.items()}, (inputs,))
        finally:
            for _, layer in self._layers:
                layer.law = None
            for _, _, gate in self._gated:
                gate.gates = None

    def complete(self, effective: Effective) -> Effective:
        """``effective`` with the weights that are not trained, and so have no site."""
        frozen = {self._names[path][0]: layer.frozen_weight for path, layer in self._layers}
        known = {n: t for n, t in frozen.items() if t is not None} | dict(effective.parameters)
        return replace(effective, parameters=known)

    def to_module(self, effective: Effective) -> nn.Module:
        """A plain copy of the network with these parameters, gates folded into the columns or rows they act on."""
        plain = copy.deepcopy(self.template).to(self.anchor)
        buffers = dict(self.net.named_buffers())
        tensors = dict(plain.named_parameters())
        with torch.no_grad():
            for name, value in effective.parameters.items():
                tensors[name].copy_(value)
            for name, buffer in plain.named_buffers():
                if name in buffers:  # a layer that selects its input keeps its own index
                    buffer.copy_(buffers[name])
            for path, layer in self._layers:
                if layer.blocks:
                    weight = tensors[self._names[path][0]]
                    gate = layer.input_gate(effective.gates)
                    weight.mul_(gate.reshape(1, -1, *(1,) * (weight.dim() - 2)))
            for block, member in ((b.name, m) for b in self.spec.blocks for m in b.emitters):
                lines = tensors[member.parameter].movedim(member.axis, -1)
                lines.mul_(ChannelGate([(block, member)], lines.shape[-1]).to(lines.device)(effective.gates))
        return plain.eval()

    def restricted(self, kept: Kept) -> LiftedModel:
        """The model of the network after a cut, with the groups that are left."""
        plain = self.to_module(Effective({b.name: self.anchor.new_ones(b.size) for b in self.spec.blocks}, {}))
        small = slice_groups(plain, self.spec, kept)
        small.train(self.net.training)
        model = LiftedModel(small, self.spec.restricted(kept), self.family, self.likelihood, self.example_inputs)
        model.num_data = self.num_data
        return model


class _Call(nn.Module):
    """A function of a network as a module, for tensors to be put in place of the network's own."""

    def __init__(self, net: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self, inputs: Any) -> Any:
        return self.function(self.net, inputs)


def lift(
    net: nn.Module,
    family: Family | str,
    likelihood: Likelihood | str = "categorical",
    example_inputs: Any = None,
    *,
    prune_inputs: bool = True,
    prune_residual: bool = False,
    head_dims: bool = False,
) -> LiftedModel:
    """Turn ``net`` into a Pyro model with ``family``'s prior; ``net`` itself is not changed.

    Args:
        net: any feed-forward network of linear and convolution layers (grouped ones too), batch and layer norms,
            activations, pooling and attention, with adds and concatenation; what cannot be gated is listed in
            ``model.spec.left_alone`` with the reason.  ``nn.MultiheadAttention`` becomes ``SeparateAttention``.
        family: a family or its name.
        likelihood: a likelihood or its name.
        example_inputs: a batch as the network sees it (``x[:1]``), a tuple or a dict of tensors.
        prune_inputs: whether input features read by a linear layer are groups too.
        prune_residual: whether channels of a residual stream that layer normalisations read are groups too.
        head_dims: whether single dimensions of attention heads are groups, in place of whole heads.

    Raises:
        GroupError: the network does not run on the example, cannot be traced, or has no prunable group.
        FamilyError: unknown family.
    """
    chosen = make_family(family)
    spec = trace_groups(
        net, example_inputs, prune_inputs=prune_inputs, prune_residual=prune_residual, head_dims=head_dims
    )
    net = match_attention(net, spec.tensors)
    return LiftedModel(net, spec, chosen, make_likelihood(likelihood), example_inputs)


def first_parameter(net: nn.Module) -> Tensor:
    """A parameter of the network, for its device and dtype."""
    return next(iter(net.parameters()))


def _replace_layers(net: nn.Module, spec: GroupSpec) -> nn.Module:
    """Swap every linear and convolution layer that is called for a ``LiftedLayer``; freeze the rest."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    called = {id(net.get_submodule(layer.weight.rpartition(".")[0])) for layer in spec.layers}
    plain = {path: layer for path, layer in net.named_modules(remove_duplicate=False) if id(layer) in called}
    names = {path: _parameter_names(net, path) for path in plain}
    lifted: dict[int, LiftedLayer] = {}
    for path, layer in plain.items():
        weight, bias = names[path]
        consumed = [(b.name, m) for b in spec.blocks for m in b.consumers if m.parameter == weight]
        emitted = [(b.name, m) for b in spec.blocks for m in b.emitters if m.parameter == weight]
        if id(layer) not in lifted:  # a layer may have several paths
            frozen = weight not in spec.parameters, bias not in spec.parameters
            lifted[id(layer)] = LiftedLayer(layer, consumed, frozen, emitted)
        if not path:
            return lifted[id(layer)]
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, lifted[id(layer)])
    return net


def _gate_outputs(net: nn.Module, spec: GroupSpec) -> tuple[tuple[str, int, OutputGate], ...]:
    """Gates on what is made outside of lifted layers: name and axis of a parameter, or '' where a module has a hook.

    They are children of the modules that they belong to, so that they move and are copied with them.
    """
    members: dict[str, list[tuple[str, Member]]] = {}
    for block in spec.blocks:
        for member in block.emitters:
            members.setdefault(member.parameter, []).append((block.name, member))
    found = []
    for name, owned in members.items():
        module, attribute = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        axis = owned[0][1].axis
        gate = OutputGate(owned, spec.tensors[name][axis])
        if isinstance(module, LiftedLayer) or (isinstance(module, _GATED) and attribute != "weight"):
            continue
        module.add_module(f"{attribute}_gate", gate)
        if isinstance(module, _GATED):
            module.register_forward_hook(gate.hook)
        found.append(("" if isinstance(module, _GATED) else name, axis, gate))
    return tuple(found)


def _parameter_names(net: nn.Module, path: str) -> tuple[str, str]:
    """The names under which ``net`` lists the weight and the bias of a layer (tied ones: the first); '' for no bias."""
    layer = net.get_submodule(path)
    listed = {id(tensor): name for name, tensor in net.named_parameters()}
    return listed.get(id(layer.weight), ""), listed.get(id(layer.bias), "")
