"""A chain of layers under pruning: masks, constants folded into their readers, dead units cut with Adam's moments."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobc.slicing import SelectLinear

__all__ = ["SparseNetwork"]

Moments = list[dict[str, Tensor]]


class SparseNetwork:
    """A chain of layers in training: masks, dead units cut, Adam's moments carried along."""

    def __init__(self, net: nn.Sequential) -> None:
        self.net = copy.deepcopy(net)
        self.layers = [m for m in self.net if isinstance(m, nn.Linear | nn.Conv2d)]
        if any(isinstance(m, nn.Conv2d) and any(m.padding) for m in self.layers[1:]):
            raise ValueError("a padded convolution inside the network: constants of dead channels cannot be folded")
        first = self.layers[0]
        self.pixels = torch.arange(first.in_features) if isinstance(first, nn.Linear) else None
        self.masks = [torch.ones_like(t) for t in self.tensors]
        self.adam = torch.optim.Adam(self.tensors, fused=True)

    @property
    def tensors(self) -> list[Tensor]:
        """Weight and bias of each layer in turn."""
        return [t for layer in self.layers for t in (layer.weight, layer.bias)]

    @property
    def units(self) -> list[int]:
        """Numbers of inputs or channels, of hidden units, of outputs."""
        return [self.layers[0].weight.shape[1], *(len(layer.weight) for layer in self.layers)]

    def count(self) -> int:
        """Numbers that are not pruned."""
        return int(sum(m.sum() for m in self.masks))

    def copy(self) -> SparseNetwork:
        """The same network without Adam's moments."""
        other = copy.deepcopy(self)
        other.adam = torch.optim.Adam(other.tensors, fused=True)
        return other

    def moments(self) -> Moments:
        """Adam's state by tensor."""
        return [self.adam.state.get(t, {}) for t in self.tensors]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        tensors = [t.detach() for t in self.tensors]
        return {"tensors": tensors, "masks": self.masks, "pixels": self.pixels, "moments": self.moments()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.masks, self.pixels = state["masks"], state["pixels"]
        self._assign(state["tensors"], state["moments"])

    @torch.no_grad()
    def project(self) -> None:
        """Zero what is pruned."""
        for tensor, mask in zip(self.tensors, self.masks, strict=True):
            tensor.mul_(mask)

    @torch.no_grad()
    def score(self, h: Tensor) -> list[Tensor]:
        """Of each number, its magnitude times the root mean square of its input; ``h`` are rows."""
        scores = []
        for module in self.net:
            if isinstance(module, nn.Linear | nn.Conv2d):
                power = h.square().mean(0) if h.dim() == 2 else h.square().mean((0, 2, 3))[:, None, None]
                scores += [module.weight.abs() * power.sqrt(), module.bias.abs()]
            h = module(h)
        return scores

    @torch.no_grad()
    def prune(self, count: int, scores: list[Tensor]) -> None:
        """Keep the ``count`` numbers of the highest scores."""
        ranked = torch.cat([q.masked_fill(m == 0, -1.0).flatten() for q, m in zip(scores, self.masks, strict=True)])
        if count < len(ranked):
            least = ranked.topk(count).values[-1].clamp(min=0.0)
            self.masks = [((q >= least) & (m > 0)).to(m) for q, m in zip(scores, self.masks, strict=True)]
        self.kill_units()
        self.compact(0.9)

    @torch.no_grad()
    def kill_units(self) -> None:
        """Prune all that belongs to units without input or reader; constants move into the biases of the readers."""
        self.project()
        masks, tensors, before = self.masks, self.tensors, -1
        while before != (before := self.count()):
            for i, units in enumerate(self.units[1:-1]):
                fed = masks[2 * i].flatten(1).any(1)
                columns = masks[2 * i + 2].view(len(masks[2 * i + 2]), units, -1)
                weights = tensors[2 * i + 2].view(columns.shape)
                shift = weights[:, ~fed].sum(2) @ F.relu(tensors[2 * i + 1][~fed])
                tensors[2 * i + 3].add_(shift)
                masks[2 * i + 3][shift != 0] = 1.0
                columns[:, ~fed] = 0.0
                dead = ~fed | ~columns.any(2).any(0)
                masks[2 * i][dead], masks[2 * i + 1][dead] = 0.0, 0.0
            self.project()

    @torch.no_grad()
    def compact(self, worth: float = 1.0) -> None:
        """Cut dead units and pixels, if at most the share ``worth`` of all entries stays."""
        inputs = torch.ones(self.units[0], dtype=torch.bool) if self.pixels is None else self.masks[0].any(0)
        hidden = [m.flatten(1).any(1) for m in self.masks[:-2:2]]
        alive = [inputs, *hidden, torch.ones(self.units[-1], dtype=torch.bool)]
        if not all(a.any() for a in alive):
            raise ValueError("a layer lost all its units: keep more weights")

        def cut(tensor: Tensor, j: int) -> Tensor:
            tensor = tensor[alive[j // 2 + 1]]
            if j % 2:
                return tensor
            columns = tensor.reshape(len(tensor), len(alive[j // 2]), -1)[:, alive[j // 2]]
            return columns.reshape(len(tensor), -1, *tensor.shape[2:])

        masks = [cut(m, j) for j, m in enumerate(self.masks)]
        if sum(m.numel() for m in masks) > worth * sum(m.numel() for m in self.masks):
            return
        self.masks = masks
        if self.pixels is not None:
            self.pixels = self.pixels[inputs]
        moments = [{k: cut(v, j) if v.dim() else v for k, v in m.items()} for j, m in enumerate(self.moments())]
        self._assign([cut(t.detach(), j) for j, t in enumerate(self.tensors)], moments)

    def _assign(self, tensors: list[Tensor], moments: Moments) -> None:
        for layer, weight, bias in zip(self.layers, tensors[::2], tensors[1::2], strict=True):
            layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            kind = "features" if isinstance(layer, nn.Linear) else "channels"
            setattr(layer, f"out_{kind}", weight.shape[0])
            setattr(layer, f"in_{kind}", weight.shape[1])
        self.adam = torch.optim.Adam(self.tensors, fused=True)
        for tensor, moment in zip(self.tensors, moments, strict=True):
            if moment:
                self.adam.state[tensor] = {key: v.clone() for key, v in moment.items()}

    def export(self) -> nn.Sequential:
        """A plain compact network."""
        self.compact()
        net = copy.deepcopy(self.net).requires_grad_(False).eval()
        if self.pixels is not None:
            first = next(k for k, module in enumerate(net) if isinstance(module, nn.Linear))
            net[first] = SelectLinear(net[first], self.pixels.clone())
        return net
