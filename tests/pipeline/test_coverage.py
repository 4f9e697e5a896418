"""k-hat of the guide's ratio, where the answer is known, and of reduced posteriors, by hand."""

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from pyro.distributions import Delta
from torch import nn

from pyrobc.batches import seeded
from pyrobc.candidates import keep_all_but
from pyrobc.coverage import draw_log_ratios, log_ratio, ratio_khat
from pyrobc.evidence import evidence
from pyrobc.family import make_family
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.objective import fast_loss


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
        assert ratio_khat(draw_log_ratios(posterior, x, y, kept, num_draws=60)) == pytest.approx(expected, rel=1e-4)
    assert found.candidates[0].cover_khat == found.posterior_khat
    assert torch.isfinite(torch.tensor([c.cover_khat for c in found.candidates])).all()


@pytest.mark.parametrize("family", ["log_uniform", "group_horseshoe"])
def test_the_gain_is_that_of_the_cut_networks_own_objective(compressed, family: str) -> None:
    """Draws of ln r against the loss that ``fit`` descends, whose divergence is in closed form."""
    x, y = compressed.data
    if family == "log_uniform":
        posterior = compressed.posterior
    else:
        net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 2))
        model = lift(net, make_family(family), "categorical", x[:1])
        posterior = fit(model, (x, y), epochs=8, lr=2e-2, batch_size=100, progress=False)
    spec = posterior.model.spec
    kept = {b.name: np.arange(0, b.size, 2) for b in spec.blocks}
    full, cut = (draw_log_ratios(posterior, x, y, part, num_draws=400) for part in (spec.everything(), kept))
    elbos, errors = [], []
    for one in (posterior, posterior.restricted(kept)):
        loss = fast_loss(one.model, one.guide, one.num_data)
        with torch.no_grad(), seeded(1):
            draws = np.array([-float(loss(x, y, 1.0)) for _ in range(400)])
        priors = one.model.priors()
        points = [s for s, law in one.laws().items() if isinstance(law, Delta)]
        elbos.append(draws.mean() - sum(float(priors[s].log_prob(priors[s].mode).sum()) for s in points))
        errors.append(draws.std() / 20)
    change = cut - full
    error = np.sqrt(change.var() / 400 + np.square(errors).sum())
    assert change.mean() == pytest.approx(elbos[1] - elbos[0], abs=4 * error)
    assert error < 0.1 * abs(change.mean()), "so that the comparison says something"


def test_candidates_tell_what_the_reduction_does_to_the_elbo(compressed) -> None:
    posterior, found = compressed.posterior, compressed.evidence
    x, y = compressed.data
    full = draw_log_ratios(posterior, x, y, compressed.score.spec.everything(), num_draws=60)
    for candidate in found.candidates:
        kept = keep_all_but(compressed.score.spec, found.order[: candidate.num_removed])
        change = draw_log_ratios(posterior, x, y, kept, num_draws=60) - full
        assert candidate.elbo_gain == pytest.approx(change.mean(), rel=1e-4, abs=1e-3)
        assert candidate.elbo_gain_se == pytest.approx(change.std(ddof=1) / np.sqrt(60), rel=1e-3, abs=1e-4)
    assert found.candidates[0].elbo_gain == found.candidates[0].elbo_gain_se == 0.0
    held_out = evidence(posterior, compressed.score, (x, y), is_training_data=False, num_draws=25, num_candidates=2)
    assert all(np.isnan([c.elbo_gain, c.elbo_gain_se]).all() for c in held_out.candidates)
