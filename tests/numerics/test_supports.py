"""The prior on supports: features by loops, weights by another optimiser, what it says about planted masks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from pyrobc import supports
from pyrobc.codec import find_geometries
from pyrobc.codec.geometry import Geometry
from pyrobc.folding import fold_scales
from pyrobc.lift import lift
from pyrobc.meanfield import NormalFactor
from pyrobc.posterior import Posterior
from pyrobc.slicing import SelectLinear
from pyrobc.supports import find_planes, price_supports, score_support


def image(columns: int, width: int, height: int, seed: int = 0) -> Geometry:
    """Some pixels of an image."""
    positions = np.sort(np.random.default_rng(seed).permutation(width * height)[:columns])
    return Geometry("image", positions, int(positions[-1]) + 1, width)


def kernels(blocks: int, side: int) -> Geometry:
    return Geometry("kernel", np.arange(blocks * side * side), side * side, side)


def blobs(rows: int, geometry: Geometry, seed: int) -> Tensor:
    """Of each row, entries around a point."""
    generator = np.random.default_rng(seed)
    block, point = np.divmod(geometry.positions, geometry.size)
    y, x = np.divmod(point, geometry.width)
    mask = np.zeros((rows, len(block)), dtype=bool)
    for r in range(rows):
        i = generator.integers(len(block))
        near = (block == block[i]) & ((y - y[i]) ** 2 + (x - x[i]) ** 2 <= 4)
        mask[r] = near & (generator.random(len(block)) < 0.8)
    return torch.from_numpy(mask | (generator.random(mask.shape) < 0.01))


def list_features(mask: np.ndarray, geometry: Geometry | None) -> np.ndarray:
    """The features of the docstring, entry by entry."""
    rows, columns = mask.shape
    p = mask.mean()

    def compare(n: float, m: float, s: float) -> float:
        return math.log((n + s * p) / (m - n + s * (1 - p))) - math.log(p / (1 - p))

    s = 3 / min(p, 0.5)
    found = []
    for r in range(rows):
        for c in range(columns):
            x = [1.0, compare(mask[r].sum() - mask[r, c], columns - 1, s)]
            x.append(compare(mask[:, c].sum() - mask[r, c], rows - 1, s))
            if geometry is not None:
                block, point = np.divmod(geometry.positions, geometry.size)
                u, v = np.divmod(point, geometry.width)
                d = np.where(block == block[c], np.hypot(u - u[c], v - v[c]), np.inf)
                kernel = np.where((d > 0) & (d <= 5), np.exp(-d / 2), 0.0)
                x.append(compare(kernel @ mask[r], kernel.sum(), 1.0))
                x += [(mask[r] & (near := np.isclose(d, e))).sum() - p * near.sum() for e in (1.0, math.sqrt(2.0))]
            found.append(x)
    return np.array(found)


CASES = {
    "image": (lambda: blobs(12, image(40, 8, 7), 1), image(40, 8, 7)),
    "kernels": (lambda: blobs(9, kernels(3, 4), 2), kernels(3, 4)),
    "no plane": (lambda: torch.rand(10, 20, generator=torch.Generator().manual_seed(3)) < 0.3, None),
    "dense": (lambda: torch.rand(10, 20, generator=torch.Generator().manual_seed(4)) < 0.8, None),
}


@pytest.mark.parametrize("case", CASES)
def test_odds_are_those_of_the_largest_pseudo_likelihood(case: str) -> None:
    build, geometry = CASES[case]
    mask = build()
    x, y = list_features(mask.numpy(), geometry), mask.numpy().ravel()

    def loss(w: np.ndarray) -> float:
        odds = x @ w
        return float(np.logaddexp(0, odds).sum() - odds[y].sum() + 0.5e-2 * w @ w)

    w = scipy.optimize.minimize(loss, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-7}).x
    assert np.abs(w[1:]).max() > 0.05, "there is something to learn"
    assert np.allclose(score_support(mask, geometry).numpy().ravel(), x @ w, atol=1e-3)


def test_rows_in_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = image(60, 10, 10)
    mask = blobs(30, geometry, 5)
    whole = score_support(mask, geometry)
    monkeypatch.setattr(supports, "_CHUNK", 130)
    assert torch.allclose(score_support(mask, geometry), whole, atol=1e-9)


def test_a_weight_amid_others_is_likelier_there_than_one_alone() -> None:
    geometry = image(100, 10, 10)
    mask = blobs(40, geometry, 6)
    mask[0] = False
    mask[0, [44, 45, 54, 64, 9]] = True
    odds = score_support(mask, geometry)[0]
    assert odds[55] > odds[9] + 1.0 and odds[55] > odds[90] + 1.0, "an empty place amid weights, and places alone"


def test_where_weights_are_anywhere_the_odds_are_those_of_their_share() -> None:
    mask = torch.rand(300, 100, generator=torch.Generator().manual_seed(7)) < 0.2
    odds = score_support(mask, image(100, 10, 10))
    assert float((odds - math.log(0.25)).abs().mean()) < 0.15


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
def test_masks_without_two_kinds_of_entries_teach_nothing(fill: Callable[..., Tensor]) -> None:
    assert not score_support(fill(4, 5, dtype=torch.bool)).any()


def masked_posterior(dtype: torch.dtype = torch.float32) -> Posterior:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5)).to(dtype)
        model = lift(net, "group_normal_jeffreys", "categorical", torch.zeros(1, 2, 6, 6, dtype=dtype))
        posterior = fold_scales(Posterior(model, model.new_guide(), num_data=10))
        for factor in posterior.guide.by_site().values():
            if isinstance(factor, NormalFactor):
                factor.keep_(torch.rand(factor.kept.shape) < 0.4)
    return posterior


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_are_priced_as_the_file_holds_them(dtype: torch.dtype) -> None:
    posterior = masked_posterior(dtype)
    planes = find_planes(posterior)
    assert (planes["0.weight"].size, planes["3.weight"].size, planes["3.weight"].width) == (9, 16, 4)
    priced = price_supports(posterior, planes, 0.5)
    factors = posterior.guide.by_site()
    for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
        factor = factors[name]
        assert isinstance(factor, NormalFactor)
        assert priced[name].shape == factor.kept.shape and priced[name].dtype == torch.float64
        assert bool(priced[name].isfinite().all())
    kept = factors["0.weight"].kept  # type: ignore[union-attr]
    expected = -0.5 * score_support(kept.flatten(1), planes["0.weight"])
    assert torch.equal(priced["0.weight"].flatten(1), expected)


def test_a_network_that_no_file_holds_has_no_planes() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Twice(3, 2))
    model = lift(net, "group_normal_jeffreys", "categorical", torch.zeros(1, 4))
    posterior = fold_scales(Posterior(model, model.new_guide(), num_data=10))
    assert find_planes(posterior) == {}
    assert set(price_supports(posterior, {})) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_geometries_of_a_selected_image() -> None:
    first = SelectLinear(nn.Linear(30, 8), torch.arange(3, 63, 2))
    found = find_geometries(nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3)))
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert found["0.bias"].kind == "vector"
