"""Units in an order that codes shorter, and what each weight costs."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from pyrobc import codec
from pyrobc.slicing import SelectLinear


def sparse_mlp() -> nn.Module:
    select = SelectLinear(nn.Linear(60, 30), torch.arange(100, 160))
    return fill(nn.Sequential(select, nn.ReLU(), nn.BatchNorm1d(30), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5)))


def sparse_lenet() -> nn.Module:
    return fill(
        nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3),
            nn.GELU(),
            nn.Flatten(),
            nn.BatchNorm1d(72),
            nn.Linear(72, 12),
            nn.ReLU(),
            nn.Linear(12, 3),
        )  # fmt: skip
    )


def fill(net: nn.Module) -> nn.Module:
    """Rows of very different densities, quantised."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                density = 0.4 * torch.rand(len(parameter), *[1] * (parameter.ndim - 1))
                parameter.copy_(torch.randn_like(parameter).sign() * 0.25 * (torch.rand_like(parameter) < density))
    return net.eval()


CASES = [(sparse_mlp, (160,)), (sparse_lenet, (1, 12, 12))]


@pytest.mark.parametrize(("build", "shape"), CASES)
def test_the_function_stays_and_the_file_shrinks(build: object, shape: tuple[int, ...]) -> None:
    net = build()  # type: ignore[operator]
    before = copy.deepcopy(net.state_dict())
    ordered = codec.order_units(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    x = torch.randn(7, *shape)
    assert torch.allclose(net(x), ordered(x), atol=1e-5)
    assert len(codec.encode(ordered)[0]) < len(codec.encode(net)[0])
    moved = [name for name, tensor in ordered.state_dict().items() if not torch.equal(before[name], tensor)]
    assert any(name.endswith("weight") for name in moved)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2)),
        nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU()), nn.Linear(4, 2)),
        nn.Linear(3, 2),
    ],
    ids=range(3),
)
def test_what_may_not_move_stays(net: nn.Module) -> None:
    ordered = codec.order_units(fill(net))
    assert all(torch.equal(tensor, ordered.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert ordered is not net


@pytest.mark.parametrize(("build", "shape"), CASES)
def test_prices_sum_to_the_file(build: object, shape: tuple[int, ...]) -> None:
    net = build()  # type: ignore[operator]
    bits = 3
    prices = codec.price_entries(net, bits=bits)
    data, packing = codec.encode(net, bits=bits)
    coded = math.fsum(float(spent.sum()) for spent, _ in prices.values())
    assert coded == pytest.approx(packing.parts["masks"] + packing.parts["values"])
    rest = sum(bits for part, bits in packing.parts.items() if part not in ("masks", "values"))
    assert coded + rest == pytest.approx(8 * len(data))
    for name, (spent, empty) in prices.items():
        tensor = net.state_dict()[name].numpy()
        assert spent.shape == empty.shape == tensor.shape
        assert np.allclose(spent[tensor == 0], empty[tensor == 0], atol=1e-3)
        assert (empty >= 0).all() and (spent >= 0).all()
    assert {"0.weight", "0.bias"} <= set(prices)
