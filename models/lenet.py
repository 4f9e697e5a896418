"""The two LeNet-5 networks of the compression literature, for 28 x 28 images (or others, by ``side``)."""

from __future__ import annotations

from torch import nn

__all__ = ["build", "lenet_5", "lenet_5_caffe"]


def build(
    channels: tuple[int, int] = (20, 50),
    hidden: tuple[int, ...] = (500,),
    in_channels: int = 1,
    out_features: int = 10,
    side: int = 28,
    padding: int = 0,
) -> nn.Sequential:
    """Two 5 x 5 convolutions with ReLU and 2 x 2 max pooling, then linear layers with ReLU.

    Input: ``(rows, in_channels, side, side)``.  The default is LeNet-5-Caffe with 431,080 parameters.

    Example:
        >>> sum(p.numel() for p in build().parameters())
        431080
    """
    first, second = channels
    end = ((side + 2 * padding - 4) // 2 - 4) // 2
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, first, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    ]  # fmt: skip
    widths = [second * end * end, *hidden]
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out_features))


def lenet_5_caffe(in_channels: int = 1, out_features: int = 10, side: int = 28) -> nn.Sequential:
    """LeNet-5-Caffe, 20-50-800-500: 431,080 parameters on 28 x 28 grey images."""
    return build((20, 50), (500,), in_channels, out_features, side)


def lenet_5(in_channels: int = 1, out_features: int = 10, side: int = 28) -> nn.Sequential:
    """LeNet-5, 6-16-120-84 (LeCun et al. 1998, with ReLU and max pooling): 61,706 parameters on 28 x 28 grey images."""
    return build((6, 16), (120, 84), in_channels, out_features, side, padding=2)
