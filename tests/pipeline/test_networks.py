"""Every network of ``pyrobc.models``: what random plans leave is what masking gives, and costs what was forecast."""

import copy
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pyrobc.models
from pyrobc import codec
from pyrobc.config import BUILT_IN
from pyrobc.dependency import trace_groups
from pyrobc.errors import OutputError
from pyrobc.export import save, verify
from pyrobc.models import lenet, mlp, resnet, vgg, vit
from pyrobc.plan import Plan
from pyrobc.surgery import apply, mask

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp.build(12, (7, 5), 3), (12,)),
    "lenet": (lambda: lenet.build((3, 4), (6,), side=16), (1, 16, 16)),
    "vgg": (lambda: vgg.build(((3, 4), (5,)), side=8), (3, 8, 8)),
    "resnet": (lambda: resnet.build((2, 1), 4), (3, 8, 8)),
    "resnet, bottleneck": (lambda: resnet.build((1, 1), 2, is_bottleneck=True, is_large=True), (3, 16, 16)),
    "vit": (lambda: vit.build(8, features=8, depth=2, num_heads=4, hidden=6), (3, 8, 8)),
    "vit, mean": (lambda: vit.build(8, features=6, depth=1, num_heads=2, has_token=False), (3, 8, 8)),
}


def build_shaken(name: str) -> tuple[nn.Module, Tensor]:
    """The network with parameters and statistics that hide nothing, and inputs for it."""
    build, shape = NETWORKS[name]
    net = build()
    with torch.no_grad():
        for path, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in path else 0.3 * torch.randn_like(tensor))
    return net, torch.randn(4, *shape)


def count(net: nn.Module, x: Tensor) -> tuple[int, int]:
    """Parameters and multiply-accumulates per example, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net.eval()(x)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2 // len(x)


def test_no_network_is_forgotten() -> None:
    modules = {info.name for info in pkgutil.iter_modules(pyrobc.models.__path__)} - {"regression"}
    assert modules == {name.split(",")[0] for name in NETWORKS}
    assert set(BUILT_IN) - {"mlp"} == set(pyrobc.models.__all__)
    for name in modules:
        assert "build" in importlib.import_module(f"pyrobc.models.{name}").__all__


@pytest.mark.parametrize("name", NETWORKS)
@hypothesis.settings(max_examples=4, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(seed=st.integers(0, 10_000))
def test_cut_equals_masked_and_costs_what_was_forecast(name: str, seed: int, keeping: Callable[..., object]) -> None:
    torch.manual_seed(seed)
    net, x = build_shaken(name)
    spec = trace_groups(net, x[:2])
    assert spec.forecast(spec.everything()) == count(copy.deepcopy(net), x)
    rng = np.random.default_rng(seed)
    kept = {b.name: np.sort(rng.permutation(b.size)[: rng.integers(1, b.size + 1)]) for b in spec.blocks}
    plan = keeping(spec, kept)
    small, masked = apply(plan, net, example_inputs=x), mask(plan, net)
    assert count(copy.deepcopy(small), x) == (plan.parameters[1], plan.macs[1]) == spec.forecast(plan.kept())
    for is_training in (False, True):
        expected, got = masked.train(is_training)(x), small.train(is_training)(x)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    kept_indices, before = spec.kept_indices(plan.kept()), dict(masked.named_buffers())
    for path, buffer in small.named_buffers():  # batch norm has moved its statistics alike
        if "running" in path:
            index = torch.as_tensor(kept_indices.get((path, 0), np.arange(len(before[path]))))
            torch.testing.assert_close(buffer, before[path][index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("is_training", [True, False])
def test_counting_changes_nothing(name: str, is_training: bool) -> None:
    net, x = build_shaken(name)
    net.train(is_training)
    next(net.parameters()).requires_grad_(False)
    before = copy.deepcopy(net)
    spec = trace_groups(net, x[:1])
    spec.forecast({block.name: np.array([0]) for block in spec.blocks})
    for (path, a), b in zip(net.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), path
    for p, q in zip(net.parameters(), before.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and p.grad is None
    for m, n in zip(net.modules(), before.modules(), strict=True):
        assert type(m) is type(n) and m.training == is_training
        assert not m._forward_hooks and not m._forward_pre_hooks


@pytest.mark.parametrize("name", ["vgg", "resnet", "vit", "vit, mean"])
def test_cut_networks_are_written_and_read_back(name: str, keeping: Callable[..., Plan], tmp_path: Path) -> None:
    net, x = build_shaken(name)
    is_stream = name == "vit, mean"
    spec = trace_groups(net, x[:2], prune_residual=is_stream, head_dims=is_stream)
    plan = keeping(spec, {b.name: range(0, b.size, 2) for b in spec.blocks})
    small = apply(plan, net, example_inputs=x)
    files = save(small, plan, tmp_path, example_inputs=x, onnx="auto")
    differences = verify(small, tmp_path, x[:3])
    assert max(differences.values()) <= 1e-4 and "model.pt2" in differences
    if name == "vgg":
        assert differences["model.rbc"] == 0
    else:
        assert "model.rbc" not in files
        kind = "Residual" if name == "resnet" else "VisionTransformer"
        assert kind in files.notes[0]
        with pytest.raises(OutputError, match=f"got {kind}; allowed: a tree of Sequential.*pyrobc.save"):
            codec.encode(small)
