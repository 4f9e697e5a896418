"""Multi-layer perceptrons; LeNet-300-100 is ``build()``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["build", "lenet_300_100"]


def build(
    in_features: int = 784,
    hidden: Sequence[int] = (300, 100),
    out_features: int = 10,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Flatten, then linear layers with ``activation`` between them.

    Input: any shape with ``in_features`` numbers per row.  The default has 266,610 parameters.

    Example:
        >>> sum(p.numel() for p in build().parameters())
        266610
    """
    widths = [in_features, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out_features))


def lenet_300_100(in_features: int = 784, out_features: int = 10) -> nn.Sequential:
    """LeNet-300-100 (LeCun et al. 1998): 784-300-100-10 with ReLU, 266,610 parameters."""
    return build(in_features, (300, 100), out_features)
