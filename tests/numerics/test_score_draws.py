"""bmr.score from draws, its table, its refusals, and what it leaves untouched."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoNormal

from pyrobc.bmr.registry import reduce
from pyrobc.bmr.score import score
from pyrobc.dists import Restricted
from pyrobc.errors import ReductionError

PRIOR = dist.Normal(torch.zeros(3), 1.0)
POSTERIOR = dist.Normal(torch.tensor([0.1, 0.4, 1.0]), torch.tensor([0.2, 0.3, 0.2]))


def model(y: torch.Tensor | None = None) -> None:
    with pyro.plate("units", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=torch.zeros(3) if y is None else y)


def guide(y: torch.Tensor | None = None) -> None:
    with pyro.plate("units", 3):
        pyro.sample("w", POSTERIOR)


def draw(count: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return POSTERIOR.loc + POSTERIOR.scale * noise


def test_draws_agree_with_the_closed_form() -> None:
    narrow = dist.Normal(0.0, 0.7)
    exact = score(model, guide, reduced={"w": narrow})
    assert torch.allclose(exact.delta_f, reduce(POSTERIOR, PRIOR, narrow).delta_f)
    table = score(model, posterior={"w": draw(4000)}, reduced={"w": narrow})
    assert ((table.delta_f - exact.delta_f).abs() < 4 * table.mcse).all()
    assert (table.mcse < 0.05).all() and table.khat.isfinite().all()
    joint = score(model, posterior={"w": draw(4000)}, reduced={"w": narrow}, joint=True)
    assert abs(joint.delta_f.item() - exact.delta_f.sum().item()) < 4 * joint.mcse.item()
    whole = score(model, guide, reduced={"w": narrow}, joint=True)
    assert whole.delta_f.item() == pytest.approx(exact.delta_f.sum().item())


def test_interval_from_draws_counts_the_draws_inside() -> None:
    draws = draw(2000)
    table = score(model, posterior={"w": draws}, reduced={"w": lambda prior: Restricted(prior, -0.5, 0.5)})
    inside = ((draws > -0.5) & (draws < 0.5)).double().mean(0)
    expected = inside.log() - math.log(math.erf(0.5 / math.sqrt(2)))
    is_defined = table.delta_f.isfinite()
    assert is_defined[:2].all()
    assert torch.allclose(table.delta_f[is_defined], expected[is_defined], atol=1e-2)


def test_mcmc_is_taken_as_it_is() -> None:
    with torch.random.fork_rng():
        pyro.set_rng_seed(4)
        mcmc = MCMC(NUTS(model, jit_compile=False), num_samples=300, warmup_steps=100, disable_progbar=True)
        mcmc.run(torch.tensor([0.0, 0.5, 1.5]))
    table = score(model, posterior=mcmc, reduced={"w": dist.Normal(0.0, 0.7)}, args=(torch.tensor([0.0, 0.5, 1.5]),))
    exact = dist.Normal(torch.tensor([0.0, 0.25, 0.75]), math.sqrt(0.5))
    truth = reduce(exact, PRIOR, dist.Normal(0.0, 0.7)).delta_f
    assert ((table.delta_f - truth).abs() < 6 * table.mcse + 0.02).all()  # draws of a chain are not independent


def test_flow_guide_is_scored_from_its_draws() -> None:
    flow = AutoIAFNormal(model, hidden_dim=[8])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow()
    table = score(model, flow, reduced={"w": dist.Normal(0.0, 0.9)}, num_draws=500)
    assert table.khat.isfinite().all() and table.delta_f.isfinite().all()
    with pytest.raises(ReductionError, match="num_draws=0"):
        score(model, flow, reduced={"w": dist.Normal(0.0, 0.9)}, num_draws=0)


def test_table_has_one_labelled_row_per_element() -> None:
    table = score(model, guide, reduced={"w": dist.Delta(torch.tensor(0.0))})
    frame = table.to_frame()
    assert frame.columns.tolist() == ["site", "index", "reduced", "delta_f", "mcse", "khat", "reason"]
    assert frame["index"].tolist() == [(0,), (1,), (2,)] and set(frame["reduced"]) == {"Delta"}
    assert frame["delta_f"].to_numpy() == pytest.approx(table.delta_f.numpy())
    assert (frame["mcse"] == 0).all() and frame["khat"].isna().all() and (frame["reason"] == "").all()
    dataset = table.to_xarray()
    assert dataset.sizes == {"row": 3} and dataset["index"].to_numpy().tolist() == ["0", "1", "2"]
    assert dataset["delta_f"].to_numpy() == pytest.approx(table.delta_f.numpy())
    assert len(table) == 3 and table.reductions["w"].posterior is not None


def test_undefined_rows_say_why() -> None:
    table = score(model, posterior={"w": draw(50)}, reduced={"w": dist.Delta(torch.tensor(0.0))})
    assert table.delta_f.isnan().all() and all("Restricted" in reason for reason in table.reason)
    far = score(model, posterior={"w": draw(200)}, reduced={"w": dist.Normal(-3.0, 0.01)})
    assert far.delta_f.isnan().all() and all("k-hat" in reason for reason in far.reason)


def test_reduced_prior_is_differentiable() -> None:
    scale = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def total(value: torch.Tensor) -> torch.Tensor:
        return score(model, guide, reduced={"w": lambda prior: dist.Normal(0.0, value)}).delta_f.sum()

    assert torch.autograd.gradcheck(total, (scale,))


def test_nothing_global_changes_and_seeds_repeat() -> None:
    pyro.clear_param_store()
    automatic = AutoNormal(model)
    automatic()
    pyro.clear_param_store()
    before = torch.get_rng_state()
    rope = {"w": lambda prior: dist.StudentT(5.0, prior.mean, prior.stddev)}
    first = score(model, automatic, reduced=rope, num_draws=100)
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(pyro.get_param_store().keys())
    assert torch.equal(score(model, automatic, reduced=rope, num_draws=100).delta_f, first.delta_f)
    assert not torch.equal(score(model, automatic, reduced=rope, num_draws=100, seed=1).delta_f, first.delta_f)


def improper_model() -> None:
    pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), ()))


def positive_model() -> None:
    pyro.sample("w", dist.Gamma(2.0, 1.0))


def count_model() -> None:
    pyro.sample("w", dist.Poisson(2.0))


def two_level_model() -> None:
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    pyro.sample("w", dist.Normal(0.0, scale))


def sample_w(law: dist.Distribution) -> Callable[[], None]:
    def emit() -> None:
        pyro.sample("w", law)

    return emit


NARROW = dist.Normal(0.0, 0.5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: score(model, guide, reduced={"wx": NARROW}), r"site 'wx': got no such site.*did you mean 'w'\?"),
        (lambda: score(model, guide, reduced={"y": NARROW}), "an observed site"),
        (lambda: score(model, guide, reduced={}), "an empty mapping"),
        (lambda: score(model, reduced={"w": NARROW}), "neither a guide nor draws"),
        (lambda: score(model, guide, posterior={"w": draw(5)}, reduced={"w": NARROW}), "both a guide and draws"),
        (lambda: score(model, lambda: None, reduced={"w": NARROW}), "a latent site without a posterior.*sample 'w'"),
        (
            lambda: score(two_level_model, posterior={"scale": torch.ones(5)}, reduced={"w": NARROW}),
            "add draws of 'w'",
        ),
        (
            lambda: score(two_level_model, sample_w(NARROW), reduced={"w": NARROW}),
            "a prior that depends on sites without a posterior: scale",
        ),
        (
            lambda: score(model, guide, reduced={"w": dist.Normal(torch.zeros(4), 1.0)}),
            r"reduced prior of site 'w': got batch shape \(4,\)",
        ),
        (
            lambda: score(model, guide, reduced={"w": dist.Normal(torch.zeros(3), 1.0).to_event(1)}),
            r"event shape \(3,\)",
        ),
        (lambda: score(model, guide, reduced={"w": lambda prior: 3.0}), "got float"),
        (lambda: score(positive_model, sample_w(dist.Gamma(3.0, 2.0)), reduced={"w": NARROW}), "site 'w'.*support"),
        (lambda: score(improper_model, sample_w(NARROW), reduced={"w": NARROW}), "prior ImproperUniform, improper"),
        (
            lambda: score(model, guide, reduced={"w": dist.ImproperUniform(dist.constraints.real, (), ())}),
            "site 'w'.*ImproperUniform",
        ),
        (
            lambda: score(count_model, sample_w(dist.Poisson(3.0)), reduced={"w": dist.Poisson(1.0)}),
            "site 'w'.*discrete",
        ),
        (lambda: score(model, AutoDelta(model), reduced={"w": NARROW}), "AutoDelta, a point estimate"),
        (
            lambda: score(positive_model, sample_w(dist.Delta(torch.tensor(1.0))), reduced={"w": dist.Gamma(1.0, 1.0)}),
            "Delta, a point estimate",
        ),
        (lambda: score(model, posterior={"w": torch.full((5, 3), math.nan)}, reduced={"w": NARROW}), "finite tensors"),
        (lambda: score(model, posterior={}, reduced={"w": NARROW}), "an empty dict"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ReductionError, match=match):
        call()


def test_draws_out_of_the_prior_support_are_refused() -> None:
    with pytest.raises(ReductionError, match="site 'w': got prior Gamma, with no density at the draws"):
        score(positive_model, posterior={"w": -torch.ones(200)}, reduced={"w": dist.Gamma(3.0, 1.0)})
    inside = score(positive_model, posterior={"w": torch.rand(200) + 1}, reduced={"w": dist.Gamma(3.0, 1.0)})
    assert inside.delta_f.isfinite().all()
