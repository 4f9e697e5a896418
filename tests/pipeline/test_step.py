"""What a training step does besides arithmetic: counted, not timed, so that a slow machine says the same."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyrobc as bc
from pyrobc.lifted_layers import _AddNoise
from pyrobc.models import lenet_300_100
from pyrobc.objective import fast_loss

ROOT = Path(__file__).parents[2]
NEEDS_BENCHMARKS = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the benchmarks are not installed")


class CountOperations(TorchDispatchMode):
    """Number of operations that reach a kernel."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "most"), [("log_uniform", 345), ("group_normal_jeffreys", 470), ("group_horseshoe", 980)]
)
def test_a_step_takes_few_operations(family, most):
    """Forward and backward of LeNet-300-100, three blocks and six parameters."""
    x, y = torch.rand(8, 784), torch.randint(0, 10, (8,))
    model = bc.lift(lenet_300_100(), family, "categorical", x[:1])
    loss = fast_loss(model, model.new_guide(), 100)
    loss(x, y, 1.0).backward()
    with CountOperations() as counter:
        loss(x, y, 1.0).backward()
    assert 100 < counter.count <= most


def test_noise_on_a_pre_activation_has_the_gradient_of_the_plain_formula():
    torch.manual_seed(0)
    mean = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    variance = torch.rand(4, 3, dtype=torch.float64).add(0.1).requires_grad_()
    noise = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(_AddNoise.apply(mean, variance, noise.clone()), mean + variance.sqrt() * noise)
    assert torch.autograd.gradcheck(lambda m, v: _AddNoise.apply(m, v, noise.clone()), (mean, variance))
    (slope,) = torch.autograd.grad(_AddNoise.apply(mean, 0.0 * variance, noise.clone()).sum(), variance)
    assert bool((slope == 0).all())


@NEEDS_BENCHMARKS
def test_the_steps_one_would_write_train(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    written = importlib.import_module("benchmarks._written_steps")
    torch.manual_seed(0)
    x, y = torch.rand(16, 784), torch.arange(16) % 10
    net = lenet_300_100()
    before = torch.nn.functional.cross_entropy(net(x), y).item()
    step = written.plain_step(net, x, y)
    for _ in range(5):
        step()
    assert torch.nn.functional.cross_entropy(net(x), y).item() < before
    written.local_step(lenet_300_100(), x, y)()
    import pyro

    with pyro.get_param_store().scope():
        written.pyro_step(lenet_300_100(), x, y)()
        assert any("weight" in name for name in pyro.get_param_store())


@NEEDS_BENCHMARKS
def test_the_suite_lists_itself_and_refuses_what_it_does_not_have():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    listed = run().stdout.splitlines()
    files = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    assert [line.split()[0] for line in listed] == files and all(len(line.split()) > 3 for line in listed)
    refused = run("no_such")
    assert refused.returncode == 2 and "got no_such; allowed: bmr_diabetes" in refused.stderr
