r"""Independent Normals given by the logarithm of their scale, as a guide's parameters are.

The same law as ``Normal(loc, exp(log_scale))``; what a training step reads of it is made once and without a detour:
the variance :math:`v = e^{2\lambda}`, with gradient :math:`2v`, and :math:`\ln s = \lambda` itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["LogScaleNormal"]


class LogScaleNormal(Normal):
    """Normal with ``log_scale`` for ``scale``.

    Args:
        loc: means, any shape.
        log_scale: log standard deviations.

    Example:
        >>> import torch
        >>> float(LogScaleNormal(torch.tensor(0.0), torch.tensor(0.0)).variance)
        1.0
    """

    def __init__(self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.log_scale = broadcast_all(loc, log_scale)
        self._scale: Tensor | None = None
        self._variance: Tensor | None = None
        super(torch.distributions.Normal, self).__init__(self.loc.shape, validate_args=validate_args)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Standard deviations."""
        if self._scale is None:
            self._scale = self.log_scale.exp()
        return self._scale

    @property
    def variance(self) -> Tensor:
        """Variances, in one pass over the logarithms of scales."""
        if self._variance is None:
            self._variance = cast(Tensor, _Variance.apply(self.log_scale))
        return self._variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogScaleNormal:
        """The same law over a larger batch."""
        shape = torch.Size(batch_shape)
        return LogScaleNormal(self.loc.expand(shape), self.log_scale.expand(shape), validate_args=False)


class _Variance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        variance = (2 * log_scale).exp_()
        ctx.save_for_backward(variance)
        return variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (variance,) = ctx.saved_tensors
        return cast(Tensor, gradients[0] * variance * 2)
