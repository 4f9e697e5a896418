"""Everything on a GPU: fit, resume, score, decide, cut, code and export; numbers agree with the processor's."""

import copy
import json
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrobc as bc
from pyrobc.batches import seeded
from pyrobc.codec import decode, encode
from pyrobc.decide import decide
from pyrobc.evidence import evidence
from pyrobc.family import families
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.models import lenet_5
from pyrobc.posterior import Posterior
from pyrobc.scores import score
from pyrobc.surgery import apply

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")
NAMES = sorted(families())


def some_data(rows: int = 300) -> tuple[Tensor, Tensor]:
    with seeded(7):
        x = torch.randn(rows, 6)
        return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def build() -> nn.Module:
    with seeded(3):
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 2))


def fitted(name: str, device: str, epochs: int = 5, **settings: object) -> Posterior:
    model = lift(build(), name, "categorical", some_data()[0][:1])
    return fit(model, some_data(), epochs=epochs, lr=2e-2, progress=False, device=device, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_stays_on_the_device_and_scores_agree_with_the_processor(name: str) -> None:
    there = fitted(name, "cuda")
    assert all(p.is_cuda for p in there.guide.parameters())
    here = there.to("cpu")
    assert not any(p.is_cuda for p in here.guide.parameters())
    on_gpu, on_cpu = score(there), score(here)
    for block, values in on_cpu.delta_f.items():
        np.testing.assert_allclose(on_gpu.delta_f[block], values, rtol=1e-5, atol=1e-6)
    first, second = decide(on_gpu), decide(on_cpu)
    assert first.kept() == second.kept()
    small = apply(first, there)
    x = some_data()[0]
    expected = apply(second, here)(x)
    torch.testing.assert_close(small(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_compress_runs_from_end_to_end(name: str, tmp_path: Path) -> None:
    x, y = some_data()
    result = bc.compress(build(), (x, y), family=name, epochs=4, seed=0, progress=False, device="cuda", num_draws=50)
    bc.save(result.net, result.plan, tmp_path / "run", example_inputs=x[:2])
    assert json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (tmp_path / "run" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_goes_on_on_another_device(first: str, second: str, tmp_path: Path) -> None:
    file = tmp_path / "fit.pt"
    fitted("log_uniform", first, epochs=2, checkpoint=file)
    resumed = fitted("log_uniform", second, epochs=4, checkpoint=file)
    assert len(resumed.history) == 4
    assert next(resumed.guide.parameters()).device.type == second


def test_evidence_of_a_fit_on_the_device() -> None:
    posterior = fitted("log_uniform", "cuda", epochs=10)
    found = evidence(posterior, score(posterior), some_data(), num_draws=50, num_candidates=3)
    assert np.isfinite([candidate.elpd for candidate in found.candidates]).all()


def test_groups_leave_while_a_convolutional_network_is_fitted() -> None:
    with seeded(0):
        x, y, net = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,)), lenet_5()
    model = lift(net, "log_uniform", "categorical", x[:1])
    prune = bc.PruneEachEpoch("uniform4", "none")
    posterior = fit(model, (x, y), epochs=4, lr=2e-2, temperature=50.0, progress=False, device="cuda", prune=prune)
    assert all(p.is_cuda for p in posterior.guide.parameters())
    assert posterior.to_module()(x.cuda()).shape == (64, 10)


def test_a_network_on_the_device_is_coded_as_on_the_processor() -> None:
    net = build()
    data, _ = encode(net)
    on_gpu, _ = encode(copy.deepcopy(net).cuda())
    assert data == on_gpu
    assert all(not p.is_cuda for p in decode(on_gpu).parameters())


def test_bayes_factors_of_a_pyro_model_on_the_device() -> None:
    q = dist.Normal(torch.tensor([0.1, 2.0], device="cuda").double(), torch.tensor([0.3, 0.2], device="cuda").double())
    p = dist.Normal(torch.zeros(2, device="cuda").double(), torch.ones(2, device="cuda").double())
    point = dist.Delta(torch.zeros(2, device="cuda").double())
    found = bc.bmr.reduce(q, p, point).delta_f
    expected = q.log_prob(torch.zeros(2, device="cuda").double()) - p.log_prob(torch.zeros(2, device="cuda").double())
    assert found.is_cuda
    torch.testing.assert_close(found, expected)
