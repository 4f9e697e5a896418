"""Training steps as a user would write them without us: plain PyTorch, plain Pyro, and local draws by hand."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.nn import functional as F

NUM_DATA = 60_000
Step = Callable[[], None]


def plain_step(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """One step of ordinary training."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def pyro_step(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Normal weights as Pyro's tutorials have them: ``PyroSample``, ``AutoNormal`` and ``SVI.step``."""
    to_pyro_module_(net)
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())))

    def model(x: Tensor, y: Tensor) -> None:
        logits = net(x)
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    svi = SVI(model, AutoNormal(model, init_scale=0.01), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return lambda: svi.step(x, y)


def local_step(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Normal weights with local draws, the shortest loop that does it: what the arithmetic alone costs."""
    layers = [_NormalLayer(m) if isinstance(m, nn.Linear | nn.Conv2d) else m for m in net.children()]
    own = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(own.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        fit = F.cross_entropy(own(x), y, reduction="sum") * (NUM_DATA / len(x))
        kl = sum(layer.kl() for layer in layers if isinstance(layer, _NormalLayer))
        (fit + kl).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


class _NormalLayer(nn.Module):
    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
        self.rho, self.bias_rho = (nn.Parameter(torch.full_like(p, -4.5)) for p in (layer.weight, layer.bias))
        self.apply_to = F.linear if isinstance(layer, nn.Linear) else F.conv2d

    def forward(self, h: Tensor) -> Tensor:
        mean = self.apply_to(h, self.weight, self.bias)
        variance = self.apply_to(h * h, (2 * self.rho).exp(), (2 * self.bias_rho).exp())
        return mean + variance.sqrt() * torch.randn_like(mean)

    def kl(self) -> Tensor:
        pairs = ((self.weight, self.rho), (self.bias, self.bias_rho))
        return sum(0.5 * (m * m + (2 * r).exp() - 1).sum() - r.sum() for m, r in pairs)  # type: ignore[return-value]
