"""Multiply-accumulates of a network by layer, for one example, from the shapes of what its layers gave.

Linear and convolution layers count, and the two products of attention: queries with keys, and weights with values.  A
product of one head of :math:`T` positions with :math:`S` others in :math:`d` dimensions takes :math:`T S d`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import nn

from pyrobc.attention import Attention
from pyrobc.groups import Block, Layer
from pyrobc.slicing import count_heads, join_path

__all__ = ["count_macs"]

Shapes = Mapping[str, Sequence[torch.Size]]


def count_macs(net: nn.Module, blocks: Iterable[Block], outputs: Shapes, batch: int) -> tuple[Layer, ...]:
    """One ``Layer`` for each layer that was called, in the order of the first calls; then those of attention.

    Args:
        net: the network.
        blocks: its blocks.  They tell which layers make queries, keys and values in attention that is not ours, all of
            one width; what is in no block is not counted.
        outputs: shape of what each layer gave, call by call.
        batch: how many examples that was.
    """
    layers = []
    for name, shapes in outputs.items():
        each = net.get_submodule(name).weight[0].numel()  # type: ignore[index]
        total = sum(map(prod, shapes)) * each // batch
        layers.append(Layer(join_path(name, "weight"), total, len(shapes)))
    for path, module in net.named_modules():
        if isinstance(module, Attention) and join_path(path, "query") in outputs:
            names = [join_path(path, name) for name in ("query", "key", "value")]
            query, key, value = (outputs[name][-1] for name in names)
            calls = len(outputs[names[0]])
            for name, width in ((names[0], query[-1]), (names[2], value[-1])):
                layers.append(_product(name, prod(query[:-1]) * key[-2] * width * calls // batch))
    for block in blocks:
        made = [m.module for m in block.members if m.role == "produce" and m.parameter.endswith("weight")]
        for path in count_heads(net, made):
            if not isinstance(net.get_submodule(path), Attention):
                names = [name for name in made if name.rpartition(".")[0] == path]
                shapes = [outputs[name][-1] for name in names]
                lengths = sorted(shape[-2] for shape in shapes)
                rows = prod(shapes[0][:-2]) * lengths[0] * lengths[-1]
                layers.append(_product(names[0], 2 * rows * sum(shape[-1] for shape in shapes) // 3 // batch))
    return tuple(layers)


def _product(layer: str, macs: int) -> Layer:
    return Layer(join_path(layer, "weight"), macs, axes=(0,))
