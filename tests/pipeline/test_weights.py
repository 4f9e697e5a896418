"""Single weights: deleted for good, priced by their exact log Bayes factor, pruned in that order."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrobc import selection
from pyrobc.errors import BudgetError, CheckpointError, FamilyError, ReductionError
from pyrobc.fit import fit
from pyrobc.folding import FoldedFamily, fold_scales, refit_prior
from pyrobc.gridding import move_to_grid
from pyrobc.lift import LiftedModel, lift
from pyrobc.meanfield import MeanFieldGuide, NormalFactor
from pyrobc.models.regression import LinearRegression
from pyrobc.objective import fast_loss, traced_loss
from pyrobc.posterior import Posterior
from pyrobc.scores import score
from pyrobc.selection import CHUNK
from pyrobc.sparsify import sparsify
from pyrobc.weights import count_weights, prune_weights, score_weights


def some_posterior(dtype: torch.dtype = torch.float32) -> Posterior:
    """Weights between noise and signal, folded; nothing is fitted."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    model = lift(net, "group_normal_jeffreys", "categorical", torch.zeros(1, 6, dtype=dtype))
    guide = model.new_guide()
    with torch.no_grad():
        for key, parameter in guide.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) + (2.5 if key.endswith("log_scale") else 0.0))
    guide.project_()
    return fold_scales(Posterior(model, guide, num_data=60))


def factors_of(posterior: Posterior) -> dict[str, NormalFactor]:
    return {n: f for n, f in posterior.guide.by_site().items() if isinstance(f, NormalFactor)}


def half_pruned(dtype: torch.dtype = torch.float32) -> Posterior:
    posterior = some_posterior(dtype)
    for factor in factors_of(posterior).values():
        factor.keep_(torch.rand(factor.kept.shape) < 0.5)
    return posterior


def data(rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def with_weights(loc: Tensor, scale: Tensor, prior_scale: float) -> Posterior:
    """One linear layer without a bias whose weights have this law."""
    net = nn.Linear(loc.shape[1], loc.shape[0], bias=False).to(loc.dtype)
    whole = lift(net, "group_normal_jeffreys", "normal", torch.zeros(1, loc.shape[1], dtype=loc.dtype))
    family = FoldedFamily(whole.family, {"weight": prior_scale})
    model = LiftedModel(net, whole.spec, family, whole.likelihood, whole.example_inputs)
    guide = model.new_guide()
    factor = guide.by_site()["weight"]
    assert isinstance(factor, NormalFactor)
    with torch.no_grad():
        factor.loc.copy_(loc)
        factor.log_scale.copy_(scale.log())
    return Posterior(model, guide, num_data=10)


def convolutional() -> tuple[Any, MeanFieldGuide]:
    """A convolution and a linear layer under group scales, spread out."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    model = lift(net, "group_normal_jeffreys", "categorical", torch.randn(1, 2, 6, 6))
    guide = model.new_guide()
    with torch.no_grad():
        for key, parameter in guide.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) + (2.0 if key.endswith("log_scale") else 0.0))
    return model, guide


def test_deleted_weights_stay_deleted_through_optimiser_steps() -> None:
    posterior = half_pruned()
    masks = {n: f.kept.clone() for n, f in factors_of(posterior).items()}
    start = {n: f.loc.detach().clone() for n, f in factors_of(posterior).items()}

    def momentum(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=0.1)

    for optimizer in (None, momentum):
        for path in ("fast", "traced"):
            posterior = fit(
                posterior.model, data(), epochs=2, lr=1e-2, guide=posterior.guide, path=path, optimizer=optimizer,
                progress=False,
            )  # fmt: skip
    for name, factor in factors_of(posterior).items():
        assert torch.equal(factor.kept, masks[name])
        assert not bool(factor.loc.detach()[~masks[name]].any())
        assert bool((factor.loc.detach() != start[name])[masks[name]].all()), "what is kept is still fitted"
        mean, variance = posterior.laws()[name].mean, posterior.laws()[name].variance
        assert not bool(mean[~masks[name]].any()) and not bool(variance[~masks[name]].any())
    values = posterior.draw(3)
    assert not any(bool(values[name][~mask].any()) for name, mask in masks.items())
    state = posterior.to_module().state_dict()
    assert all(not bool(state[name][~mask].any()) for name, mask in masks.items())


def test_momentum_moves_nothing_that_is_deleted_in_the_middle_of_a_fit() -> None:
    posterior = some_posterior()
    optimizer = torch.optim.Adam(posterior.guide.parameters(), lr=0.1)
    loss = fast_loss(posterior.model, posterior.guide, 40)
    for step in range(6):
        if step == 3:
            prune_weights(posterior, keep=20)
        optimizer.zero_grad()
        loss(*data(), 1.0).backward()
        optimizer.step()
        posterior.guide.project_()
    for factor in factors_of(posterior).values():
        assert not bool(factor.loc.detach()[~factor.kept].any())
        assert not bool(factor.mean().detach()[~factor.kept].any())


def test_masks_survive_saving_and_copying(tmp_path: Path) -> None:
    posterior = half_pruned()
    torch.save(posterior.guide.state_dict(), tmp_path / "guide.pt")
    fresh = posterior.model.new_guide()
    assert all(f.is_whole for f in fresh.by_site().values() if isinstance(f, NormalFactor))
    fresh.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    for twin in (fresh, copy.deepcopy(posterior.guide), posterior.copy().guide):
        for name, factor in twin.by_site().items():
            assert torch.equal(factor.kept, factors_of(posterior)[name].kept) and not factor.is_whole
        expected, got = posterior.draw(7), Posterior(posterior.model, twin, 60).draw(7)
        assert all(torch.equal(expected[n], got[n]) for n in expected)
    assert fresh.count_deleted() == posterior.guide.count_deleted() > 0


def test_a_pruned_fit_resumes_to_the_same_bits_and_no_other_pruning_does(tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: Path | None, keep: int | None = None) -> Posterior:
        start = half_pruned()
        if keep is not None:
            prune_weights(start, keep)
        return fit(
            start.model,
            data(),
            epochs=epochs,
            seed=3,
            lr=1e-2,
            guide=start.guide,
            checkpoint=checkpoint,
            progress=False,
        )

    whole = run(4, None)
    run(2, tmp_path / "fit.pt")
    resumed = run(4, tmp_path / "fit.pt")
    states = whole.guide.state_dict(), resumed.guide.state_dict()
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not any(f.is_whole for f in factors_of(resumed).values())
    with pytest.raises(CheckpointError, match="deleted weights: got"):
        run(4, tmp_path / "fit.pt", keep=10)


def test_restricting_slices_the_mask() -> None:
    posterior = half_pruned()
    kept = {"input": np.array([0, 2, 5]), "0": np.array([1, 2, 4])}
    small = posterior.restricted(kept)
    full, cut = factors_of(posterior), factors_of(small)
    rows, columns = torch.tensor(kept["0"]), torch.tensor(kept["input"])
    assert torch.equal(cut["0.weight"].kept, full["0.weight"].kept[rows][:, columns])
    assert torch.equal(cut["2.weight"].kept, full["2.weight"].kept[:, rows])
    assert torch.equal(cut["0.bias"].kept, full["0.bias"].kept[rows])
    assert small.model.spec.block("input").origin.tolist() == [0, 2, 5]
    again = small.restricted({"input": np.array([1, 2]), "0": np.array([0, 2])})
    assert again.model.spec.block("input").origin.tolist() == [2, 5]
    assert again.model.spec.block("0").origin.tolist() == [1, 4]
    assert posterior.model.spec.block("0").origin is None


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_fast_and_traced_losses_agree_where_weights_are_deleted(temperature: float) -> None:
    posterior = half_pruned(torch.float64)
    x, y = torch.randn(6, 6, dtype=torch.float64), torch.randint(0, 3, (6,))
    fast, traced = (make(posterior.model, posterior.guide, 60) for make in (fast_loss, traced_loss))
    with torch.no_grad():
        a = torch.stack([fast(x.repeat(200, 1), y.repeat(200), temperature) for _ in range(20)])
        b = torch.stack([traced(x, y, temperature) for _ in range(400)])
    se = (a.var() / len(a) + b.var() / len(b)).sqrt()
    assert (a.mean() - b.mean()).abs() < 4 * se
    assert float(b.std()) > 0.1, "no noise, no test"
    fast(x, y, temperature).backward()
    for factor in factors_of(posterior).values():
        for parameter in (factor.loc, factor.log_scale):
            assert bool(parameter.grad.isfinite().all()) and not bool(parameter.grad[~factor.kept].any())


@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_scores_are_log_densities_at_zero_posterior_minus_prior(law: Any) -> None:
    posterior = refit_prior(half_pruned(), law)
    scores, laws, priors = score_weights(posterior), posterior.laws(), posterior.model.priors()
    assert scores.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, factor in factors_of(posterior).items():
        zero = torch.zeros(factor.loc.shape, dtype=torch.float64)
        q = torch.distributions.Normal(factor.loc.detach().double(), factor.log_scale.detach().double().exp())
        kind = torch.distributions.Laplace if law == "laplace" else torch.distributions.Normal
        p = kind(zero, priors[name].base_dist.scale.double())
        expected = q.log_prob(zero) - p.log_prob(zero)
        assert scores[name].dtype == torch.float64
        torch.testing.assert_close(scores[name][factor.kept], expected[factor.kept], rtol=1e-6, atol=1e-6)
        assert bool(scores[name][~factor.kept].isnan().all())
    assert laws.keys() == factors_of(posterior).keys()


def test_known_score() -> None:
    posterior = with_weights(torch.zeros(1, 1).double() + 0.3, torch.zeros(1, 1).double() + 0.2, 1.0)
    assert float(score_weights(posterior)["weight"]) == pytest.approx(0.48443791, abs=5e-9)


def test_scores_are_exact_evidence_ratios_where_mean_field_is_exact() -> None:
    """Orthogonal columns: the posterior factorises, and deleting a weight is refitting without its column."""
    x = torch.linalg.qr(torch.randn(30, 5, dtype=torch.float64)).Q * torch.tensor([1.0, 3.0, 5.0, 0.5, 2.0]).double()
    y = x @ torch.tensor([0.0, 0.8, -0.2, 1.5, 0.05]).double() + 0.7 * torch.randn(30, dtype=torch.float64)
    regression = LinearRegression(weight_scale=0.6, noise=0.7)
    exact = regression.fit_exactly(x, y)
    covariance = exact.weights.covariance_matrix
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), rtol=0, atol=1e-12)
    posterior = with_weights(exact.weights.loc[None], covariance.diagonal().sqrt()[None], 0.6)
    scores = score_weights(posterior)["weight"][0]
    for j in range(5):
        left = torch.arange(5) != j
        ratio = regression.fit_exactly(x[:, left], y).log_evidence - exact.log_evidence
        assert float(scores[j]) == pytest.approx(float(ratio), abs=1e-9)
    order = scores.argsort()
    prune_weights(posterior, keep=2)
    factor = factors_of(posterior)["weight"]
    assert factor.kept[0].nonzero().flatten().tolist() == sorted(order[:2].tolist())


@pytest.mark.parametrize("keep", [1, 7, 30, 52, 53, 54])
def test_pruning_leaves_as_many_as_it_is_told_and_the_best_ones(keep: int) -> None:
    posterior = some_posterior()
    scores = torch.cat([s.flatten() for s in score_weights(posterior).values()])
    assert count_weights(posterior) == (53, 53)
    assert prune_weights(posterior, keep) == max(0, 53 - keep)
    assert count_weights(posterior) == (min(keep, 53), 53)
    masks = torch.cat([f.kept.flatten() for f in factors_of(posterior).values()])
    assert sorted(scores[masks].tolist()) == sorted(scores.tolist())[: min(keep, 53)]
    assert prune_weights(posterior, keep) == 0


def test_of_equal_weights_no_more_than_asked_are_deleted() -> None:
    posterior = with_weights(torch.full((4, 5), 0.1), torch.full((4, 5), 0.2), 1.0)
    assert prune_weights(posterior, keep=13) == 7
    assert factors_of(posterior)["weight"].kept.flatten().tolist() == [False] * 7 + [True] * 13
    assert prune_weights(posterior, keep=1) == 12 and count_weights(posterior) == (1, 20)


def test_undefined_and_infinite_scores_never_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([[math.nan, math.inf, -math.inf, 3.0, 2.0, -1.0]]).double()
    for keep, deleted in ((5, [3]), (4, [3, 4]), (1, [3, 4, 5]), (None, [3, 4])):
        posterior = with_weights(torch.ones(1, 6), torch.ones(1, 6), 1.0)
        monkeypatch.setattr("pyrobc.weights.score_weights", lambda *_: {"weight": values})
        assert prune_weights(posterior, keep) == len(deleted)
        assert (~factors_of(posterior)["weight"].kept[0]).nonzero().flatten().tolist() == deleted


def test_the_odds_rule_is_the_sum_of_evidence_and_learned_odds() -> None:
    """The fixed point of the Beta-Bernoulli rate, solved here by plain iteration."""
    torch.manual_seed(0)
    strong = torch.where(torch.rand(1, 400) < 0.2, 3.0, 0.0)
    posterior = with_weights(strong + 0.3 * torch.randn(1, 400), torch.full((1, 400), 0.3), 2.0)
    scores = score_weights(posterior)["weight"][0].numpy()
    odds = 0.0
    for _ in range(2000):  # of being kept
        kept = 1 / (1 + np.exp(np.clip(scores - odds, -700, 700)))
        a, b = 1 + kept.sum(), 1 + (1 - kept).sum()
        odds = float(torch.tensor(a).digamma() - torch.tensor(b).digamma())
    prune_weights(posterior)
    assert (factors_of(posterior)["weight"].kept[0].numpy() == (scores - odds <= 0)).all()
    is_kept = factors_of(posterior)["weight"].kept
    assert bool(is_kept[strong > 0].all()) and float(is_kept[strong == 0].float().mean()) < 0.05


def test_prior_odds_are_added_to_the_evidence() -> None:
    posterior = some_posterior()
    scores = score_weights(posterior)
    generator = torch.Generator().manual_seed(0)
    prior = {
        n: 5 * torch.randn(s.shape, generator=generator, dtype=s.dtype) for n, s in scores.items() if "weight" in n
    }
    total = {n: s + prior.get(n, 0.0) for n, s in scores.items()}

    by_number = posterior.copy()
    assert prune_weights(by_number, 20, prior=prior) == sum(s.numel() for s in scores.values()) - 20
    least = torch.cat([t.flatten() for t in total.values()]).sort().values[19]
    by_odds = posterior.copy()
    prune_weights(by_odds, prior=prior)
    for name in scores:
        assert torch.equal(factors_of(by_number)[name].kept, total[name] <= least)
        assert torch.equal(factors_of(by_odds)[name].kept, total[name] <= 0.0)


@pytest.mark.parametrize("per", ["row", "kernel"])
def test_prior_odds_are_those_of_single_weights(per: Any) -> None:
    posterior = some_posterior()
    with pytest.raises(ReductionError, match=f"unit of deletion: got '{per}' with prior odds.*leave prior out"):
        prune_weights(posterior, per=per, prior=score_weights(posterior))


def test_where_nothing_is_needed_the_odds_delete_all() -> None:
    posterior = with_weights(torch.zeros(1, 50), torch.full((1, 50), 0.05), 1.0)
    assert prune_weights(posterior) == 50 and prune_weights(posterior) == 0


@pytest.mark.parametrize("keep", [0, -3, 2.5])
def test_numbers_to_keep_that_make_no_sense_are_refused(keep: Any) -> None:
    with pytest.raises(BudgetError, match="weights to keep: got .*allowed: a whole number from 1"):
        prune_weights(some_posterior(), keep)


def test_weights_under_group_scales_are_not_scored() -> None:
    model = lift(nn.Linear(6, 5), "group_normal_jeffreys", "normal", torch.zeros(1, 6))
    posterior = Posterior(model, model.new_guide(), 10)
    needs: list[Any] = [score_weights, prune_weights, refit_prior, lambda p: move_to_grid(p, 1.0)]
    for call in (*needs, lambda p: sparsify(p, data(), keep=5)):
        with pytest.raises(FamilyError, match="got a posterior with group scales.*call fold_scales first"):
            call(posterior)
    with pytest.raises(ReductionError, match="reduction for family 'folded'.*none"):
        score(fold_scales(posterior))


def test_the_prior_is_that_of_what_is_left() -> None:
    posterior = half_pruned()
    factor = factors_of(posterior)["0.weight"]
    power = factor.loc.detach().square() + (2 * factor.log_scale.detach()).exp()
    refit_prior(posterior)
    assert posterior.model.family.prior_scales["0.weight"] == pytest.approx(float(power[factor.kept].mean().sqrt()))


@pytest.mark.parametrize("per", ["row", "kernel"])
def test_what_is_deleted_together_shares_the_sum_of_its_scores(per: Any) -> None:
    posterior = fold_scales(Posterior(*convolutional(), num_data=10))
    for factor in factors_of(posterior).values():
        factor.keep_(torch.rand_like(factor.loc) < 0.7)
    single, together = score_weights(posterior), score_weights(posterior, per)
    axis = 1 if per == "row" else 2
    for name, value in together.items():
        kept = factors_of(posterior)[name].kept
        assert torch.equal(value.isnan(), ~kept)
        if value.dim() > axis:
            total = single[name].nan_to_num(0.0).flatten(axis).sum(axis)
            shared = total.reshape(*total.shape, *(1,) * (value.dim() - axis)).expand_as(value)
            torch.testing.assert_close(value[kept], shared[kept])
        else:
            torch.testing.assert_close(value[kept], single[name][kept])
    prune_weights(posterior, per=per)
    weight = factors_of(posterior)["0.weight"].kept
    lines = weight.flatten(axis)
    before = ~together["0.weight"].isnan()
    is_whole = (lines == before.flatten(axis)).all(axis) | ~lines.any(axis)
    assert bool(is_whole.all()), "a row or kernel leaves whole or not at all"


def test_units_of_deletion_that_cannot_be_are_refused() -> None:
    with pytest.raises(ReductionError, match="'colunm'; allowed: weight, row, kernel"):
        score_weights(half_pruned(), "colunm")  # type: ignore[arg-type]
    with pytest.raises(ReductionError, match="leave keep out"):
        prune_weights(half_pruned(), 5, "row")


def test_scores_in_chunks_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = half_pruned()
    for per in ("weight", "row", "kernel"):
        whole = score_weights(posterior, per)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(selection, "CHUNK", 5)
            chunked = score_weights(posterior, per)  # type: ignore[arg-type]
        for name, found in whole.items():
            torch.testing.assert_close(found, chunked[name], rtol=0, atol=0, equal_nan=True)


class LargeTensors(TorchDispatchMode):
    """Types and sizes of all new tensors with more than a given number of elements."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.seen = limit, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() > self.limit:
                if tensor.untyped_storage().data_ptr() not in given:
                    self.seen.append((tensor.dtype, tensor.numel()))
        return result


@pytest.mark.parametrize("keep", [None, 10_000])
def test_besides_the_scores_memory_holds_a_chunk(keep: int | None) -> None:
    size = 3 * CHUNK
    loc = torch.randn(3, CHUNK, generator=torch.Generator().manual_seed(0)) * 0.01
    posterior = with_weights(loc, torch.full_like(loc, 0.01), 0.05)
    with LargeTensors(CHUNK) as large:
        removed = prune_weights(posterior, keep)
    assert removed > size // 2
    reals = [found for found in large.seen if found[0].is_floating_point]
    assert reals == [(torch.float64, size)], "the scores themselves"
    assert all(dtype == torch.bool for dtype, _ in large.seen if not dtype.is_floating_point)
