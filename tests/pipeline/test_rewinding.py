"""What is left of a cut network goes back to its earlier place, and what has left stays away."""

import numpy as np
import pytest
import torch

from pyrobc.errors import GroupError
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.meanfield import NormalFactor
from pyrobc.models.mlp import build
from pyrobc.posterior import Posterior
from pyrobc.rewinding import rewind

KEPT = {"input": np.array([0, 2, 5]), "1": np.array([1, 4, 6, 7])}
AGAIN = {"input": np.array([0, 2]), "1": np.array([0, 3])}  # of what is left: 0 and 5, 1 and 7


def some_rows() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long()


@pytest.fixture(scope="module")
def early() -> Posterior:
    torch.manual_seed(0)
    model = lift(build(6, (9,), 2), "group_normal_jeffreys", "categorical", torch.randn(1, 6))
    return fit(model, some_rows(), epochs=1, lr=0.01, progress=False)


def test_kept_laws_are_the_early_ones_and_deleted_weights_stay_deleted(early: Posterior) -> None:
    before = {n: t.clone() for n, t in early.guide.state_dict().items()}
    later = early.copy()
    later = fit(later.model, some_rows(), epochs=5, lr=0.05, guide=later.guide, progress=False).restricted(KEPT)
    later = later.restricted(AGAIN)  # a second cut counts from the first
    weight = later.guide.by_site()["1.weight"]
    assert isinstance(weight, NormalFactor)
    gone = torch.tensor([[True, False], [False, True]])
    weight.keep_(~gone)
    back = rewind(later, early)
    wide = early.guide.by_site()["1.weight"].loc
    factor = back.guide.by_site()["1.weight"]
    assert isinstance(factor, NormalFactor)
    expected = wide[[1, 7]][:, [0, 5]].masked_fill(gone, 0.0)
    assert torch.equal(factor.loc, expected) and torch.equal(factor.kept, ~gone)
    assert torch.equal(back.guide.by_site()["3.bias"].loc, early.guide.by_site()["3.bias"].loc)
    assert not torch.equal(weight.loc, expected), "the later fit was elsewhere"
    assert all(torch.equal(t, before[n]) for n, t in early.guide.state_dict().items())
    again = fit(back.model, some_rows(), epochs=2, lr=0.01, guide=back.guide, progress=False)
    assert bool((again.guide.by_site()["1.weight"].loc[gone] == 0).all())


def test_nothing_cut_is_the_early_fit_itself(early: Posterior) -> None:
    later = early.copy()
    later = fit(later.model, some_rows(), epochs=2, lr=0.05, guide=later.guide, progress=False)
    back = rewind(later, early)
    x = some_rows()[0]
    torch.testing.assert_close(back.to_module()(x), early.to_module()(x), rtol=0, atol=0)


def test_what_is_no_part_of_the_early_network_is_refused(early: Posterior) -> None:
    small = early.restricted(KEPT)
    with pytest.raises(GroupError, match="not part of the early one"):
        rewind(early, small)
    other = lift(build(6, (9, 3), 2), "group_normal_jeffreys", "categorical", torch.randn(1, 6))
    with pytest.raises(GroupError, match="network to rewind"):
        rewind(Posterior(other, other.new_guide(), 1), early)
    points = lift(build(6, (9,), 2), "log_uniform", "categorical", torch.randn(1, 6))
    thinned = early.copy()
    factor = thinned.guide.by_site()["1.weight"]
    assert isinstance(factor, NormalFactor)
    factor.keep_(torch.rand_like(factor.loc) > 0.5)
    with pytest.raises(GroupError, match="points there"):
        rewind(thinned, Posterior(points, points.new_guide(), 1))
