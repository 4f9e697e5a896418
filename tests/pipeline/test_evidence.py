"""Predictive densities against direct sums over draws, and the shape of what users get."""

import dataclasses
import sys
import warnings

import arviz_base
import arviz_stats
import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

from pyrobc.arviz_io import diagnose_chains
from pyrobc.batches import TensorLoader
from pyrobc.candidates import compare_candidate, keep_all_but
from pyrobc.compress import compress
from pyrobc.decide import decide
from pyrobc.decision_rows import DecisionRows, estimate_total, take_rows
from pyrobc.errors import ConfigError, DataError, MissingExtraError
from pyrobc.evidence import evidence
from pyrobc.fit import fit
from pyrobc.leave_one_out import leave_one_out
from pyrobc.rules import HighestDensity
from pyrobc.scores import score


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


@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("num_draws", [100, 400])
def test_leave_one_out_is_that_of_arviz(num_draws, spread):
    """Row by row, with and without a correction for q."""
    generator = np.random.default_rng(4)
    log_lik = -np.exp(generator.normal(0, 1, (num_draws, 7))) * np.array([0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
    ratio = spread * generator.normal(size=num_draws)
    elpd_i, khat = leave_one_out(log_lik, ratio)
    tree = arviz_base.from_dict({"posterior": {"_": ratio[None]}, "log_likelihood": {"y": log_lik[None]}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # high k-hats
        loo = arviz_stats.loo_approximate_posterior(tree, ratio, np.zeros(num_draws), pointwise=True, var_name="y")
    np.testing.assert_allclose(elpd_i, loo.elpd_i.values.ravel(), rtol=1e-9)
    np.testing.assert_allclose(khat, loo.pareto_k.values.ravel(), atol=1e-6)


def test_rows_that_every_draw_predicts_with_certainty():
    """A tail of ties cannot be smoothed; the plain ratio estimate needs no smoothing and is exact there."""
    generator = np.random.default_rng(0)
    log_lik = np.log(generator.uniform(0.3, 0.9, (80, 4)))
    log_lik[:, 1] = 0.0
    log_lik[:, 2] = np.where(np.arange(80) < 40, -0.5, -0.1)
    elpd_i, khat = leave_one_out(log_lik, np.zeros(80))
    assert elpd_i[1] == pytest.approx(0.0, abs=1e-14)
    assert elpd_i[2] == pytest.approx(-np.log(np.mean(np.exp(-log_lik[:, 2]))), abs=1e-12)
    assert list(khat[1:3]) == [-1.0, -1.0]
    assert np.isfinite(khat[[0, 3]]).all() and (elpd_i[[0, 3]] < 0).all()
    only_certain, _ = leave_one_out(np.zeros((80, 2)), np.zeros(80))
    np.testing.assert_allclose(only_certain, 0.0, atol=1e-14)


def test_gain_is_over_a_predictor_without_inputs(compressed):
    """Leave-one-out of the network row by row, less that of label frequencies."""
    log_lik, y = compressed.evidence.tree["log_likelihood"]["y"].values[0], compressed.data[1].numpy()
    elpd_i, _ = leave_one_out(log_lik, np.zeros(len(log_lik)))
    gap = elpd_i - np.log((np.bincount(y)[y] - 0.5) / len(y))
    assert compressed.evidence.gain == pytest.approx(gap.sum(), rel=1e-6)
    assert compressed.evidence.gain_se == pytest.approx(np.sqrt(300) * gap.std(), rel=1e-6)
    assert compressed.evidence.gain > 10 * compressed.evidence.gain_se
    assert not any("worthless" in note for note in compressed.plan.notes)


def test_labels_in_random_order_are_worthless_and_said():
    """Nothing can be learnt: little is left, and the plan says that the fit is worth nothing."""
    x, y = torch.randn(200, 6), torch.randint(0, 2, (200,))
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))
    result = compress(
        net, (x, y), family_args={"gate_lr": 3.0}, epochs=60, lr=5e-2, readapt_epochs=0, num_draws=50, progress=False
    )
    assert abs(result.evidence.gain) < 2 * result.evidence.gain_se + 5
    assert any(note.startswith("the fit is worthless: its ELPD is") for note in result.plan.notes)
    assert result.plan.parameters[1] < result.plan.parameters[0] / 2


def test_tree_holds_labelled_draws(compressed):
    tree = compressed.evidence.tree
    draws = tree["posterior"]["multiplier"]
    assert draws.dims == ("chain", "draw", "group")
    assert list(draws["group"].values) == compressed.score.spec.labels()
    assert not np.array_equal(tree["reduced"]["y"].values, tree["log_likelihood"]["y"].values)
    assert len(compressed.evidence.to_frame()) == len(compressed.evidence.candidates)


@pytest.fixture(scope="module")
def several(compressed):
    """Three fits from other seeds, of which the first decides."""
    x, y = compressed.data
    others = []
    for seed in (1, 2):
        twin = compressed.posterior.copy()
        others.append(
            fit(twin.model, (x, y), epochs=2, lr=1e-3, batch_size=100, seed=seed, guide=twin.guide, progress=False)
        )
    return evidence(compressed.posterior, compressed.score, (x, y), num_draws=40, num_candidates=2, others=others)


def test_chains_are_seeds(several, compressed):
    """R-hat and ESS of every group across fits, as ArviZ gives them on the tree; candidates are the first fit's."""
    bmr = several.tree["bmr"]
    assert several.tree["posterior"]["multiplier"].shape == (3, 40, 21)
    assert several.tree["log_likelihood"]["y"].shape == (3, 40, 300)
    expected = arviz_stats.rhat(several.tree["posterior"].to_dataset())["multiplier"].values
    np.testing.assert_allclose(bmr["rhat"], expected, rtol=1e-6)
    assert (bmr["ess"].values[bmr["rhat"].values < 1.05] > 20).all()
    assert several.tree["reduced"]["y"].shape == (1, 40, 300)
    assert "rhat" not in compressed.evidence.tree["bmr"]


def test_readapted_candidates_are_refitted_networks(compressed):
    """Cut, fitted on and evaluated by hand."""
    settings = {"data": compressed.data, "epochs": 2, "lr": 2e-2, "batch_size": 100}
    checked = evidence(
        compressed.posterior, compressed.score, compressed.data, is_training_data=False, num_draws=25, num_candidates=1,
        readapt=settings,
    )  # fmt: skip
    last = checked.candidates[-1]
    kept = keep_all_but(compressed.score.spec, checked.order[: last.num_removed])
    small = compressed.posterior.restricted(kept)
    small = fit(small.model, **settings, guide=small.guide, progress=False)
    everything = small.model.spec.everything()
    log_lik = torch.stack([small.log_likelihood(*compressed.data, small.draw(s), everything) for s in range(25)])
    elpd_i = logsumexp(log_lik.double().numpy(), axis=0) - np.log(25)
    assert last.elpd == pytest.approx(elpd_i.sum(), rel=1e-6)
    assert np.isfinite(checked.candidates[0].elpd) and last.elpd != checked.candidates[0].elpd


@pytest.mark.parametrize("network", ["full", "reduced"])
def test_installed_arviz_understands_it(several, network):
    arviz = pytest.importorskip("arviz")
    data = several.to_arviz(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # high k-hats, which is what some rows have
        loo = arviz.loo(data)
    elpd = float(getattr(loo, "elpd", getattr(loo, "elpd_loo", np.nan)))
    log_lik = (several.tree["log_likelihood"] if network == "full" else several.tree["reduced"])["y"].values
    raw = -(logsumexp(-log_lik, axis=(0, 1)) - np.log(log_lik.shape[0] * log_lik.shape[1])).sum()
    assert elpd == pytest.approx(raw, rel=0.1)
    summary = arviz.summary(data, var_names=["multiplier"], kind="stats")
    assert len(summary) == 21


def test_installed_arviz_compares_and_plots(several):
    arviz = pytest.importorskip("arviz")
    networks = {"full": several.to_arviz(), "reduced": several.to_arviz("reduced")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's own
        table = arviz.compare(networks)
        arviz.plot_forest(networks["full"], var_names=["multiplier"])
    assert set(table.index) == {"full", "reduced"}
    import matplotlib.pyplot as plt

    plt.close("all")


def test_prior_and_predictions_have_their_laws(several, compressed):
    """Log-uniform gates: ln z is uniform on its support; labels are drawn as often as the network says."""
    log_prior = np.log(several.tree["prior"]["multiplier"].values)
    assert log_prior.shape == (1, 40, 21)
    assert log_prior.min() >= -20 and log_prior.max() <= 0
    assert log_prior.mean() == pytest.approx(-10, abs=4 * 20 / np.sqrt(12 * log_prior.size))
    predicted, observed = (several.tree[name]["y"].values for name in ("posterior_predictive", "observed_data"))
    is_right = predicted == observed
    expected = np.exp(several.tree["log_likelihood"]["y"].values)
    error = np.sqrt((expected * (1 - expected)).sum()) / expected.size
    assert is_right.mean() == pytest.approx(expected.mean(), abs=4 * error)


def test_khat_of_the_change_of_prior(compressed):
    """A ROPE's weights are bounded where draws reach it, and nothing is known from draws where none does."""
    bmr = compressed.evidence.tree["bmr"]
    needed = bmr["khat"].sel(group=["input[0]", "input[1]"]).values
    assert np.isposinf(needed).all()
    negligible = bmr["khat"].values[bmr["log_odds"].values > 2]
    assert len(negligible) and (negligible <= 0).all()


def test_missing_arviz_is_explained(compressed, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(MissingExtraError, match=r'pip install "pyrobc\[plots\]"'):
        compressed.evidence.to_arviz()
    with pytest.raises(ConfigError, match="allowed: 'full' or 'reduced'"):
        compressed.evidence.to_arviz("half")


def test_too_few_draws_and_other_networks_are_refused(compressed):
    for draws in (1, 24):
        with pytest.raises(DataError, match=f"got {draws}; allowed: 25 or more"):
            evidence(compressed.posterior, compressed.score, compressed.data, num_draws=draws)
    cut = compressed.posterior.restricted({"input": np.arange(2), "0": np.arange(3), "2": np.arange(2)})
    with pytest.raises(DataError, match="other fits: got another network"):
        evidence(compressed.posterior, compressed.score, compressed.data, others=[cut])
    with pytest.raises(DataError, match="got 1 of 1"):
        evidence(compressed.posterior, compressed.score, tuple(part[:1] for part in compressed.data))


def test_impossible_rows_are_explained(compressed):
    """Labels that the network gives no probability at all: weights of 1e30 leave none."""
    sure = compressed.posterior.copy()
    with torch.no_grad():
        for parameter in sure.guide.parameters():
            if parameter.dim() == 2:
                parameter.mul_(1e30)
    with pytest.raises(DataError, match="log likelihood of the full network: got -inf or NaN on"):
        evidence(sure, compressed.score, compressed.data, num_draws=25, num_candidates=1)


def test_reduced_network_that_holds_a_row_impossible_never_passes(compressed):
    log_lik = np.log(np.random.default_rng(0).uniform(0.3, 0.9, (60, 5)))
    log_lik[3, 1] = -np.inf
    elpd_i, khat = leave_one_out(log_lik, np.zeros(60))
    assert elpd_i[1] == -np.inf and khat[1] == np.inf and np.isfinite(np.delete(elpd_i, 1)).all()
    rows = DecisionRows(None, torch.zeros(5), np.arange(5), None)
    made = compare_candidate((10, 20), 3, (elpd_i, khat), np.zeros(5), 0.7, rows, (np.full(60, -np.inf), np.zeros(60)))
    assert made.elpd == made.diff == made.elbo_gain == -np.inf and np.isnan([made.se, made.elbo_gain_se]).all()
    whole = dataclasses.replace(compressed.evidence, candidates=(compressed.evidence.candidates[0], made))
    assert decide(compressed.score, whole).kept() == {"input": [*range(6)], "0": [*range(10)], "2": [*range(5)]}


def test_all_bad_khats_are_said(compressed):
    path = tuple(dataclasses.replace(c, khat_bad=1.0) for c in compressed.evidence.candidates)
    plan = decide(compressed.score, dataclasses.replace(compressed.evidence, candidates=path))
    assert "leave-one-out is unreliable: k-hat is high on 100% of the rows checked" in plan.notes


def test_constant_multipliers_have_no_rhat():
    draws = np.random.default_rng(0).normal(size=(2, 50, 3))
    draws[:, :, 1] = 1.0
    rhat, ess = diagnose_chains(draws)
    assert np.isnan([rhat[1], ess[1]]).all() and np.isfinite(rhat[[0, 2]]).all() and (ess[[0, 2]] > 10).all()


def test_many_rows_are_sampled(compressed):
    """Rows in an order that the front misses: a sample at random, and a total that is the whole data's."""
    x, y = compressed.data
    order = torch.argsort(y)
    taken = take_rows(compressed.posterior, (x[order], y[order]), 100, 3)
    assert 20 < int(taken.targets.sum()) < 80 and len(np.unique(taken.index)) == 100
    assert torch.equal(taken.inputs, x[order][taken.index]) and taken.surrogate.shape == (300,)
    everything = evidence(compressed.posterior, compressed.score, (x, y), num_draws=30, num_candidates=1)
    assert [c.subsampling_se for c in everything.candidates] == [0.0] * len(everything.candidates)
    some = evidence(
        compressed.posterior, compressed.score, (x[order], y[order]), num_draws=30, num_candidates=1, max_rows=100
    )
    for part, whole in zip(some.candidates, everything.candidates, strict=True):
        assert 0 < part.subsampling_se < part.se * 3
        assert part.elpd_all == pytest.approx(whole.elpd, abs=4 * part.subsampling_se + 0.5)
    assert taken.surrogate.sum() == pytest.approx(everything.candidates[0].elpd, rel=0.2)


def test_difference_estimator_is_unbiased_and_its_error_is_right():
    """Over all samples of 3 of 7 rows: mean and spread of the estimate, by enumeration."""
    from itertools import combinations

    generator = np.random.default_rng(1)
    surrogate, truth = generator.normal(size=7), generator.normal(size=7)
    found = [
        estimate_total(truth[list(s)], DecisionRows(None, torch.zeros(3), np.array(s), surrogate))
        for s in combinations(range(7), 3)
    ]
    totals, errors = np.array(found).T
    assert totals.mean() == pytest.approx(truth.sum(), rel=1e-12)
    assert (errors**2).mean() == pytest.approx(totals.var(), rel=1e-12)


def test_no_decision_reads_the_test_set():
    """Other test rows, and labels that contradict them: the same plan, and evidence from training rows only."""
    x = torch.randn(200, 4)
    y = (x[:, 0] > 0).long()
    plans, seen = [], []
    for test in ((x[150:], y[150:]), (torch.randn(40, 4) * 9, 1 - y[:40])):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        result = compress(net, (x[:150], y[:150]), test=test, epochs=3, readapt_epochs=1, num_draws=25, progress=False)
        plans.append(result.plan.to_json())
        seen.append(result.evidence.tree["observed_data"]["y"].values)
    assert plans[0] == plans[1]
    for labels in seen:
        assert len(labels) == 150 and labels.sum() == int(y[:150].sum())


def test_no_step_of_compress_but_the_last_reads_the_test_set():
    """Test rows whose every reading is noted, and the evidence's own rows: none before the table."""
    read = []

    class Noted(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            names, frame = [], sys._getframe(1)
            while frame is not None:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            read.append(names)
            return torch.zeros(4), 1

    x = torch.randn(100, 4)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    loader = torch.utils.data.DataLoader(Noted(), batch_size=20)
    compress(net, (x, (x[:, 0] > 0).long()), test=loader, epochs=2, readapt_epochs=1, num_draws=25, progress=False)
    assert read, "the table reads them"
    for names in read:
        assert not {"fit", "score", "evidence", "decide", "apply"} & set(names), names


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


@pytest.mark.parametrize("is_training_data", [True, False])
@pytest.mark.parametrize("data", [[], (torch.zeros(0, 6), torch.zeros(0).long())], ids=["list", "arrays"])
def test_no_rows_are_refused(compressed, data, is_training_data):
    with pytest.raises(DataError, match="; allowed: .*; fix: "):
        evidence(compressed.posterior, compressed.score, data, is_training_data=is_training_data)


def test_gates_that_do_not_vary_are_reported(compressed):
    """A guide whose gates are all but constant: no R-hat, no k-hat that is not a number, and a plan all the same."""
    fixed = compressed.posterior.copy()
    with torch.no_grad():
        for site, factor in fixed.guide.by_site().items():
            if site.endswith(".gate"):
                factor.log_scale.fill_(-20.0)
    scored = score(fixed)
    checked = evidence(fixed, scored, compressed.data, num_draws=30, num_candidates=2, others=[fixed])
    assert not np.isnan([checked.posterior_khat, *(c.cover_khat for c in checked.candidates)]).any()
    assert not np.isnan(checked.tree["bmr"]["khat"].values).any()
    plan = decide(scored, checked)
    assert {0, 1} <= set(plan.kept()["input"])
    HighestDensity().judge(scored, checked)
