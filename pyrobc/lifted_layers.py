r"""Linear and convolution layers that take their weights, variances and input gates from outside.

With input ``h``, gate ``g`` per example and input channel, weights ``W ~ N(M, V)`` and bias ``b ~ N(m, v)``
elementwise, the pre-activation of an example is exactly Normal given ``g`` (Kingma, Salimans and Welling 2015):

.. math:: a \sim N\big(M (h \circ g) + m,\; V (h \circ g)^2 + v\big),

so one draw per pre-activation replaces one draw per weight.  Without variances the layer is the plain one on ``h * g``.

Where a block's gate acts on what makes it, the pre-activation is multiplied, noise and all.

Instead of numbers a layer also takes the mean and covariance of its input, and gives those of its output
(``propagate``; see ``pyrobc.moments``).

A convolution (and a linear layer on a sequence) reads each weight at several positions of one example.  Each position
has the law above, but draws separately what positions share: correlations between them are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobc.groups import Member
from pyrobc.moments import Moments, propagate_affine
from pyrobc.slicing import SelectLinear

__all__ = ["ChannelGate", "LayerLaw", "LiftedLayer", "OutputGate"]

_SMALLEST_VARIANCE = 1e-16  # keeps the gradient of the square root finite where an example's input is all zero


class _AddNoise(torch.autograd.Function):
    r""":math:`m + \epsilon\sqrt v`, with gradient :math:`\epsilon/2\sqrt v` by v; v no smaller than the smallest."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
        spread = variance.clamp_min(_SMALLEST_VARIANCE).sqrt_()
        output = torch.addcmul(mean, spread, noise)
        slope = noise.div_(spread).mul_(0.5)
        ctx.save_for_backward(slope.masked_fill_(variance < _SMALLEST_VARIANCE, 0.0))
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0], gradients[0] * slope, None


@dataclass(frozen=True)
class LayerLaw:
    """What one call of a layer uses: block gates, means (None: frozen), and variances where weights were not drawn."""

    gates: Mapping[str, Tensor]
    weight: Tensor | None
    bias: Tensor | None
    weight_variance: Tensor | None = None
    bias_variance: Tensor | None = None


class ChannelGate(nn.Module):
    """The gate of each channel of an axis, from the gates of the blocks that own its indices."""

    owner: Tensor

    def __init__(self, owned: Sequence[tuple[str, Member]], size: int) -> None:
        """``owned``: blocks and their members on an axis of ``size``.

        ``owner[i]`` is the position of channel ``i``'s gate among the concatenated gates of the blocks, the last
        position being a constant one for channels that no group owns.
        """
        super().__init__()
        self.blocks = [name for name, _ in owned]
        total = sum(len(m.ptr) - 1 for _, m in owned)
        owner = torch.full((size,), total)
        offset = 0
        for _, member in owned:
            index = torch.as_tensor(member.indices).sort().values
            owner[index] = torch.as_tensor(member.group_of_index()) + offset
            offset += len(member.ptr) - 1
        self.register_buffer("owner", owner, persistent=False)
        self.is_identity = len(owned) == 1 and bool(torch.equal(owner, torch.arange(total)))
        self.is_covered = bool((owner < total).all())

    def forward(self, gates: Mapping[str, Tensor]) -> Tensor:
        """``[..., channels]``."""
        parts = [gates[name] for name in self.blocks]
        if self.is_identity:
            return parts[0]
        if not self.is_covered:
            parts.append(parts[0].new_ones(*parts[0].shape[:-1], 1))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return joined.index_select(-1, self.owner)

    def multiply(self, h: Tensor, gates: Mapping[str, Tensor], channel: int = -1) -> Tensor:
        """``h`` with its axis ``channel`` gated, 1 or -1; gates that were drawn go to equal runs of examples."""
        factor = self.broadcast(h, gates, channel)
        return h if factor is None else h * factor

    def broadcast(self, h: Tensor, gates: Mapping[str, Tensor], channel: int) -> Tensor | None:
        """What ``h`` is multiplied with, broadcast against it; None where nothing is gated."""
        if not self.blocks or not gates:
            return None
        gate = cast(Tensor, self(gates))
        if gate.dim() == 2 and gate.shape[0] != h.shape[0] > 1:
            runs = torch.arange(h.shape[0], device=h.device) * gate.shape[0] // h.shape[0]
            gate = gate.index_select(0, runs)
        if channel == 1:
            return gate.reshape(gate.shape + (1,) * (h.dim() - 2))
        return gate if gate.dim() == 1 else gate.reshape(gate.shape[0], *(1,) * (h.dim() - 2), gate.shape[-1])


class OutputGate(ChannelGate):
    """Gates what a normalisation or an embedding gives, as its forward hook, or a parameter outside of any layer."""

    gates: Mapping[str, Tensor] | None = None

    def hook(self, module: nn.Module, _: object, output: Tensor) -> Tensor:
        """A forward hook."""
        return self.multiply(output, self.gates or {}, 1 if isinstance(module, nn.modules.batchnorm._BatchNorm) else -1)

    def scale(self, parameter: Tensor, axis: int, rows: int) -> Tensor:
        """A parameter with its ``axis`` gated; where gates are drawn for examples, one copy for each of ``rows``."""
        if self.gates and next(iter(self.gates.values())).dim() == 2:
            lead = parameter if parameter.shape[0] == 1 and axis > 0 else parameter.unsqueeze(0)
            moved = lead.expand(rows, *lead.shape[1:]).movedim(axis - parameter.dim(), -1)
        else:
            moved = parameter.movedim(axis, -1)
        return self.multiply(moved, self.gates or {}).movedim(-1, axis - parameter.dim())


class LiftedLayer(nn.Module):
    """Stands where a linear or convolution layer stood; ``law`` is set around each call of the network."""

    law: LayerLaw | None = None
    select: Tensor | None
    frozen_weight: Tensor | None
    frozen_bias: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv1d | nn.Conv2d,
        consumed: Sequence[tuple[str, Member]],
        frozen: tuple[bool, bool],
        emitted: Sequence[tuple[str, Member]] = (),
    ) -> None:
        """Replace ``layer``.

        Args:
            layer: what to replace.
            consumed: blocks whose gates act on input channels, with the members that say on which.
            frozen: whether weight and bias keep their values.
            emitted: as ``consumed``, for output channels.
        """
        super().__init__()
        self.consumed = ChannelGate(consumed, layer.weight.shape[1])
        self.emitted = ChannelGate(emitted, layer.weight.shape[0])
        self.register_buffer("select", layer.index if isinstance(layer, SelectLinear) else None, persistent=False)
        for name, tensor, is_frozen in zip(("weight", "bias"), (layer.weight, layer.bias), frozen, strict=True):
            value = tensor.detach() if is_frozen and tensor is not None else None
            self.register_buffer(f"frozen_{name}", value, persistent=False)
        self.convolution = layer if isinstance(layer, nn.Conv1d | nn.Conv2d) else None
        if self.convolution is not None:  # its tensors are not ours: only stride, padding and the like are read
            self.convolution.weight = self.convolution.bias = None  # type: ignore[assignment]

    @property
    def blocks(self) -> list[str]:
        """Blocks whose gates act on what the layer reads."""
        return self.consumed.blocks

    @property
    def weight(self) -> Tensor:
        """For forward passes that ask a layer for its dtype, device or shape; its numbers are NaN."""
        law = cast(LayerLaw, self.law)
        known = cast(Tensor, self.frozen_weight if law.weight is None else law.weight).detach()
        return known.new_full((), torch.nan).expand_as(known)

    def input_gate(self, gates: Mapping[str, Tensor]) -> Tensor:
        """Gate of every input channel, ``[..., inputs]``, from the gates of the blocks it reads."""
        return cast(Tensor, self.consumed(gates))

    def forward(self, h: Tensor) -> Tensor:
        """Gate the input, then the affine map, with noise on the pre-activation where weights have variances."""
        law, weight, bias = self._read_law()
        if self.select is not None:
            h = h.index_select(-1, self.select)
        channel = -1 if self.convolution is None else 1
        h = self.consumed.multiply(h, law.gates, channel)
        output = self._affine(h, weight, bias)
        if law.weight_variance is not None:
            variance = self._affine(h.square(), law.weight_variance, law.bias_variance)
            output = cast(Tensor, _AddNoise.apply(output, variance, torch.randn_like(output)))
        return self.emitted.multiply(output, law.gates, channel)

    def propagate(self, moments: Moments) -> Moments:
        """The same for an input of which mean and covariance are known; no noise is drawn."""
        law, weight, bias = self._read_law()
        if self.select is not None:
            moments = moments.selected_features(self.select)
        channel = -1 if self.convolution is None else 1
        if (factor := self.consumed.broadcast(moments.mean, law.gates, channel)) is not None:
            moments = moments.scaled(factor)
        output = propagate_affine(self.convolution, moments, weight, bias, law.weight_variance, law.bias_variance)
        factor = self.emitted.broadcast(output.mean, law.gates, channel)
        return output if factor is None else output.scaled(factor)

    def _read_law(self) -> tuple[LayerLaw, Tensor, Tensor | None]:
        law = cast(LayerLaw, self.law)
        weight = cast(Tensor, self.frozen_weight if law.weight is None else law.weight)
        return law, weight, self.frozen_bias if law.bias is None else law.bias

    def _affine(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.convolution is None:
            return F.linear(h, weight, bias)
        return cast(Tensor, self.convolution._conv_forward(h, weight, bias))
