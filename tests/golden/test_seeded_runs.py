"""Short seeded runs against stored numbers: a change that moves them is seen, and must be meant.

``PYROBC_REWRITE_GOLDEN=1 pytest tests/golden`` stores the numbers of every family anew, with the versions that made
them; a new family is held to its numbers from then on.
"""

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import pyrobc as bc
from pyrobc.family import families
from pyrobc.models import lenet_5, mlp

STORE = Path(__file__).with_name("seeded_runs.json")
IS_REWRITING = "PYROBC_REWRITE_GOLDEN" in os.environ
NETWORKS = ("lenet_5", "mlp")


def run(family: str, network: str) -> dict[str, float]:
    torch.manual_seed(0)
    if network == "mlp":
        net, x = mlp.build(12, (10, 6), 3), torch.randn(96, 12)
    else:
        net, x = lenet_5(out_features=3), torch.randn(48, 1, 28, 28)
    y = (x.flatten(1)[:, 0] > 0).long() + (x.flatten(1)[:, 1] > 0.5).long()
    model = bc.lift(net, family, "categorical", x[:2])
    posterior = bc.fit(model, (x, y), epochs=3, lr=1e-2, batch_size=24, seed=0, dtype=torch.float64, progress=False)
    score = bc.score(posterior)
    with torch.no_grad():
        outputs = posterior.to_module()(x.double())
    return {
        "elbo": posterior.history[-1]["elbo"],
        "delta_f": float(sum(values.sum() for values in score.delta_f.values())),
        "log_odds": float(sum(values.sum() for values in score.log_odds().values())),
        "output": float(outputs.square().mean()),
    }


def keys() -> list[str]:
    if IS_REWRITING:
        return [f"{family}/{network}" for family in families() for network in NETWORKS]
    return sorted(json.loads(STORE.read_text())["runs"])


def test_the_first_families_are_stored():
    assert {f"{f}/{n}" for f in ("group_horseshoe", "log_uniform") for n in NETWORKS} <= set(keys())


@pytest.mark.parametrize("key", keys())
def test_a_seeded_run_gives_the_stored_numbers(key):
    got, stored = run(*key.split("/")), json.loads(STORE.read_text())
    if IS_REWRITING:
        stored["versions"] = {package: version(package) for package in ("torch", "pyro-ppl", "numpy")}
        stored["runs"][key] = got
        STORE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    assert got == pytest.approx(stored["runs"][key], rel=1e-6)
