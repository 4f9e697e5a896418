"""A tiny network fitted once, and scores made by hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrobc.batches import seeded
from pyrobc.decide import decide
from pyrobc.dependency import trace_groups
from pyrobc.evidence import Evidence, evidence
from pyrobc.family import make_family
from pyrobc.fit import fit
from pyrobc.groups import GroupSpec
from pyrobc.lift import lift
from pyrobc.plan import Plan
from pyrobc.posterior import Posterior
from pyrobc.scores import Score, score
from pyrobc.surgery import apply


@dataclass
class Compressed:
    """A 6-10-5-2 network of which two inputs matter, fitted, scored, decided on and cut; shaped as a result."""

    data: tuple[Tensor, Tensor]
    posterior: Posterior
    score: Score
    evidence: Evidence
    plan: Plan
    net: nn.Module
    history: list[dict[str, float]]
    table: list[dict[str, Any]]
    example_inputs: Tensor


@pytest.fixture(scope="session")
def compressed() -> Compressed:
    with seeded(7):
        x = torch.randn(300, 6)
        y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
        y = torch.where(torch.rand(300) < 0.05, 1 - y, y)
        net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 2))
    model = lift(net, make_family("log_uniform", gate_lr=3.0), "categorical", x[:1])
    posterior = fit(model, (x, y), epochs=60, lr=5e-2, batch_size=100, progress=False)
    scored = score(posterior)
    checked = evidence(posterior, scored, (x, y), num_draws=60, num_candidates=3)
    plan = decide(scored, checked)
    return Compressed((x, y), posterior, scored, checked, plan, apply(plan, posterior), posterior.history, [], x[:1])


def build_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 2)).eval()


def build_convolutional() -> nn.Module:
    """Batch norm with statistics of its own, a flatten that owns four features a channel, and an additive bias."""
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 3),
    )  # fmt: skip
    with seeded(3), torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
                layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                layer.bias.uniform_(-1, 1)
    return net.eval()


NETWORKS = {"mlp": (build_mlp, (6,)), "convolutional": (build_convolutional, (2, 9, 9))}


@pytest.fixture(scope="session", params=NETWORKS)
def traced(request: pytest.FixtureRequest) -> tuple[nn.Module, GroupSpec, Tensor]:
    build, shape = NETWORKS[request.param]
    with seeded(1):
        net, inputs = build(), torch.randn(5, *shape)
    return net, trace_groups(net, inputs[:1]), inputs


@pytest.fixture(scope="session")
def mlp_spec() -> GroupSpec:
    with seeded(1):
        return trace_groups(build_mlp(), torch.randn(1, 6))


def score_by_hand(
    spec: GroupSpec, log_odds: Mapping[str, Any], mcse: float = 0.0, reasons: Mapping[str, str] | None = None
) -> Score:
    """A point reduction's score whose even-odds log odds are given."""
    odds = {name: np.asarray(values, dtype=np.float64) for name, values in log_odds.items()}
    zero = {name: np.zeros_like(values) for name, values in odds.items()}
    return Score(
        label="by hand",
        delta_f=odds,
        complement=zero,
        implied=zero,
        mcse={name: values + mcse for name, values in zero.items()},
        threshold=zero,
        mean_scale=zero,
        reasons=reasons or {},
        epsilon=0.01,
        spec=spec,
        provenance={"family": "log_uniform", "seed": 0, "input_shape": [6], "versions": {}},
    )


def plan_keeping(spec: GroupSpec, kept: Mapping[str, Any]) -> Plan:
    odds = {b.name: np.where(np.isin(np.arange(b.size), kept[b.name]), -1.0, 1.0) for b in spec.blocks}
    return decide(score_by_hand(spec, odds))


@pytest.fixture(scope="session")
def by_hand() -> Any:
    return score_by_hand


@pytest.fixture(scope="session")
def keeping() -> Any:
    return plan_keeping
