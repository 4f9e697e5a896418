"""Predictive densities against direct sums over draws, and the shape of what users get."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pyrobc.batches import TensorLoader
from pyrobc.errors import DataError
from pyrobc.evidence import _leave_one_out, evidence


def test_full_network_comes_first_and_sizes_fall(compressed):
    candidates = compressed.evidence.candidates
    assert candidates[0].num_removed == 0
    assert candidates[0].diff == 0 and candidates[0].diff_se == 0
    assert candidates[0].parameters == compressed.plan.parameters[0]
    sizes = [c.parameters for c in candidates]
    assert sizes == sorted(sizes, reverse=True)
    wanted = sum((v > 0).sum() for v in compressed.score.log_odds().values())
    assert wanted in [c.num_removed for c in candidates]


def test_leaving_needed_groups_out_is_seen(compressed):
    """The last candidate goes beyond the score's own choice."""
    last = compressed.evidence.candidates[-1]
    assert last.num_removed > sum((v > 0).sum() for v in compressed.score.log_odds().values())
    assert last.diff < -2 * last.diff_se < 0


def test_order_is_that_of_the_log_odds(compressed):
    flat = np.concatenate([compressed.score.log_odds()[b.name] for b in compressed.score.spec.blocks])
    assert (np.diff(flat[compressed.evidence.order]) <= 0).all()


def test_held_out_density_is_the_mean_over_draws(compressed):
    x, y = (part[:50] for part in compressed.data)
    checked = evidence(
        compressed.posterior, compressed.score, (x, y), is_training_data=False, num_draws=40, num_candidates=2, seed=5
    )
    log_lik = checked.tree["log_likelihood"]["y"].values[0]
    assert log_lik.shape == (40, 50)
    elpd_i = logsumexp(log_lik, axis=0) - np.log(40)
    assert checked.candidates[0].elpd == pytest.approx(elpd_i.sum(), rel=1e-12)
    assert checked.candidates[0].se == pytest.approx(np.sqrt(50 * elpd_i.var()), rel=1e-12)
    assert "held-out" in checked.method


def test_log_likelihood_is_that_of_the_drawn_networks(compressed):
    """Rebuilt by hand from one draw: gates on the columns, then an ordinary forward pass."""
    x, y = compressed.data
    posterior, spec = compressed.posterior, compressed.score.spec
    draw = posterior.draw(0)
    effective = posterior.model.family.combine(draw, spec)
    h = x
    for layer, block in (("0", "input"), ("2", "0"), ("4", "2")):
        weight = effective.parameters[f"{layer}.weight"] * effective.gates[block]
        h = h @ weight.T + effective.parameters[f"{layer}.bias"]
        h = h.relu() if layer != "4" else h
    expected = -torch.nn.functional.cross_entropy(h, y, reduction="none")
    got = compressed.evidence.tree["log_likelihood"]["y"].values[0, 0]
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)


def test_leave_one_out_is_close_to_its_raw_form(compressed):
    """Without correction for q, elpd_i = -ln mean 1/p(y_i|theta); smoothing moves it by little where k-hat is good."""
    log_lik = compressed.evidence.tree["log_likelihood"]["y"].values[0]
    raw = -(logsumexp(-log_lik, axis=0) - np.log(len(log_lik))).sum()
    assert compressed.evidence.posterior_khat > compressed.evidence.good_k, "else q was corrected for"
    assert compressed.evidence.candidates[0].elpd == pytest.approx(raw, rel=0.05)


def test_rows_that_every_draw_predicts_with_certainty():
    """The published smoothing refuses tails of ties; the plain ratio estimate needs none and is exact there."""
    generator = np.random.default_rng(0)
    log_lik = np.log(generator.uniform(0.3, 0.9, (80, 4)))
    log_lik[:, 1] = 0.0
    log_lik[:, 2] = np.where(np.arange(80) < 40, -0.5, -0.1)
    elpd_i, khat = _leave_one_out(log_lik, np.zeros(80))
    assert elpd_i[1] == pytest.approx(0.0, abs=1e-14)
    assert elpd_i[2] == pytest.approx(-np.log(np.mean(np.exp(-log_lik[:, 2]))), abs=1e-12)
    assert list(khat[1:3]) == [-np.inf, -np.inf]
    assert np.isfinite(khat[[0, 3]]).all() and (elpd_i[[0, 3]] < 0).all()
    only_certain, _ = _leave_one_out(np.zeros((80, 2)), np.zeros(80))
    np.testing.assert_allclose(only_certain, 0.0, atol=1e-14)


def test_tree_holds_labelled_draws(compressed):
    tree = compressed.evidence.tree
    draws = tree["posterior"]["multiplier"]
    assert draws.dims == ("chain", "draw", "group")
    assert list(draws["group"].values) == compressed.score.spec.labels()
    assert not np.array_equal(tree["reduced"]["y"].values, tree["log_likelihood"]["y"].values)
    assert len(compressed.evidence.to_frame()) == len(compressed.evidence.candidates)


def test_installed_arviz_understands_it(compressed):
    arviz = pytest.importorskip("arviz")
    summary = arviz.summary(compressed.evidence.to_arviz(), var_names=["multiplier"], kind="stats")
    assert len(summary) == compressed.score.spec.num_groups


def test_shuffled_rows_are_the_same_rows_again(compressed):
    """A loader that shuffles from the global generator: repeated exactly, and that generator untouched."""
    loader = TensorLoader(*compressed.data, batch_size=32)
    before = torch.random.get_rng_state()
    first, again = (
        evidence(compressed.posterior, compressed.score, loader, num_draws=30, num_candidates=2, max_rows=64)
        for _ in range(2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.candidates == again.candidates
    assert first.tree["observed_data"].to_dataset().equals(again.tree["observed_data"].to_dataset())


def test_no_rows_are_refused(compressed):
    with pytest.raises(DataError):
        evidence(compressed.posterior, compressed.score, [])
