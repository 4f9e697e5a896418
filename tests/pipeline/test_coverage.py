"""k-hat of the guide's ratio, where the answer is known, and of reduced posteriors, by hand."""

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

from pyrobc.candidates import keep_all_but
from pyrobc.coverage import log_ratio, measure_coverage, ratio_khat


def log_ratios_of_normals(draws: np.ndarray, scale: float, wide: float) -> np.ndarray:
    """ln N(0, wide^2) - ln N(0, scale^2) at draws of the latter, up to a constant."""
    return 0.5 * draws**2 * (1 / scale**2 - 1 / wide**2)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_two_normals_have_the_known_shape(share: float) -> None:
    """Pr(r > t) falls as t^(-1/k) with k = 1 - share, share the ratio of the variances, up to a power of ln t."""
    draws = np.random.default_rng(0).normal(size=100_000)
    found = ratio_khat(log_ratios_of_normals(draws, 1.0, share**-0.5))
    assert found == pytest.approx(1 - share, abs=0.12)


def test_a_reduction_leaves_the_cover_of_what_stays() -> None:
    """One multiplier is covered badly; restricted to its centre its ratio is bounded, and what stays decides."""
    generator = np.random.default_rng(1)
    bad, good = generator.normal(size=(2, 200_000))
    ratios = log_ratios_of_normals(bad, 1.0, 0.1**-0.5) + log_ratios_of_normals(good, 1.0, 0.8**-0.5)
    assert ratio_khat(ratios) > 0.7
    is_inside = np.abs(bad) < 0.2  # draws of the reduced posterior: q restricted to the ROPE
    assert ratio_khat(ratios[is_inside]) == pytest.approx(
        ratio_khat(log_ratios_of_normals(good, 1.0, 0.8**-0.5)), abs=0.1
    )
    bounded = np.where(is_inside, 0.0, -np.inf)
    assert ratio_khat(bounded) == -1.0, "the weights of the change of prior itself"


def test_smoothing_agrees_with_arviz() -> None:
    """Which takes log likelihoods, minus the log ratios of leave-one-out."""
    generator = np.random.default_rng(2)
    for size in (100, 1000):
        ratios = generator.standard_t(3, size=size) * 2
        assert ratio_khat(ratios) == pytest.approx(float(array_stats.psislw(-ratios)[1]), abs=1e-6)


def test_what_tells_nothing_is_infinite() -> None:
    assert ratio_khat(np.random.default_rng(0).normal(size=24)) == np.inf
    assert np.isfinite(ratio_khat(np.random.default_rng(0).normal(size=25)))
    assert ratio_khat(np.full(60, 3.0)) == -1.0
    broken = np.random.default_rng(0).normal(size=60)
    for value in (np.nan, np.inf):
        broken[7] = value
        assert ratio_khat(broken) == np.inf
    broken[7] = -np.inf
    assert np.isfinite(ratio_khat(broken))


def test_candidates_tell_the_cover_of_their_posterior(compressed) -> None:
    """Draw by draw, on the rows of the evidence."""
    posterior, found = compressed.posterior, compressed.evidence
    x, y = compressed.data
    for candidate in found.candidates:
        kept = keep_all_but(compressed.score.spec, found.order[: candidate.num_removed])
        draws = [posterior.draw(s) for s in range(60)]
        fits = [float(posterior.log_likelihood(x, y, values, kept).double().sum()) for values in draws]
        expected = ratio_khat(log_ratio(posterior, draws, kept) + np.array(fits))
        assert candidate.cover_khat == pytest.approx(expected, rel=1e-4)
        assert measure_coverage(posterior, x, y, kept, num_draws=60) == pytest.approx(expected, rel=1e-4)
    assert found.candidates[0].cover_khat == found.posterior_khat
    assert torch.isfinite(torch.tensor([c.cover_khat for c in found.candidates])).all()
