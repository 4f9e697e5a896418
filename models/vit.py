"""A vision transformer (Dosovitskiy et al. 2020, "An image is worth 16x16 words", https://arxiv.org/abs/2010.11929)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pyrobc.attention import Attention

__all__ = ["Block", "VisionTransformer", "build", "vit_tiny"]


class Block(nn.Module):
    """Attention and a perceptron, each on the normalised stream and added to it."""

    def __init__(self, features: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(features), nn.LayerNorm(features)
        self.attention = Attention(features, num_heads, dropout=dropout)
        self.mlp = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, features)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        """One step of the stream."""
        h = h + self.dropout(self.attention(self.norm_attention(h)))
        return cast(Tensor, h + self.dropout(self.mlp(self.norm_mlp(h))))


class VisionTransformer(nn.Module):
    """Patches as a sequence with learned positions, blocks, a normalisation, and a linear layer on the pooled sequence.

    Attributes:
        token: what the sequence starts with and is read from at the end; None pools by the mean.
    """

    def __init__(
        self, side: int, patch: int, in_channels: int, out_features: int, features: int, depth: int, num_heads: int,
        hidden: int, has_token: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        length = (side // patch) ** 2 + has_token
        self.patches = nn.Conv2d(in_channels, features, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, features)) if has_token else None
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, features))
        self.blocks = nn.Sequential(*(Block(features, num_heads, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, out_features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        h = self.patches(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1)
        h = self.norm(self.blocks(h + self.positions))
        return cast(Tensor, self.head(h.mean(1) if self.token is None else h[:, 0]))


def build(
    side: int = 32,
    patch: int = 4,
    in_channels: int = 3,
    out_features: int = 10,
    features: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    hidden: int | None = None,
    has_token: bool = True,
    dropout: float = 0.0,
) -> VisionTransformer:
    """Pre-norm blocks of attention and a perceptron with ``hidden`` units, four times ``features`` if None.

    Input: ``(rows, in_channels, side, side)``.  The default is ViT-Tiny on 4 x 4 patches of 32 x 32 images, with
    5,362,762 parameters; ``has_token=False`` reads the mean of the sequence instead of a class token.

    Example:
        >>> sum(p.numel() for p in build().parameters())
        5362762
    """
    hidden = 4 * features if hidden is None else hidden
    return VisionTransformer(
        side, patch, in_channels, out_features, features, depth, num_heads, hidden, has_token, dropout
    )


def vit_tiny(in_channels: int = 3, out_features: int = 10, side: int = 32) -> VisionTransformer:
    """ViT-Tiny (192 features, 12 blocks, 3 heads) on 4 x 4 patches: 5,362,762 parameters on 32 x 32 colour images."""
    return build(side, in_channels=in_channels, out_features=out_features)
