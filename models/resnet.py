"""Residual networks (He et al. 2015, "Deep residual learning for image recognition", https://arxiv.org/abs/1512.03385).

Where a stage changes the shape, the shortcut is a 1 x 1 convolution with batch norm (the paper's option B), also in the
networks for CIFAR, as channels padded with zeros could not be removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Residual", "build", "resnet_20", "resnet_32", "resnet_50"]

EXPANSION = 4


class Residual(nn.Module):
    """``relu(shortcut(h) + branch(h))``."""

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, h: Tensor) -> Tensor:
        """Add, then the nonlinearity."""
        return torch.relu(self.shortcut(h) + self.branch(h))


def build(
    depths: Sequence[int] = (3, 3, 3),
    width: int = 16,
    in_channels: int = 3,
    out_features: int = 10,
    is_bottleneck: bool = False,
    is_large: bool = False,
) -> nn.Sequential:
    """Stages of ``depths`` blocks; the first has ``width`` channels, each later one twice as many on half the side.

    Input: ``(rows, in_channels, side, side)``, any side.  A block is two 3 x 3 convolutions, or a bottleneck of
    1 x 1, 3 x 3 and 1 x 1 with four times the channels at its end.  Large images start with a 7 x 7 convolution and
    pooling.  The default is ResNet-20 with 272,474 parameters.

    Example:
        >>> sum(p.numel() for p in build().parameters())
        272474
        >>> sum(p.numel() for p in resnet_32().parameters())
        466906
        >>> sum(p.numel() for p in resnet_50().parameters())
        25557032
    """
    if is_large:
        stem = [*_convolve(in_channels, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    else:
        stem = [*_convolve(in_channels, width, 3), nn.ReLU()]
    channels = width
    stages = []
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        blocks = []
        for i in range(depth):
            blocks.append(_make_block(channels, inner, 2 if stage and not i else 1, is_bottleneck))
            channels = inner * EXPANSION if is_bottleneck else inner
        stages.append(nn.Sequential(*blocks))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, out_features))
    return nn.Sequential(*stem, *stages, *head)


def resnet_20(in_channels: int = 3, out_features: int = 10, width: int = 16) -> nn.Sequential:
    """ResNet-20 for 32 x 32 images: 272,474 parameters."""
    return build((3, 3, 3), width, in_channels, out_features)


def resnet_32(in_channels: int = 3, out_features: int = 10, width: int = 16) -> nn.Sequential:
    """ResNet-32 for 32 x 32 images: 466,906 parameters."""
    return build((5, 5, 5), width, in_channels, out_features)


def resnet_50(in_channels: int = 3, out_features: int = 1000, width: int = 64) -> nn.Sequential:
    """ResNet-50 for 224 x 224 images, strides in the 3 x 3 convolutions: 25,557,032 parameters."""
    return build((3, 4, 6, 3), width, in_channels, out_features, is_bottleneck=True, is_large=True)


def _make_block(channels: int, inner: int, stride: int, is_bottleneck: bool) -> Residual:
    if is_bottleneck:
        end = inner * EXPANSION
        branch = [
            *_convolve(channels, inner, 1), nn.ReLU(), *_convolve(inner, inner, 3, stride), nn.ReLU(),
            *_convolve(inner, end, 1),
        ]  # fmt: skip
    else:
        end = inner
        branch = [*_convolve(channels, inner, 3, stride), nn.ReLU(), *_convolve(inner, inner, 3)]
    is_same = stride == 1 and channels == end
    return Residual(
        nn.Sequential(*branch), nn.Identity() if is_same else nn.Sequential(*_convolve(channels, end, 1, stride))
    )


def _convolve(channels: int, width: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)]
