"""Log odds against the posterior's own mass, the learned rate against its equation, and what is refused."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import digamma, expit, logit

from pyrobc.errors import ReductionError
from pyrobc.scores import score


def test_implied_log_odds_are_the_posterior_odds(compressed):
    """L = ln Q/(1-Q) for the mass Q below the threshold, integrated from the density on the log axis."""
    log_odds = compressed.score.log_odds()
    for name, scale in compressed.posterior.scales().items():
        for i in range(0, len(log_odds[name]), 3):
            threshold = compressed.score.threshold[name][i]

            def density(u, i=i, scale=scale):
                z = torch.full(scale.posterior.batch_shape, u, dtype=torch.float64).exp()
                return float((scale.posterior.log_prob(z) + u)[i].exp())

            spread = np.linspace(-20.0, np.log(threshold), 9)  # the prior starts at exp(-20)
            inside = sum(
                quad(density, a, b, epsabs=1e-13, limit=200)[0] for a, b in zip(spread, spread[1:], strict=False)
            )
            if 1e-8 < inside < 1 - 1e-8:
                assert log_odds[name][i] == pytest.approx(logit(inside), abs=1e-4)
            else:
                assert abs(log_odds[name][i]) > 10


def test_prior_probability_shifts_the_odds(compressed):
    half, tenth = compressed.score.log_odds(0.5), compressed.score.log_odds(0.1)
    for name in half:
        np.testing.assert_allclose(tenth[name] - half[name], np.log(1 / 9), rtol=1e-12)
        expected = compressed.score.delta_f[name] - compressed.score.complement[name]
        np.testing.assert_allclose(half[name], expected)


def test_learned_odds_solve_their_equation(mlp_spec, by_hand):
    """E ln pi/(1-pi) under Beta(1 + pruned, 1 + kept), where pruned is expected under those same odds."""
    odds = {"input": [9.0, -9, -9, -9, 0, 1], "0": np.full(10, -40.0), "2": np.full(5, np.nan)}
    learned = by_hand(mlp_spec, odds).log_odds("learned")
    shift = learned["input"] - odds["input"]
    pruned = expit(learned["input"]).sum()
    np.testing.assert_allclose(shift, digamma(1 + pruned) - digamma(1 + 6 - pruned), atol=1e-9)
    np.testing.assert_allclose(learned["0"] + 40, digamma(1) - digamma(11), atol=1e-9)
    assert np.isnan(learned["2"]).all()


@pytest.mark.parametrize("odds", [0.0, 1.0, -0.5, float("nan")])
def test_impossible_prior_probability_is_refused(compressed, odds):
    with pytest.raises(ReductionError, match="prior odds: got"):
        compressed.score.log_odds(odds)


def test_unknown_reduction_names_the_nearest(compressed):
    with pytest.raises(ReductionError, match="did you mean 'rope'"):
        score(compressed.posterior, "rop")


def test_point_has_no_implied_odds(compressed):
    point = score(compressed.posterior, "spike")
    with pytest.raises(ReductionError, match="learned"):
        point.log_odds("implied")
    assert all(np.isfinite(v).all() for v in point.log_odds("learned").values())
    assert len(point.to_frame()) == compressed.score.spec.num_groups


def test_inputs_that_matter_score_lowest(compressed):
    """The labels were made from inputs 0 and 1 alone."""
    log_odds = compressed.score.log_odds()["input"]
    assert max(log_odds[:2]) < min(log_odds[2:])


def test_table_has_a_row_per_group(compressed):
    frame = compressed.score.to_frame()
    assert list(frame.index) == compressed.score.spec.labels()
    assert frame.loc["input[1]", "delta_f"] == compressed.score.delta_f["input"][1]


def test_scoring_repeats_itself_and_leaves_random_state_alone(compressed):
    before = torch.random.get_rng_state()
    again = score(compressed.posterior)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, values in compressed.score.delta_f.items():
        np.testing.assert_array_equal(again.delta_f[name], values)


def test_larger_epsilon_never_raises_the_number_kept(compressed):
    kept = [
        sum((v < 0).sum() for v in score(compressed.posterior, epsilon=e).log_odds().values())
        for e in (1e-4, 1e-3, 1e-2, 1e-1)
    ]
    assert kept == sorted(kept, reverse=True)


def test_learned_odds_count_groups_that_must_stay(mlp_spec, by_hand):
    """Ninety needed groups say that most are needed, whether their price is large or infinite."""
    from pyrobc.scores import _learn_log_odds

    some = np.full(10, 0.3)
    finite = _learn_log_odds(np.concatenate([np.full(90, -1e4), some]))
    assert _learn_log_odds(np.concatenate([np.full(90, -np.inf), some])) == pytest.approx(finite)
    assert finite < -3
    assert _learn_log_odds(np.full(4, np.nan)) == 0.0
