"""Search over deletions: every price against an exact refit without the deleted columns."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrobc.bmr.averaging import average_models, compute_inclusion, weigh_models
from pyrobc.bmr.deletions import Deletions
from pyrobc.bmr.search import search_best_first, search_exhaustively, search_greedily, search_in_stages
from pyrobc.errors import ReductionError
from pyrobc.models.regression import LinearFit, fit_linear

GAMMA = dist.Gamma(*torch.tensor([2.0, 3.0], dtype=torch.float64))


def make_problem(
    seed: int, num_features: int, condition: float = 30.0
) -> tuple[torch.Tensor, torch.Tensor, dist.MultivariateNormal]:
    """Collinear predictors: singular values from 1 down to 1 / condition, a third of the weights zero."""
    rng = np.random.default_rng(seed)
    num_rows = 3 * num_features
    left, _ = np.linalg.qr(rng.normal(size=(num_rows, num_features)))
    right, _ = np.linalg.qr(rng.normal(size=(num_features, num_features)))
    singular = 5.0 * np.geomspace(1.0, 1.0 / condition, num_features)
    x = left @ np.diag(singular) @ right.T
    y = x @ (rng.normal(size=num_features) * (rng.random(num_features) > 0.3)) + 0.3 * rng.normal(size=num_rows)
    prior = dist.MultivariateNormal(
        torch.zeros(num_features, dtype=torch.float64),
        torch.diag(torch.tensor(rng.uniform(0.3, 3, num_features))),
    )
    return torch.tensor(x), torch.tensor(y), prior


def refit(
    x: torch.Tensor, y: torch.Tensor, prior: dist.MultivariateNormal, noise: float | dist.Gamma, kept: torch.Tensor
) -> LinearFit:
    reduced = dist.MultivariateNormal(prior.loc[kept], prior.covariance_matrix[kept][:, kept])
    return fit_linear(x[:, kept], y, reduced, noise)


def empty_evidence(y: torch.Tensor, noise: float | dist.Gamma) -> torch.Tensor:
    """Evidence with every column deleted: a column of zeros leaves the posterior at the prior."""
    one = dist.MultivariateNormal(torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    return fit_linear(torch.zeros(len(y), 1, dtype=torch.float64), y, one, noise).log_evidence


@pytest.mark.parametrize("noise", [0.3, GAMMA], ids=["known", "gamma"])
@given(seed=st.integers(0, 10_000), condition=st.floats(1, 1e6))
@settings(max_examples=12)
def test_every_subset_equals_the_refit(noise: float | dist.Gamma, seed: int, condition: float) -> None:
    x, y, prior = make_problem(seed, 5, condition)
    fit = fit_linear(x, y, prior, noise)
    deletions = Deletions(fit.weights, prior, noise=fit.noise)
    search = search_exhaustively(deletions)
    assert torch.equal(search.deleted.unique(dim=0).sum(0), torch.full((5,), 16))
    for deleted, delta_f in zip(search.deleted, search.delta_f, strict=True):
        other = empty_evidence(y, noise) if deleted.all() else refit(x, y, prior, noise, ~deleted).log_evidence
        assert delta_f.item() == pytest.approx((other - fit.log_evidence).item(), abs=1e-10, rel=1e-12)
    assert search.delta_f[0] == 0
    assert torch.allclose(deletions.score(search.deleted), search.delta_f, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("noise", [0.3, GAMMA], ids=["known", "gamma"])
def test_kept_posterior_equals_the_refit(noise: float | dist.Gamma) -> None:
    x, y, prior = make_problem(1, 4)
    fit = fit_linear(x, y, prior, noise)
    deletions = Deletions(fit.weights, prior, noise=fit.noise)
    deleted = search_exhaustively(deletions).deleted[:-1]
    for mask, loc, covariance in zip(deleted, *deletions.condition(deleted), strict=True):
        other = refit(x, y, prior, noise, ~mask)
        expected = other.weights.covariance_matrix
        if other.noise is not None:  # E[1 / tau]
            expected = expected * other.noise.rate / (other.noise.concentration - 1)
        assert torch.allclose(loc[~mask], other.weights.loc, atol=1e-10)
        assert torch.allclose(covariance[~mask][:, ~mask], expected, atol=1e-10)
        assert not loc[mask].any() and not covariance[mask].any() and not covariance[:, mask].any()


def test_groups_and_value_against_the_joint_density() -> None:
    """Uneven groups, elements in no group, a deletion value other than zero and a correlated prior."""
    rng = np.random.default_rng(4)
    roots = torch.tensor(rng.normal(size=(2, 6, 8)))
    q = dist.MultivariateNormal(torch.tensor(rng.normal(size=6)), roots[0] @ roots[0].mT / 20)
    p = dist.MultivariateNormal(torch.tensor(rng.normal(size=6)), roots[1] @ roots[1].mT)
    groups, value = [[4, 0], [2], [5, 1]], torch.tensor(rng.normal(size=6))
    search = search_exhaustively(Deletions(q, p, groups=groups, value=value, names=["a", "b", "c"]))
    assert search.delta_f.shape == (8,) and search.names == ("a", "b", "c")
    for deleted, delta_f in zip(search.deleted[1:], search.delta_f[1:], strict=True):
        index = [i for group, gone in zip(groups, deleted, strict=True) if gone for i in group]
        densities = [
            dist.MultivariateNormal(law.loc[index], law.covariance_matrix[index][:, index]).log_prob(value[index])
            for law in (q, p)
        ]
        assert delta_f.item() == pytest.approx((densities[0] - densities[1]).item(), abs=1e-11)


def test_permuting_elements_permutes_the_scores() -> None:
    x, y, prior = make_problem(7, 6)
    fit = fit_linear(x, y, prior, 0.3)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    permuted = dist.MultivariateNormal(fit.weights.loc[order], fit.weights.covariance_matrix[order][:, order])
    prior_permuted = dist.MultivariateNormal(prior.loc[order], prior.covariance_matrix[order][:, order])
    search = search_exhaustively(Deletions(fit.weights, prior))
    other = Deletions(permuted, prior_permuted).score(search.deleted[:, order])
    assert torch.allclose(other, search.delta_f, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_searches_agree_with_brute_force(seed: int) -> None:
    x, y, prior = make_problem(seed, 7)
    fit = fit_linear(x, y, prior, 0.3)
    deletions = Deletions(fit.weights, prior)
    table = search_exhaustively(deletions)
    price = {tuple(row.tolist()): score for row, score in zip(table.deleted, table.delta_f.tolist(), strict=True)}
    best = max(price.values())

    path = search_greedily(deletions, stop_early=False)
    assert path.deleted.sum(1).tolist() == list(range(8))
    for before, after, score in zip(path.deleted, path.deleted[1:], path.delta_f[1:].tolist(), strict=False):
        children = [before | flip for flip in torch.eye(7, dtype=torch.bool) if not (before & flip).any()]
        assert score == pytest.approx(max(price[tuple(child.tolist())] for child in children), abs=1e-9)
        assert score == pytest.approx(price[tuple(after.tolist())], abs=1e-9)
    stopped = search_greedily(deletions)
    assert (stopped.delta_f.diff() > 0).all()
    assert len(stopped.delta_f) == 8 or path.delta_f[len(stopped.delta_f)] <= stopped.delta_f[-1]

    everything = search_best_first(deletions, max_expansions=1000)
    assert len(everything.delta_f) == 128
    assert everything.top(1).delta_f.item() == pytest.approx(best, abs=1e-9)
    staged = search_in_stages(deletions)  # 7 groups fit in the width of 8: the search is exhaustive
    assert staged.top(1).delta_f.item() == pytest.approx(best, abs=1e-9)
    for search in (everything, staged):
        assert search.deleted.unique(dim=0).shape == search.deleted.shape
        assert torch.allclose(deletions.score(search.deleted), search.delta_f, atol=1e-9)


def test_stages_recover_a_planted_set_among_sixty() -> None:
    rng = np.random.default_rng(11)
    x = torch.tensor(rng.normal(size=(200, 60)))
    truth = torch.zeros(60, dtype=torch.bool)
    truth[[3, 17, 40, 59]] = True
    y = x[:, truth].sum(1) + torch.tensor(0.5 * rng.normal(size=200))
    prior = dist.MultivariateNormal(torch.zeros(60, dtype=torch.float64), torch.eye(60, dtype=torch.float64))
    fit = fit_linear(x, y, prior, 0.5)
    deletions = Deletions(fit.weights, prior)
    for search in (search_in_stages(deletions), search_greedily(deletions)):
        assert not search.best[truth].any()
        assert search.best[~truth].float().mean() > 0.9
        exact = refit(x, y, prior, 0.5, ~search.best).log_evidence - fit.log_evidence
        assert search.top(1).delta_f.item() == pytest.approx(exact.item(), abs=1e-8)


def test_sixteen_groups_give_all_65536_models() -> None:
    x, y, prior = make_problem(2, 16)
    fit = fit_linear(x, y, prior, 0.3)
    deletions = Deletions(fit.weights, prior)
    search = search_exhaustively(deletions)
    assert search.delta_f.shape == (65_536,) and search.delta_f.isfinite().all()
    rows = torch.randint(65_536, (50,), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(search.delta_f[rows], deletions.score(search.deleted[rows]), atol=1e-9)


def test_undefined_prices_never_win() -> None:
    """A posterior wider than the prior in the noise-averaged form can leave the family: NaN, not a number."""
    q = dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    p = dist.MultivariateNormal(torch.tensor([9.0, 0.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    search = search_exhaustively(Deletions(q, p, noise=GAMMA))
    assert search.delta_f.isnan().tolist() == [False, True, False, True]
    assert not search.best[0]
    assert not search_greedily(Deletions(q, p, noise=GAMMA), stop_early=False).deleted[:, 0].any()
    average = average_models(Deletions(q, p, noise=GAMMA), search)
    assert average.num_undefined == 2 and average.inclusion[0] == 1


def test_probabilities_and_average_by_brute_force() -> None:
    x, y, prior = make_problem(5, 4)
    fit = fit_linear(x, y, prior, 0.3)
    deletions = Deletions(fit.weights, prior)
    search = search_exhaustively(deletions)
    evidences, means, seconds = [], [], []
    for deleted in search.deleted:
        mean, second = np.zeros(4), np.zeros((4, 4))
        if deleted.all():
            evidences.append(empty_evidence(y, 0.3).item())
        else:
            other = refit(x, y, prior, 0.3, ~deleted)
            evidences.append(other.log_evidence.item())
            kept = (~deleted).numpy()
            mean[kept] = other.weights.loc
            second[np.ix_(kept, kept)] = other.weights.covariance_matrix
        means.append(mean)
        seconds.append(second + np.outer(mean, mean))
    odds = 0.2 / 0.8
    weights = np.exp(np.array(evidences) - max(evidences)) * odds ** (~search.deleted).sum(1).numpy()
    weights /= weights.sum()
    assert weigh_models(search, 0.2).numpy() == pytest.approx(weights, abs=1e-9)
    average = average_models(deletions, search, 0.2, window=math.inf)
    mean = weights @ np.array(means)
    assert average.loc.numpy() == pytest.approx(mean, abs=1e-9)
    covariance = np.einsum("m,mij->ij", weights, np.array(seconds)) - np.outer(mean, mean)
    assert average.covariance.numpy() == pytest.approx(covariance, abs=1e-9)
    inclusion = [weights[~search.deleted[:, j].numpy()].sum() for j in range(4)]
    assert compute_inclusion(search, weigh_models(search, 0.2)).numpy() == pytest.approx(inclusion, abs=1e-9)
    narrow = average_models(deletions, search, 0.2, window=1.0)
    assert len(narrow.weights) == (weights > weights.max() * math.exp(-1)).sum() < 16


def test_beta_inclusion_integrates_the_rate_out() -> None:
    import scipy.integrate
    import scipy.stats

    x, y, prior = make_problem(6, 4)
    search = search_exhaustively(Deletions(fit_linear(x, y, prior, 0.3).weights, prior))
    kept = (~search.deleted).sum(1).numpy()
    law = scipy.stats.beta(1.5, 4.0)
    log_prior = np.array(
        [
            scipy.integrate.quad(lambda r, k=k: r**k * (1 - r) ** (4 - k) * law.pdf(r), 0, 1, epsabs=1e-13)[0]
            for k in kept
        ]
    )
    expected = log_prior * np.exp(search.delta_f.numpy() - search.delta_f.max().item())
    weights = weigh_models(search, dist.Beta(*torch.tensor([1.5, 4.0], dtype=torch.float64)))
    assert weights.numpy() == pytest.approx(expected / expected.sum(), abs=1e-9)


NORMAL = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Deletions(dist.Gamma(torch.ones(3), 1.0), NORMAL), "q: got Gamma"),
        (lambda: Deletions(NORMAL, dist.Normal(torch.zeros(2), 1.0)), "posterior of 3 elements, prior of 2"),
        (lambda: Deletions(NORMAL, NORMAL, groups=[[0, 1], [1]]), "groups"),
        (lambda: Deletions(NORMAL, NORMAL, groups=[[3]]), "elements 0 to 2"),
        (lambda: Deletions(NORMAL, NORMAL, names=["a"]), "got 1 names"),
        (lambda: Deletions(NORMAL, NORMAL).score(torch.ones(1, 2, dtype=torch.bool)), r"shape \(models, 3\)"),
        (
            lambda: search_exhaustively(Deletions(*[dist.Normal(torch.zeros(21), 1.0).to_event(1)] * 2)),
            "at most 20 groups",
        ),
        (lambda: weigh_models(search_exhaustively(Deletions(NORMAL, NORMAL)), 1.0), "strictly between 0 and 1"),
    ],
)
def test_bad_input_is_refused(build: object, match: str) -> None:
    with pytest.raises(ReductionError, match=match):
        build()  # type: ignore[operator]
