r"""Mean and covariance of features, and what a linear layer with uncertain weights makes of them; nothing is drawn.

With input :math:`x` of mean :math:`\mu` and covariance :math:`\Sigma`, weights ``w ~ N(M, V)`` elementwise and
independent of ``x`` and of each other, bias ``b ~ N(m, v)``, and :math:`z_k = w_k^\top x + b_k`,

.. math::
    E[z_k] = M_k^\top\mu + m_k, \qquad
    \mathrm{Cov}(z_j, z_k) = M_j^\top\Sigma M_k
        + \delta_{jk}\Big[\sum_p V_{kp}\,(\mu_p^2 + \Sigma_{pp}) + v_k\Big].

This is exact.  A convolution reads each kernel at several positions: positions ``i`` and ``j`` of output channel ``k``
share :math:`\sum_p V_{kp}\,(\mu_{ip}\mu_{jp} + \Sigma_{ip,jp}) + v_k`.  With one variance :math:`\sigma_k^2` for each
kernel that is :math:`\sigma_k^2 (x_i^\top x_j + \mathrm{tr}\,\Sigma_{ij})`, of which the first term alone is left where
the input is known.

*Full*: the covariance of all features of a layer, ``[rows, F, F]``, features flattened as ``Flatten`` does.
*Diagonal*: variances only, ``[rows, *shape]``; every rule takes its input as uncorrelated and keeps the diagonal.
Full is exact for a chain of linear layers; its cost is quadratic in the features, and it is meant for small networks.

References:
    Dera, Bouaynaya, Rasool, Shterenberg, Fathallah-Shaykh (2021), PremiUm-CNN: propagating uncertainty towards robust
    convolutional neural networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Moments", "both_sides", "propagate_affine"]


@dataclass(frozen=True)
class Moments:
    """Mean and spread of features.

    Attributes:
        mean: ``[rows, *shape]``.
        spread: variances of that shape, or covariances ``[rows, F, F]`` if ``is_full``; None where the mean is known.
        is_full: which of the two.
    """

    mean: Tensor
    spread: Tensor | None = None
    is_full: bool = False

    @property
    def variance(self) -> Tensor:
        """Variance of every entry, the shape of the mean."""
        if self.spread is None:
            return torch.zeros_like(self.mean)
        return self.spread.diagonal(dim1=1, dim2=2).reshape(self.mean.shape) if self.is_full else self.spread

    @property
    def covariance(self) -> Tensor:
        """Covariance of all entries, ``[rows, F, F]``; diagonal where only variances are known."""
        if self.is_full and self.spread is not None:
            return self.spread
        return torch.diag_embed(self.variance.flatten(1))

    def scaled(self, factor: Tensor) -> Moments:
        """Every entry times a known factor, broadcast against the mean."""
        mean = self.mean * factor
        if self.spread is None:
            return Moments(mean, None, self.is_full)
        if not self.is_full:
            return Moments(mean, self.spread * factor.square())
        flat = factor.expand_as(mean).flatten(1)
        return Moments(mean, self.spread * flat.unsqueeze(1) * flat.unsqueeze(2), True)

    def selected(self, index: Tensor, mean: Tensor) -> Moments:
        """The entries at ``index`` (``[rows, *new shape]``, positions among the flattened features)."""
        if self.spread is None:
            return Moments(mean, None, self.is_full)
        flat = index.flatten(1)
        if not self.is_full:
            return Moments(mean, self.spread.flatten(1).gather(1, flat).reshape(mean.shape))
        lines = self.spread.gather(1, flat.unsqueeze(2).expand(-1, -1, self.spread.shape[2]))
        return Moments(mean, lines.gather(2, flat.unsqueeze(1).expand(-1, flat.shape[1], -1)), True)

    def selected_features(self, index: Tensor) -> Moments:
        """The features of the last axis at ``index``."""
        positions = torch.arange(self.mean[0].numel(), device=index.device).reshape(self.mean.shape[1:])
        chosen = positions.index_select(-1, index).expand(len(self.mean), *self.mean.shape[1:-1], -1)
        return self.selected(chosen, self.mean.index_select(-1, index))

    def added(self, variance: Tensor) -> Moments:
        """With independent noise of this variance on every entry."""
        if self.is_full:
            return Moments(self.mean, self.covariance + torch.diag_embed(variance.flatten(1)), True)
        return Moments(self.mean, variance if self.spread is None else self.spread + variance)


def propagate_affine(
    layer: nn.Module | None,
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None,
    weight_variance: Tensor | None = None,
    bias_variance: Tensor | None = None,
) -> Moments:
    """Moments of ``w x + b`` for a convolution ``layer`` (its stride, padding and the like are read), or a linear one.

    Args:
        layer: the convolution; a linear layer or None for a linear one.
        moments: of the input.
        weight: means.
        bias: means, or None.
        weight_variance: variances, or None where weights are known.
        bias_variance: variances, or None.
    """

    def apply(h: Tensor, matrix: Tensor, shift: Tensor | None = None) -> Tensor:
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            return cast(Tensor, layer._conv_forward(h, matrix, shift))
        return F.linear(h, matrix, shift)

    mean = apply(moments.mean, weight, bias)
    if moments.spread is None and weight_variance is None and bias_variance is None:
        return Moments(mean, None, moments.is_full)
    variances = torch.zeros_like(weight) if weight_variance is None else weight_variance
    if not moments.is_full:
        power = moments.mean.square()
        if moments.spread is None:
            return Moments(mean, apply(power, variances, bias_variance))
        spread = apply(moments.spread, weight.square())
        return Moments(mean, spread + apply(power + moments.spread, variances, bias_variance))
    groups = layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d) else 1
    spread = _noise_of_weights(moments, variances, bias_variance, mean, apply, groups)
    if moments.spread is not None:
        spread = spread + both_sides(lambda h: apply(h, weight), moments)
    return Moments(mean, spread, True)


def both_sides(linear: Callable[[Tensor], Tensor], moments: Moments) -> Tensor:
    """A Sigma A^T for a linear map A of features, which is applied to rows and to columns."""
    spread, shape = cast(Tensor, moments.spread), moments.mean.shape[1:]
    for _ in range(2):
        rows, kept = spread.shape[0], spread.shape[1]
        spread = linear(spread.reshape(rows * kept, *shape)).reshape(rows, kept, -1).transpose(1, 2)
    return spread


def _noise_of_weights(
    moments: Moments,
    variances: Tensor,
    bias_variance: Tensor | None,
    mean: Tensor,
    apply: Callable[..., Tensor],
    groups: int,
) -> Tensor:
    """What the weights' variance adds to the covariance: blocks of equal kernel, over all pairs of positions."""
    shape, is_linear = moments.mean.shape[1:], variances.dim() == 2
    taps = variances[0].numel()
    # Which feature, counted from one, tap p of a kernel reads at each position; 0 in the padding: read off by kernels
    # that copy a single tap.
    numbers = torch.arange(1, shape.numel() + 1, dtype=torch.float64, device=mean.device).reshape(1, *shape)
    copiers = torch.eye(taps, dtype=torch.float64, device=mean.device).reshape(taps, *variances.shape[1:])
    read = apply(numbers, copiers.repeat(groups, *(1,) * (variances.dim() - 1)))
    read = read.movedim(-1, 1) if is_linear else read
    index = read.reshape(groups, taps, -1).round().long()
    first = F.pad(moments.mean.flatten(1), (1, 0))[:, index]
    kernels = variances.reshape(groups, -1, taps)
    noise = torch.einsum("gkp,bgpi,bgpj->bgkij", kernels, first, first)
    if moments.spread is not None:
        second = F.pad(moments.spread, (1, 0, 1, 0))[:, index.unsqueeze(-1), index.unsqueeze(-2)]
        noise = noise + torch.einsum("gkp,bgpij->bgkij", kernels, second)
    noise = noise.flatten(1, 2)
    if bias_variance is not None:
        noise = noise + bias_variance.reshape(-1, 1, 1)
    rows, features = mean.shape[0], mean[0].numel()
    blocks = torch.diag_embed(noise.movedim(1, -1))  # rows, i, j, k, k
    blocks = blocks.permute(0, 1, 3, 2, 4) if is_linear else blocks.permute(0, 3, 1, 4, 2)
    return blocks.reshape(rows, features, features)
