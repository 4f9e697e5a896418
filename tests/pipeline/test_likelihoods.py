"""Likelihoods against torch's and scipy's densities, and that their parameters are learned."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from pyrobc.errors import ConfigError, DataError
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.likelihoods import Bernoulli, Categorical, Likelihood, Normal, make_likelihood
from pyrobc.models.mlp import build


def test_densities_equal_scipys_row_by_row() -> None:
    outputs = torch.randn(5, 3).double()
    labels = torch.tensor([0, 2, 1, 1, 0])
    found = Categorical().distribution(outputs, {}).log_prob(labels)
    expected = np.log(scipy.special.softmax(outputs.numpy(), 1)[np.arange(5), labels.numpy()])
    np.testing.assert_allclose(found, expected, rtol=1e-12)

    targets, scale = torch.randn(5, 3).double(), torch.tensor(0.75).double()
    found = Normal().distribution(outputs, {"y.scale": scale}).log_prob(targets)
    np.testing.assert_allclose(found, scipy.stats.norm.logpdf(targets, outputs, 0.75).sum(1), rtol=1e-12)

    bits = torch.randint(0, 2, (5, 3)).double()
    found = Bernoulli().distribution(outputs, {}).log_prob(bits)
    expected = scipy.stats.bernoulli.logpmf(bits.int().numpy(), scipy.special.expit(outputs.numpy())).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 2, 3)])
def test_rows_are_the_batch_whatever_an_output_looks_like(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape)
    for likelihood, targets in ((Normal(), torch.randn(shape)), (Bernoulli(), torch.randint(0, 2, shape).float())):
        law = likelihood.distribution(outputs, {"y.scale": torch.tensor(1.0)})
        assert law.batch_shape == (4,) and law.log_prob(targets).shape == (4,)
        loss = likelihood.loss(outputs, targets)
        assert loss.shape == (4,) and bool((loss >= 0).all())
        likelihood.check(targets, outputs)


def test_losses_are_what_users_call_the_error() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert Categorical().loss(logits, torch.tensor([1, 1])).tolist() == [0.0, 1.0]
    assert Normal().loss(logits, torch.zeros(2, 2)).tolist() == [5.0, 9.0]
    assert Bernoulli().loss(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0]])).tolist() == [0.5]


@pytest.mark.parametrize(
    ("likelihood", "targets", "message"),
    [
        (Normal(), torch.zeros(4), r"got torch.float32 of shape \(4,\); allowed: .*\(4, 1\)"),
        (Normal(), torch.zeros(4, 1).long(), "got torch.int64"),
        (Normal(), torch.tensor([[0.0], [torch.nan], [0.0], [0.0]]), "NaN or infinite"),
        (Bernoulli(), torch.tensor([[0.0], [2.0], [0.0], [0.0]]), "values from 0 to 2; allowed: 0 and 1"),
        (Bernoulli(), torch.tensor([[0.0], [0.5], [0.0], [0.0]]), "allowed: 0 and 1"),
        (Categorical(), torch.tensor([0, 0, 0, 1]), "allowed: 0 to 0"),
    ],
)
def test_targets_it_cannot_have_produced_are_refused(likelihood: Likelihood, targets: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        likelihood.check(targets, torch.zeros(4, 1))


def test_names_resolve_and_unknown_ones_suggest() -> None:
    for cls in (Bernoulli, Categorical, Normal):
        assert isinstance(make_likelihood(cls.name), cls)
    given = Normal()
    assert make_likelihood(given) is given
    with pytest.raises(ConfigError, match="did you mean 'bernoulli'"):
        make_likelihood("bernouli")


def test_regression_recovers_the_noise_and_the_coefficients() -> None:
    """One linear layer: the noise is known, and least squares is the judge of the coefficients."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 4, generator=generator)
    y = x @ torch.tensor([[1.5], [-2.0], [0.0], [1.0]]) + 0.3 * torch.randn(400, 1, generator=generator)
    model = lift(nn.Linear(4, 1), "group_horseshoe", "normal", x[:1])

    def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)

    post = fit(model, (x, y), epochs=150, lr=0.05, batch_size=100, schedule=decay, progress=False)
    design = np.hstack([x.numpy(), np.ones((400, 1))])
    solution, rss, *_ = np.linalg.lstsq(design, y.numpy(), rcond=None)
    plain = post.to_module()
    np.testing.assert_allclose(plain.weight.detach().ravel(), solution[:4, 0], atol=0.03)
    scale = post.laws()["y.scale"]
    exact = float(np.sqrt(rss[0] / 395))
    with torch.no_grad():
        assert float(scale.mean) == pytest.approx(exact, rel=0.05)
        # the posterior of a noise scale has standard deviation s / sqrt(2 n), nearly
        assert float(scale.stddev) == pytest.approx(exact / np.sqrt(800), rel=0.3)
    multiplier = post.mean().gates["input"]
    assert float(multiplier[2]) < 0.5 * float(multiplier[[0, 1, 3]].min()), "the idle feature shrinks"


def test_binary_outcomes_are_learned() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 3, generator=generator)
    y = (x[:, :1] > 0).float()
    post = fit(lift(build(3, (6,), 1), "log_uniform", "bernoulli", x[:1]), (x, y), epochs=30, lr=0.03, progress=False)
    assert post.history[-1]["error"] < 0.05


def test_outputs_without_a_trailing_axis_can_be_fitted() -> None:
    x, y = torch.randn(30, 3), torch.randn(30)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))
    post = fit(
        lift(net, "log_uniform", "normal", x[:2]), (x, y), epochs=2, progress=False, validation=(x, y), patience=1
    )
    assert np.isfinite(post.history[-1]["error"])


def test_targets_alone_are_predicted_from_the_other_rows() -> None:
    """Frequencies counted and Student's t fitted by scipy, one row left out at a time."""
    labels = torch.tensor([0, 2, 1, 1, 0, 0, 2])
    rest = [np.delete(labels.numpy(), i) for i in range(7)]
    expected = [np.log(((r == y).sum() + 0.5) / (6 + 0.5 * 4)) for r, y in zip(rest, labels.numpy(), strict=True)]
    np.testing.assert_allclose(Categorical().predict_constant(labels, 4), expected, rtol=1e-12)

    bits = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = Bernoulli().predict_constant(bits, 2)
    columns = [Categorical().predict_constant(bits[:, j].long(), 2) for j in range(2)]
    np.testing.assert_allclose(found, columns[0] + columns[1], rtol=1e-12)

    y = torch.randn(9, 2).double() * torch.tensor([1.0, 30.0]) + 1e3
    found = Normal().predict_constant(y, 2)
    for i in range(9):
        others = np.delete(y.numpy(), i, axis=0)
        scale = others.std(0, ddof=1) * np.sqrt(1 + 1 / 8)
        density = scipy.stats.t.logpdf(y[i].numpy(), 7, others.mean(0), scale).sum()
        assert float(found[i]) == pytest.approx(density, rel=1e-9)
    assert bool(Normal().predict_constant(y[:2], 2).isnan().all())
    assert bool(Normal().predict_constant(torch.ones(5, 1), 1).isnan().all())
    assert Normal().predict_constant(y[:, 0], 9).shape == (9,)
