r"""Mean and covariance of the output of a network whose weights are Normal, layer by layer; nothing is drawn.

Linear and convolution layers are exact given their input's moments (``pyrobc.moments``).  The others, for an input of
mean :math:`\mu` and covariance :math:`\Sigma`:

============  ===========================================================================================
layer         rule
============  ===========================================================================================
activation    :math:`f(\mu)` and :math:`\Sigma\circ f'(\mu)f'(\mu)^\top`: first order.  Or, for a ReLU, the moments
              under a Normal input: with :math:`\alpha=\mu/s`, mean :math:`\mu\Phi + s\phi`, variance
              :math:`s^2[\Phi + \alpha^2\Phi\bar\Phi - \alpha\phi(\Phi-\bar\Phi) - \phi^2]`,
              :math:`\bar\Phi = \Phi(-\alpha)`, and covariance :math:`\Phi_i\Phi_j\Sigma_{ij}`, the first term
              of its series in the correlation
max pooling   the entries that are largest in the mean, with their covariance
average       linear, and so exact
batch norm    linear; in training the batch statistics are those of the means, taken as known
softmax       :math:`p = \mathrm{softmax}(\mu)`, covariance :math:`J\Sigma J^\top` with
              :math:`J = \mathrm{diag}(p) - pp^\top`
dropout       none in evaluation; in training, at rate ``r``, each variance gains :math:`(\mu^2+v)\,r/(1-r)`
============  ===========================================================================================

References:
    Dera, Bouaynaya, Rasool, Shterenberg, Fathallah-Shaykh (2021), PremiUm-CNN: propagating uncertainty towards robust
    convolutional neural networks.  First-order activations, pooling and softmax are as in the authors' public code.
    Frey, Hinton (1999), Variational learning in nonlinear Gaussian belief networks: moments of a rectified Normal.
    Wu, Nowozin, Meeds, Turner, Hernandez-Lobato, Gaunt (2019), Deterministic variational inference for robust Bayesian
    neural networks: covariance after a ReLU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobc.errors import GroupError
from pyrobc.moments import Moments, both_sides, propagate_affine
from pyrobc.slicing import SelectLinear

__all__ = ["MomentNetwork", "Relu", "propagate_chain", "propagate_layer", "softmax_moments"]

Relu = Literal["first_order", "exact"]

_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh)
_SMALLEST_VARIANCE = 1e-12
"""Below it an input counts as known: the standard deviation is divided by, and its gradient must be finite."""


class MomentNetwork(nn.Module):
    """A plain network that keeps the variance of its weights: ``Moments`` of its outputs instead of outputs.

    Args:
        net: a chain of layers, its parameters the means; it is not changed.
        variances: of its parameters, by path; those that are absent are known.
        covariance: ``full`` or ``diagonal``, between layers.
        relu: ``first_order`` or ``exact``.
    """

    def __init__(
        self,
        net: nn.Module,
        variances: Mapping[str, Tensor],
        covariance: Literal["full", "diagonal"] = "diagonal",
        relu: Relu = "first_order",
    ) -> None:
        super().__init__()
        self.net, self.is_full, self.relu = copy.deepcopy(net), covariance == "full", relu
        self.names = {name.replace(".", "/"): name for name in variances}
        for key, name in self.names.items():
            self.register_buffer(key, variances[name].detach().clone())

    def forward(self, inputs: Tensor) -> Moments:
        """Moments of the outputs for known inputs."""
        variances = {name: getattr(self, key) for key, name in self.names.items()}
        return propagate_chain(self.net, Moments(inputs, None, self.is_full), self.relu, variances)


def propagate_chain(
    net: nn.Module, moments: Moments, relu: Relu = "first_order", variances: Mapping[str, Tensor] | None = None
) -> Moments:
    """Moments of the output of a network that calls its layers one after the other.

    Args:
        net: nested ``nn.Sequential``, or one layer; a layer may have a rule of its own as its method ``propagate``.
        moments: of the input.
        relu: see ``propagate_layer``.
        variances: of its parameters, by path; those that are absent are known.

    Raises:
        GroupError: it does something else between its layers, such as a residual add, or has a layer without a rule.
    """
    known = variances or {}
    for path, layer in _list_layers(net):
        if hasattr(layer, "propagate"):
            moments = layer.propagate(moments)
        else:
            names = (f"{path}.weight".lstrip("."), f"{path}.bias".lstrip("."))
            moments = propagate_layer(layer, moments, relu, *(known.get(name) for name in names))
    return moments


def _list_layers(net: nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(net, nn.Sequential):
        yield path, net
        return
    for name, layer in net.named_children():
        yield from _list_layers(layer, f"{path}.{name}" if path else name)


def propagate_layer(
    layer: nn.Module,
    moments: Moments,
    relu: Relu = "first_order",
    weight_variance: Tensor | None = None,
    bias_variance: Tensor | None = None,
) -> Moments:
    """Moments of the output of a layer that has its (mean) weights.

    Args:
        layer: of a kind in the table above.
        moments: of its input.
        relu: ``first_order``, or ``exact`` for the moments of a rectified Normal.
        weight_variance: of its weights, their shape; None where they are known.
        bias_variance: of its biases.

    Raises:
        GroupError: there is no rule for this layer.
    """
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        if isinstance(layer, SelectLinear):
            moments = moments.selected_features(layer.index)
        return propagate_affine(layer, moments, layer.weight, layer.bias, weight_variance, bias_variance)
    if isinstance(layer, nn.ReLU) and relu == "exact" and moments.spread is not None:
        return _rectify(moments)
    if isinstance(layer, _ELEMENTWISE):
        slope = _differentiate(layer, moments.mean)
        return Moments(layer(moments.mean.clone()), moments.scaled(slope).spread, moments.is_full)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return _normalise(layer, moments, weight_variance, bias_variance)
    if isinstance(layer, nn.MaxPool1d | nn.MaxPool2d):
        return _pool_largest(layer, moments)
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d | nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        return _pool_mean(layer, moments)
    if isinstance(layer, nn.Softmax) and moments.mean.dim() == 2 and layer.dim in (-1, 1):
        result = softmax_moments(moments)
        return result if moments.is_full else Moments(result.mean, result.variance)
    if isinstance(layer, nn.Flatten | nn.Unflatten | nn.Identity):
        mean = layer(moments.mean)
        spread = moments.spread
        return Moments(
            mean, spread if spread is None or moments.is_full else spread.reshape(mean.shape), moments.is_full
        )
    if isinstance(layer, nn.Dropout):
        noise = layer.p / (1 - layer.p) if layer.training else 0.0
        return moments.added(noise * (moments.mean.square() + moments.variance)) if noise else moments
    raise _refuse(layer)


def softmax_moments(moments: Moments) -> Moments:
    """Mean ``[rows, K]`` and full covariance of the softmax of ``[rows, K]`` scores, to first order."""
    p = moments.mean.softmax(-1)
    jacobian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return Moments(p, jacobian @ moments.covariance @ jacobian, True)


def _differentiate(layer: nn.Module, mean: Tensor) -> Tensor:
    """Slope of an elementwise activation; it has a gradient of its own."""
    if isinstance(layer, nn.ReLU):
        return (mean > 0).to(mean.dtype)
    with torch.enable_grad():
        point = mean if mean.requires_grad else mean.detach().requires_grad_()
        (slope,) = torch.autograd.grad(layer(point.clone()).sum(), point, create_graph=mean.requires_grad)
    return slope


def _rectify(moments: Moments) -> Moments:
    mean, variance = moments.mean, moments.variance
    is_known = variance < _SMALLEST_VARIANCE
    scale = variance.clamp_min(_SMALLEST_VARIANCE).sqrt()
    alpha = mean / scale
    density = torch.exp(-0.5 * alpha.square()) / math.sqrt(2 * math.pi)
    above, below = (torch.special.ndtr(side) for side in (alpha, -alpha))
    ratio = above + alpha.square() * above * below - alpha * density * (above - below) - density.square()
    rectified = torch.where(is_known, mean.relu(), mean * above + scale * density)
    step = (mean > 0).to(mean.dtype)
    above = torch.where(is_known, step, above)
    spread = variance * torch.where(is_known, step, ratio.clamp_min(0.0))
    if not moments.is_full:
        return Moments(rectified, spread)
    linear = Moments(rectified, moments.scaled(above).spread, True)
    return linear.added((spread - linear.variance).clamp_min(0.0))


def _normalise(layer: Any, moments: Moments, weight_variance: Tensor | None, bias_variance: Tensor | None) -> Moments:
    mean = moments.mean
    shape = (1, -1, *(1,) * (mean.dim() - 2))
    uses_batch = layer.training or layer.running_var is None
    variance = layer.running_var
    if uses_batch:
        variance = mean.var([axis for axis in range(mean.dim()) if axis != 1], unbiased=False)
    if layer.training and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    center = F.batch_norm(
        mean, layer.running_mean, layer.running_var, None, None, uses_batch, layer.momentum, layer.eps
    )
    factor = (variance + layer.eps).rsqrt().reshape(shape)
    normal = Moments(center, moments.scaled(factor).spread, moments.is_full)
    if layer.weight is None:
        return normal
    scaled = normal.scaled(layer.weight.reshape(shape))
    result = Moments(scaled.mean + layer.bias.reshape(shape), scaled.spread, moments.is_full)
    if weight_variance is None and bias_variance is None:
        return result
    gain, shift = (torch.zeros_like(layer.weight) if v is None else v for v in (weight_variance, bias_variance))
    if not moments.is_full:
        return result.added(gain.reshape(shape) * (center.square() + normal.variance) + shift.reshape(shape))
    flat = center.flatten(1)
    second = flat.unsqueeze(1) * flat.unsqueeze(2) + normal.covariance
    owner = torch.arange(len(gain), device=mean.device).repeat_interleave(mean[0, 0].numel())
    is_shared = owner.unsqueeze(0) == owner.unsqueeze(1)
    return Moments(result.mean, result.covariance + is_shared * (gain[owner] * second + shift[owner]), True)


def _pool_largest(layer: Any, moments: Moments) -> Moments:
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, True)
    pool: Any = F.max_pool1d if isinstance(layer, nn.MaxPool1d) else F.max_pool2d
    mean, index = pool(moments.mean, *settings)
    plane = moments.mean[0, 0].numel()  # indices count within a channel
    start = torch.arange(moments.mean.shape[1], device=mean.device).reshape(1, -1, *(1,) * (mean.dim() - 2)) * plane
    return moments.selected(index + start, mean)


def _pool_mean(layer: Any, moments: Moments) -> Moments:
    mean = layer(moments.mean)
    window = moments.mean[0, 0].numel() / mean[0, 0].numel()
    ones = torch.ones_like(moments.mean[:1])
    if moments.spread is None:
        return Moments(mean, None, moments.is_full)
    if moments.is_full:
        return Moments(mean, both_sides(layer, moments), True)
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        sizes = [layer.kernel_size] if isinstance(layer.kernel_size, int) else layer.kernel_size
        window = math.prod(sizes) ** (moments.mean.dim() - 2 if len(sizes) == 1 else 1)
        has_equal_windows = not (layer.ceil_mode or getattr(layer, "divisor_override", None)) and bool(
            (layer(ones) == 1).all()
        )
    else:
        pairs = zip(moments.mean.shape[2:], mean.shape[2:], strict=True)
        has_equal_windows = all(size % parts == 0 for size, parts in pairs)
    if not has_equal_windows:
        raise _refuse(layer)
    return Moments(mean, layer(moments.spread) / window)


def _refuse(layer: nn.Module) -> GroupError:
    return GroupError(
        "moments of a layer",
        got=f"{type(layer).__name__}, for which there is no rule",
        allowed="nn.Sequential of linear, convolution, batch-norm, activation, pooling (equal windows), flatten, "
        "dropout and softmax layers",
        fix="write the network as such a chain, or fit and predict with draws (path='fast')",
    )
