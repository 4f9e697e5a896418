r"""Multi-head attention of plain linear layers, which heads and single dimensions of heads can leave.

Head :math:`h` of a sequence :math:`x` with context :math:`c` has queries :math:`q_h = W^q_h x + b^q_h`, keys and values
of the same form, and gives

.. math:: a_h = \mathrm{softmax}\big(s\, q_h k_h^\top\big)\, v_h, \qquad y = \sum_h W^o_h a_h + b^o,

with :math:`s = 1/\sqrt{d}` for the size :math:`d` that heads have in the network that was built (Vaswani et al. 2017,
"Attention is all you need", https://arxiv.org/abs/1706.03762).  A sum over dimensions stands before the softmax and
another after it, and so each of these can be removed exactly:

* a head: its rows of the queries, keys and values and its columns of the output layer;
* a dimension of a head's values: a row of the values and a column of the output layer, as in a perceptron;
* a dimension of a head's queries: it meets the same dimension of the keys, :math:`q_h^\top k_h = \sum_j q_{hj} k_{hj}`.

:math:`s` is stored and stays what it was.  Heads of equal sizes are computed at once, others one by one.  A head
without value dimensions adds nothing, one without query dimensions is the mean of its values.

``nn.MultiheadAttention`` packs its three projections into one tensor and recomputes sizes and :math:`s` from one
number, so it cannot be cut: ``separate_attention`` puts a ``SeparateAttention`` with the same tensors in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobc.errors import GroupError

__all__ = ["Attention", "SeparateAttention", "match_attention", "separate_attention"]


class Attention(nn.Module):
    """Attention of a sequence ``(rows, length, features)`` to itself or to ``context``; no mask.

    Attributes:
        query: linear layer, as are ``key``, ``value`` and ``output``.
        query_sizes: dimensions of each head's queries, which are also those of its keys.
        value_sizes: dimensions of each head's values.
        scale: what products of queries and keys are multiplied with.
    """

    def __init__(
        self, features: int, num_heads: int, *, context_features: tuple[int, int] | None = None, bias: bool = True,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if features % num_heads:
            raise GroupError(
                "attention", got=f"{features} features for {num_heads} heads", allowed="as many features for each head",
                fix="choose a number of heads that divides the features",
            )  # fmt: skip
        keys, values = context_features or (features, features)
        self.query, self.key = nn.Linear(features, features, bias), nn.Linear(keys, features, bias)
        self.value, self.output = nn.Linear(values, features, bias), nn.Linear(features, features, bias)
        self.query_sizes = self.value_sizes = (features // num_heads,) * num_heads
        self.scale = (features // num_heads) ** -0.5
        self.dropout = dropout

    @property
    def num_heads(self) -> int:
        """Heads that are left."""
        return len(self.query_sizes)

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend, then mix the heads."""
        context = h if context is None else context
        return self.attend(h, context, context)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` is added to the scaled products; sequences come as ``(..., length, features)``."""
        queries = self.split(self.query(query), self.query_sizes)
        keys = self.split(self.key(key), self.query_sizes)
        values = self.split(self.value(value), self.value_sizes)
        dropout = self.dropout if self.training else 0.0
        if len(queries) == 1:
            heads = [F.scaled_dot_product_attention(queries[0], keys[0], values[0], mask, dropout, scale=self.scale)]
        else:  # some of these sizes may be zero
            products = (self.scale * q @ k.transpose(-2, -1) for q, k in zip(queries, keys, strict=True))
            weights = (p if mask is None else p + mask for p in products)
            heads = [F.dropout(w.softmax(-1), dropout) @ v for w, v in zip(weights, values, strict=True)]
        parts = [head.transpose(-3, -2).flatten(-2) for head in heads]
        return cast(Tensor, self.output(parts[0] if len(parts) == 1 else torch.cat(parts, -1)))

    def split(self, h: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Heads as ``(..., heads, length, size)``: all of them at once if both kinds of sizes are even."""
        if len({*zip(self.query_sizes, self.value_sizes, strict=True)}) == 1:
            return [h.unflatten(-1, (len(sizes), sizes[0])).transpose(-3, -2)]
        return [part.unsqueeze(-3) for part in h.split(list(sizes), -1)]

    def shrink(self, query_kept: NDArray[np.int64], value_kept: NDArray[np.int64]) -> None:
        """Take note of the rows of queries and of values that a cut has left; heads without any are gone."""
        queries, values = (
            np.bincount(np.repeat(np.arange(len(sizes)), sizes)[kept], minlength=len(sizes))
            for sizes, kept in ((self.query_sizes, query_kept), (self.value_sizes, value_kept))
        )
        left = (queries > 0) | (values > 0)
        self.query_sizes, self.value_sizes = tuple(queries[left].tolist()), tuple(values[left].tolist())


class SeparateAttention(Attention):
    """Stands where an ``nn.MultiheadAttention`` stood: called as that is, and gives its output, but no weights.

    Masks may not differ between heads.
    """

    in_proj_bias = None  # nn.TransformerEncoder reads these two, and then leaves its fused road
    _qkv_same_embed_dim = False

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        """Take over copies of ``packed``'s tensors."""
        has_bias = packed.in_proj_bias is not None
        inputs = (cast(int, packed.kdim), cast(int, packed.vdim))
        super().__init__(
            packed.embed_dim, packed.num_heads, context_features=inputs, bias=has_bias, dropout=packed.dropout
        )
        self.batch_first = packed.batch_first
        if packed.in_proj_weight is None:
            weights = [packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight]
        else:
            weights = [packed.in_proj_weight] * 3
        sources = {"weight": [*weights, packed.out_proj.weight]}
        if has_bias:
            sources["bias"] = [*[packed.in_proj_bias] * 3, packed.out_proj.bias]
        for name, tensors in sources.items():
            for i, tensor in enumerate(tensors):
                part = tensor.detach().chunk(3)[i] if len(tensor) == 3 * packed.embed_dim else tensor.detach()
                layer = (self.query, self.key, self.value, self.output)[i]
                setattr(layer, name, nn.Parameter(part.clone(), requires_grad=tensor.requires_grad))
        self.train(packed.training)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """The output; in masks, True hides a position."""
        if attn_mask is not None and attn_mask.dim() == 3:
            raise GroupError(
                "attention mask", got=f"shape {tuple(attn_mask.shape)}, one for each head", allowed="one for all heads",
                fix="pass a mask of two dimensions",
            )  # fmt: skip
        mask = None if attn_mask is None else _to_added(attn_mask, query)
        if key_padding_mask is not None:
            hidden = _to_added(key_padding_mask, query)[..., None, None, :]
            mask = hidden if mask is None else mask + hidden
        is_turned = query.dim() == 3 and not self.batch_first
        query, key, value = (h.transpose(0, 1) if is_turned else h for h in (query, key, value))
        output = self.attend(query, key, value, mask)
        return (output.transpose(0, 1) if is_turned else output), None


def _to_added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def separate_attention(net: nn.Module) -> nn.Module:
    """A copy of ``net`` with a ``SeparateAttention`` for each ``nn.MultiheadAttention``; ``net`` itself if it has none.

    Those with rows appended to keys and values (``add_bias_kv``, ``add_zero_attn``) stay, as do subclasses.
    """
    found = [name for name, module in net.named_modules() if _can_be_separated(module)]
    if not found:
        return net
    net = copy.deepcopy(net)
    for name in found:
        new = SeparateAttention(cast(nn.MultiheadAttention, net.get_submodule(name)))
        if not name:
            return new
        parent, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(parent), attribute, new)
    return net


def match_attention(net: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """``net``, with its attention separated if only then its tensors have the ``shapes`` of the traced network."""

    def has_them(one: nn.Module) -> bool:
        return {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()} == dict(shapes)

    separate = net if has_them(net) else separate_attention(net)
    return separate if has_them(separate) else net


def _can_be_separated(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn
