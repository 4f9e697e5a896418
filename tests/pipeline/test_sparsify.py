"""Rounds of deletion on a planted problem: what is asked for is reached, what matters stays, a killed run goes on."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyrobc.batches import seeded
from pyrobc.codec import encode
from pyrobc.errors import ConfigError
from pyrobc.fit import fit
from pyrobc.folding import fold_scales
from pyrobc.lift import lift
from pyrobc.posterior import Posterior
from pyrobc.sparsify import WeightCount, sparsify
from pyrobc.weights import count_weights, prune_weights

SETTINGS: dict[str, Any] = {"lr": 2e-2, "batch_size": 100, "progress": False, "seed": 3}


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Two of eight inputs matter."""
    with seeded(7):
        x = torch.randn(400, 8)
        y = torch.tanh(2 * x[:, 2]) - 0.5 * x[:, 5] + 0.05 * torch.randn(400)
    return x, y[:, None]


@pytest.fixture(scope="module")
def start(data: tuple[Tensor, Tensor]) -> Posterior:
    with seeded(1):
        net = nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 1))
    model = lift(net, "group_normal_jeffreys", "normal", data[0][:2])
    return fold_scales(fit(model, data, epochs=100, **SETTINGS))


def bits(posterior: Posterior) -> dict[str, Tensor]:
    return posterior.guide.state_dict() | {f"net/{n}": t for n, t in posterior.model.state_dict().items()}


def origin(posterior: Posterior, block: str) -> list[int]:
    found = posterior.model.spec.block(block)
    return list(range(found.size)) if found.origin is None else found.origin.tolist()


def test_a_number_to_keep_is_reached_along_the_cubic(start: Posterior, data: tuple[Tensor, Tensor]) -> None:
    before, scales = copy.deepcopy(bits(start)), copy.deepcopy(start.model.family.prior_scales)
    rows: list[WeightCount] = []
    small = sparsify(start, data, keep=40, rounds=5, epochs=2, settle_epochs=3, on_round=rows.append, **SETTINGS)
    first, (left, total) = count_weights(start)[0], count_weights(small)
    assert 30 <= left <= 40, "dead units may take a few more with them"
    tensors = small.to_module().named_parameters()
    assert total == sum(tensor.numel() for name, tensor in tensors if not name.startswith("1.")) < 111
    assert [row.round for row in rows] == list(range(5))
    for number, row in enumerate(rows):
        upper, lower = (40 + (first - 40) * (1 - (number + part) / 5) ** 3 for part in (0, 1))
        assert lower - 12 <= row.kept <= upper + 1, "deletions stay within their round"
        assert row.deleted > 0 or row.kept <= 40
    assert len(small.history) == 13 and small.history[-1]["epoch"] == 3.0
    after = bits(start)
    assert all(torch.equal(before[n], after[n]) for n in before), "the input was changed"
    assert start.model.family.prior_scales == scales


def test_the_fixed_point_gives_no_weights_to_inputs_without_effect(
    start: Posterior, data: tuple[Tensor, Tensor]
) -> None:
    rows: list[WeightCount] = []
    small = sparsify(start, data, rounds=12, epochs=8, on_round=rows.append, **SETTINGS)
    assert origin(small, "input") == [2, 5]
    assert len(rows) < 12, "it stops where nothing more leaves"
    assert prune_weights(small.copy()) == 0
    assert count_weights(small)[0] < 0.4 * count_weights(start)[0]
    with torch.no_grad():
        error = (small.to_module()(data[0]) - data[1]).square().mean()
    assert float(error) < 0.01 * float(data[1].var()) + 0.01
    assert float(error) > 0.0


@pytest.mark.parametrize("support_weight", [0.0, 0.5])
def test_a_killed_run_resumes_to_the_same_bits(
    start: Posterior, data: tuple[Tensor, Tensor], tmp_path: Path, support_weight: float
) -> None:
    class Kill(Exception):
        pass

    def run(folder: Path | None, **more: Any) -> Posterior:
        return sparsify(
            start, data, keep=24, rounds=3, epochs=2, settle_epochs=2, support_weight=support_weight,
            checkpoint=folder, **SETTINGS, **more,
        )  # fmt: skip

    whole = run(None)
    for stop in (1, 2, 3, 6, 7):
        count = [0]

        def die(_: dict[str, float], count: list[int] = count, stop: int = stop) -> None:
            count[0] += 1
            if count[0] == stop:
                raise Kill

        with pytest.raises(Kill):
            run(tmp_path / str(stop), on_epoch=die)
        torch.rand(stop)  # what happened in between does not matter
        resumed = run(tmp_path / str(stop))
        expected, got = bits(whole), bits(resumed)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[n], got[n]) for n in expected), stop
        assert resumed.history == whole.history
        assert resumed.model.family.prior_scales == whole.model.family.prior_scales


@pytest.mark.parametrize("other", [{"keep": 20}, {"support_weight": 0.4}])
def test_a_folder_of_a_run_with_other_settings_is_not_resumed_from(
    start: Posterior, data: tuple[Tensor, Tensor], tmp_path: Path, other: dict[str, Any]
) -> None:
    def run(folder: Path | None, keep: int = 30, support_weight: float = 0.0) -> Posterior:
        return sparsify(
            start, data, keep=keep, rounds=2, epochs=1, support_weight=support_weight, checkpoint=folder, **SETTINGS
        )

    run(tmp_path)
    fresh, beside = bits(run(None, **other)), bits(run(tmp_path, **other))
    assert all(torch.equal(fresh[n], beside[n]) for n in fresh)


@pytest.mark.parametrize("keep", [300, None])
def test_a_prior_on_supports_makes_masks_cheaper(keep: int | None) -> None:
    """Rows that see a patch of an image, under noise that leaves weights anywhere."""
    with seeded(0):
        x = torch.randn(500, 144)
        patches = torch.zeros(12, 12, 12)
        for unit in range(12):
            i, j = 2 * (unit // 4), 2 * (unit % 4)
            patches[unit, i : i + 4, j : j + 4] = 0.4
        y = x @ patches.flatten(1).T + 0.8 * torch.randn(500, 12)
        net = nn.Sequential(nn.Linear(144, 12))
    model = lift(net, "group_normal_jeffreys", "normal", x[:2])
    posterior = fit(model, (x, y), epochs=40, **SETTINGS).restricted({"input": np.arange(1, 144)})
    bits_of_mask, error = {}, {}
    for weight in (0.0, 1.0):
        small = sparsify(
            fold_scales(posterior), (x, y), keep=keep, rounds=3, epochs=3, support_weight=weight, **SETTINGS
        )
        assert keep is None or count_weights(small)[0] <= keep
        net = small.to_module()
        bits_of_mask[weight] = encode(net, bits=4)[1].parts["masks"]
        error[weight] = float((net.requires_grad_(False)(x) - x @ patches.flatten(1).T).square().mean())
    assert bits_of_mask[1.0] < 0.9 * bits_of_mask[0.0]
    assert error[1.0] < error[0.0], "what is there lies in patches, and so the prior is right"


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_no_prior_has_are_refused(start: Posterior, data: tuple[Tensor, Tensor], weight: float) -> None:
    with pytest.raises(ConfigError, match="support_weight: got .*allowed: 0, or a positive number"):
        sparsify(start, data, keep=30, support_weight=weight, **SETTINGS)


def test_nothing_is_done_where_enough_have_left(start: Posterior, data: tuple[Tensor, Tensor]) -> None:
    rows: list[WeightCount] = []
    small = sparsify(start, data, keep=10_000, rounds=2, epochs=1, on_round=rows.append, **SETTINGS)
    assert count_weights(small) == count_weights(start)
    assert [row.deleted for row in rows] == [0, 0]
