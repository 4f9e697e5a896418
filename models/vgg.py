"""VGG with batch normalisation for small images; VGG-16 is ``build()``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["build", "vgg_16"]

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def build(
    stages: Sequence[Sequence[int]] = STAGES, in_channels: int = 3, out_features: int = 10, side: int = 32
) -> nn.Sequential:
    """3 x 3 convolutions with batch norm and ReLU, of the widths of each stage; 2 x 2 max pooling ends a stage.

    One linear layer follows.  Convolutions have no bias: batch norm has one.  Input: ``(rows, in_channels, side,
    side)``, ``side`` a multiple of 2 to the number of stages.  The default is VGG-16 (Simonyan and Zisserman 2014)
    as used for CIFAR-10, with 14,724,042 parameters.

    Example:
        >>> sum(p.numel() for p in build().parameters())
        14724042
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for widths in stages:
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    end = side // 2 ** len(stages)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * end * end, out_features))


def vgg_16(in_channels: int = 3, out_features: int = 10, side: int = 32, width: float = 1.0) -> nn.Sequential:
    """VGG-16 with ``width`` times its channels: 14,724,042 parameters on 32 x 32 colour images."""
    stages = [[max(1, round(width * channels)) for channels in stage] for stage in STAGES]
    return build(stages, in_channels, out_features, side)
