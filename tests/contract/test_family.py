"""What every family promises, run on every family discovered: a new file in ``guides/`` is tested by existing."""

import copy
import inspect
import sys
from collections.abc import Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from pyrobc.bmr import reduce
from pyrobc.dists import Restricted, interval_log_mass
from pyrobc.errors import FamilyError
from pyrobc.family import Effective, Family, GroupScale, families, make_family
from pyrobc.groups import GroupSpec
from pyrobc.lift import LiftedModel, lift
from pyrobc.likelihoods import Categorical
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.models.mlp import build
from pyrobc.objective import fast_loss, split_laws, traced_loss
from pyrobc.posterior import Posterior
from pyrobc.slicing import slice_groups

NAMES = sorted(families())
STANDARD_ERRORS = 4.0

every_family = pytest.mark.parametrize("name", NAMES)


def some_data(rows: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4, dtype=dtype), torch.randint(0, 3, (rows,))


def lifted(name: str, dtype: torch.dtype = torch.float64, hidden: tuple[int, ...] = (5, 4)) -> LiftedModel:
    net = build(4, hidden, 3).to(dtype)
    return lift(net, name, "categorical", torch.randn(1, 4, dtype=dtype))


def spread(guide: MeanFieldGuide, widen: float = 2.5, noise: float = 0.3) -> MeanFieldGuide:
    """Move a guide away from its start, with enough noise for expectations to differ from values at the mean."""
    with torch.no_grad():
        for key, parameter in guide.named_parameters():
            parameter.add_(noise * torch.randn_like(parameter) + (widen if key.endswith("log_scale") else 0.0))
    guide.project_()
    return guide


def own_laws(model: LiftedModel, guide: MeanFieldGuide) -> dict[str, Distribution]:
    return split_laws(model, guide.distributions())[0]


def scales_of(model: LiftedModel, guide: MeanFieldGuide) -> dict[str, GroupScale]:
    return Posterior(model, guide, num_data=1).scales()


def is_gated(model: LiftedModel) -> bool:
    return bool(scales_of(model, model.new_guide()))


def presence_of(model: LiftedModel, guide: MeanFieldGuide) -> dict[str, GroupScale]:
    return Posterior(model, guide, num_data=1).presence()


def is_indicator(scale: GroupScale) -> bool:
    return isinstance(scale.prior, dist.Bernoulli)


def assert_close_in_se(draws: Tensor, expected: Tensor, slack: float = 1e-9) -> None:
    """The mean over axis 0 lies within the stated number of standard errors, element by element."""
    se = draws.std(0) / len(draws) ** 0.5
    gap = (draws.mean(0) - expected).abs()
    assert bool((gap <= STANDARD_ERRORS * se + slack * (1 + expected.abs())).all()), (gap / se.clamp_min(1e-300)).max()


def cdf(law: Distribution, draws: Tensor) -> Tensor:
    if isinstance(law, dist.Bernoulli):  # it has none in torch
        return interval_log_mass(law, torch.full_like(draws, -torch.inf), draws).exp()
    return law.cdf(draws).double()


def assert_drawn_from(law: Distribution, draws: Tensor) -> None:
    """Cdf values of draws are uniform, spread evenly over the jump where a law has an atom."""
    end, start = cdf(law, draws), cdf(law, torch.nextafter(draws, draws.new_tensor(-torch.inf)))
    uniform = start + torch.rand_like(end) * (end - start)
    assert_close_in_se(uniform, torch.full_like(uniform[0], 0.5))
    assert_close_in_se(uniform.square(), torch.full_like(uniform[0], 1 / 3))


def test_both_built_in_families_are_discovered() -> None:
    assert len(NAMES) >= 2
    assert {"log_uniform", "group_horseshoe"} <= set(NAMES)


@every_family
def test_model_and_guide_have_the_same_sites(name: str) -> None:
    model = lifted(name)
    x, y = some_data()

    def sites(program: object) -> dict[str, torch.Size]:
        nodes = poutine.trace(program).get_trace(x, y).stochastic_nodes
        trace = poutine.trace(program).get_trace(x, y)
        return {n: trace.nodes[n]["value"].shape for n in nodes if n != "data"}

    in_model, in_guide = sites(model), sites(model.new_guide())
    assert in_model == in_guide
    assert {n: p.shape for n, p in model.spec.parameters.items()}.items() <= {
        n: tuple(s) for n, s in in_model.items()
    }.items()


@every_family
def test_priors_and_guide_have_the_same_event_shapes(name: str) -> None:
    model = lifted(name)
    laws, priors = own_laws(model, model.new_guide()), model.priors()
    for site, law in laws.items():
        assert law.batch_shape == priors[site].batch_shape == (), site
        assert law.event_shape == priors[site].event_shape, site


@every_family
def test_declared_kl_is_registered_and_equals_monte_carlo(name: str) -> None:
    model = lifted(name)
    guide = spread(model.new_guide())
    if not model.family.has_closed_form_kl:
        pytest.skip("declares no closed form")
    laws, priors = own_laws(model, guide), model.priors()
    declared = model.family.kl(laws, priors)
    assert declared.keys() == laws.keys()
    with torch.no_grad():
        traces = [poutine.trace(guide).get_trace() for _ in range(200)]
        for site in laws:  # where no site of the guide depends on another, all draws have the same laws
            drawn = [trace.nodes[site]["fn"] for trace in traces]
            exact = torch.stack([kl_divergence(law, priors[site]).sum() for law in drawn])
            assert_close_in_se(exact, declared[site], slack=1e-7)
            values = drawn[0].sample(torch.Size([4000]))
            ratios = drawn[0].log_prob(values) - priors[site].log_prob(values)
            if model.family.kl_is_bound:
                excess = float(ratios.mean() - exact[0])
                assert excess <= STANDARD_ERRORS * float(ratios.std()) / len(ratios) ** 0.5, site
            else:
                assert_close_in_se(ratios, exact[0])


@every_family
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_traced_loss_is_minus_the_tempered_elbo_of_its_own_draw(name: str, temperature: float) -> None:
    """Replay the very draw the ELBO used, and add up likelihood and KL from the family's functions alone."""
    model, num_data = lifted(name), 60
    guide = spread(model.new_guide())
    x, y = some_data()
    loss = traced_loss(model, guide, num_data)
    torch.manual_seed(3)
    traced = loss(x, y, temperature)
    torch.manual_seed(3)
    guide_trace = poutine.trace(guide).get_trace(x, y)
    values = {n: guide_trace.nodes[n]["value"] for n in guide.by_site()}
    log_likelihood = dist.Categorical(logits=model.run(model.family.combine(values, model.spec), x)).log_prob(y).sum()
    kl = sum(kl_divergence(guide_trace.nodes[n]["fn"], model.priors()[n]).sum() for n in values)
    expected = temperature * kl - num_data / len(y) * log_likelihood
    torch.testing.assert_close(traced, expected, rtol=1e-9, atol=1e-9)

    joint = poutine.trace(poutine.replay(model, guide_trace)).get_trace(x, y).log_prob_sum()
    log_prior = sum(model.priors()[n].log_prob(v).sum() for n, v in values.items())
    torch.testing.assert_close(joint, log_prior + num_data / len(y) * log_likelihood, rtol=1e-9, atol=1e-9)


@every_family
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_fast_loss_has_the_expectation_of_the_traced_loss(name: str, temperature: float) -> None:
    model, num_data = lifted(name, hidden=(4,)), 60
    guide = spread(model.new_guide(), widen=3.0)
    x, y = some_data()
    fast, traced = fast_loss(model, guide, num_data), traced_loss(model, guide, num_data)
    with torch.no_grad():
        # a local draw has noise per example: repeating the rows gives many draws in one call
        repeats = 200
        a = torch.stack([fast(x.repeat(repeats, 1), y.repeat(repeats), temperature) for _ in range(20)])
        b = torch.stack([traced(x, y, temperature) for _ in range(300)])
        c = torch.stack([fast(x, y, temperature) for _ in range(300)])
    for other in (a, c):
        se = (other.var() / len(other) + b.var() / len(b)).sqrt()
        assert (other.mean() - b.mean()).abs() < STANDARD_ERRORS * se
    assert float(b.std()) > 0.1, "no noise, no test"
    assert float(c.std()) < 1.2 * float(b.std()), "local draws are there to have less variance"


@every_family
def test_local_draw_keeps_its_declared_kind(name: str) -> None:
    model = lifted(name)
    laws = own_laws(model, model.new_guide())
    effective = model.family.draw_local(laws, model.spec, 7)
    gates = {b.name: (7, b.size) for b in model.spec.blocks} if is_gated(model) else {}
    assert {b: tuple(g.shape) for b, g in effective.gates.items()} == gates
    assert effective.parameters.keys() == model.spec.parameters.keys()
    assert bool(effective.variances) == (model.family.posterior_on == "weight")
    for name in effective.variances:  # not drawn: means and variances of what a draw of the sites means
        drawn = torch.stack(
            [
                model.family.combine({n: q.sample() for n, q in laws.items()}, model.spec).parameters[name]
                for _ in range(400)
            ]
        )
        mean = effective.parameters[name].detach()
        assert_close_in_se(drawn, mean)
        ratio = (drawn - mean).square() / effective.variances[name].detach()
        assert_close_in_se(ratio.reshape(-1, 1), torch.ones(1).double())


@every_family
def test_gradients_of_the_fast_loss_are_finite_and_reach_every_parameter(name: str) -> None:
    model = lifted(name, torch.float32)
    guide = model.new_guide()
    x, y = some_data(dtype=torch.float32)
    x[0] = 0  # an example that leaves every variance at zero
    fast_loss(model, guide, 60)(x, y, 1.0).backward()
    for key, parameter in guide.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key


@every_family
def test_nothing_is_gained_by_reducing_to_the_prior_itself(name: str) -> None:
    model = lifted(name)
    found = presence_of(model, spread(model.new_guide()))
    assert found.keys() == model.spec.by_name.keys()
    for block, scale in found.items():
        gain = reduce(scale.posterior, scale.prior, scale.prior).delta_f
        assert gain.shape == (model.spec.block(block).size,)
        torch.testing.assert_close(gain, torch.zeros_like(gain), rtol=0, atol=1e-9)
        if is_indicator(scale):
            continue
        everything = Restricted(scale.prior, torch.full_like(gain, -torch.inf), torch.full_like(gain, torch.inf))
        gain = reduce(scale.posterior, scale.prior, everything).delta_f
        torch.testing.assert_close(gain, torch.zeros_like(gain), rtol=0, atol=1e-6)


def separated(model: LiftedModel, block: str) -> MeanFieldGuide:
    """A guide whose group 0 has a multiplier near zero and whose group 1 has one far from it, whatever the family."""
    guide = model.new_guide()
    if presence_of(model, guide)[block].size is not None:  # a group is its weights
        for member in (m for m in model.spec.block(block).members if m.role == "produce"):
            guide.by_site()[member.parameter].loc.data[0] *= 1e-6
        return guide
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        scale = model.family.presence(own_laws(model, guide), model.priors(), model.spec)[block]
        means: Tensor = scale.posterior.logits if is_indicator(scale) else scale.posterior.mean.log()  # type: ignore
        if float((means[0] - means[1]).detach()) < -12.0 and float(means[0].detach()) < 0:
            break
        (means[0] - means[1]).backward()
        optimizer.step()
        guide.project_()
    return guide


@every_family
def test_a_group_near_zero_scores_above_one_far_away(name: str) -> None:
    model = lifted(name)
    block = model.spec.blocks[1].name
    scale = presence_of(model, separated(model, block))[block]
    assert float(scale.posterior.mean[0]) < (0.5 if is_indicator(scale) else 1e-3) * float(scale.posterior.mean[1])
    for label, reduced in model.family.reduced().items():
        threshold = torch.full_like(scale.posterior.mean, 1e-2)
        delta_f = reduce(scale.posterior, scale.prior, reduced.of(scale.prior, threshold)).delta_f
        assert not bool(torch.isnan(delta_f).any()), label
        assert float(delta_f[0]) > float(delta_f[1]), label
    assert float(delta_f[0]) > -1.0 and model.family.default_reduction in model.family.reduced()
    for label, baseline in model.family.baselines().items():
        values = baseline.of(scale.posterior)
        assert values.shape == scale.posterior.batch_shape and bool(torch.isfinite(values).all()), label
        assert float(values[0]) > float(values[1]), label


@every_family
def test_baselines_have_names_of_their_own(name: str) -> None:
    family = make_family(name)
    for label, baseline in family.baselines().items():
        assert baseline.label == label and baseline.unit
        assert label not in family.reduced()


@every_family
def test_permuting_groups_permutes_scores(name: str) -> None:
    model = lifted(name)
    guide = spread(model.new_guide())
    block = model.spec.blocks[1]
    if is_indicator(presence_of(model, guide)[block.name]):
        pytest.skip("no site belongs to a group alone, and the order of groups may matter")
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = copy.deepcopy(guide)
    for site, factor in permuted.by_site().items():
        if site not in model.spec.parameters and site.startswith(f"{block.name}."):
            for parameter in factor.parameters():
                if parameter.shape == (block.size,):
                    parameter.data = parameter.data[order]
    for member in block.members:
        for parameter in permuted.by_site()[member.parameter].parameters():
            if parameter.dim() > member.axis and parameter.shape[member.axis] == block.size:
                parameter.data = parameter.data.index_select(member.axis, order)

    def scores(g: MeanFieldGuide) -> Tensor:
        scale = presence_of(model, g)[block.name]
        reduced = model.family.reduced()[model.family.default_reduction]
        return reduce(scale.posterior, scale.prior, reduced.of(scale.prior, torch.full((5,), 0.3).double())).delta_f

    plain = scores(guide)
    assert len(plain.unique()) == 5
    torch.testing.assert_close(scores(permuted), plain[order], rtol=1e-12, atol=1e-12)


@every_family
def test_mean_is_the_mean_of_what_draws_mean(name: str) -> None:
    model = lifted(name)
    guide = spread(model.new_guide(), widen=2.0)
    with torch.no_grad():
        laws = own_laws(model, guide)
        mean = model.family.mean(laws, model.spec)
        found: list[Effective] = []
        for _ in range(1500):
            found.append(model.family.combine({n: law.sample() for n, law in laws.items()}, model.spec))
    for block in model.spec.blocks:
        assert_close_in_se(torch.stack([e.gates[block.name] for e in found]), mean.gates[block.name])
    for site in model.spec.parameters:
        assert_close_in_se(torch.stack([e.parameters[site] for e in found]), mean.parameters[site])


@every_family
def test_scales_are_the_laws_of_the_gates_that_are_drawn(name: str) -> None:
    model = lifted(name)
    if not is_gated(model):
        pytest.skip("has no gates: what its scales are the laws of is a test of its own")
    guide = spread(model.new_guide(), widen=2.0)
    with torch.no_grad():
        laws = own_laws(model, guide)
        drawn = [model.family.combine({n: q.sample() for n, q in laws.items()}, model.spec).gates for _ in range(1500)]
        local = [model.family.draw_local(laws, model.spec, 2).gates for _ in range(1500)]
    for block, scale in scales_of(model, guide).items():
        for gates in ([d[block] for d in drawn], [d[block][1] for d in local]):
            assert_drawn_from(scale.posterior, torch.stack(gates))


@every_family
def test_prior_scales_are_the_laws_of_the_gates_under_the_prior(name: str) -> None:
    model = lifted(name)
    if not is_gated(model):
        pytest.skip("has no gates: what its scales are the laws of is a test of its own")
    priors = model.family.prior(model.spec, model.anchor)
    scale = scales_of(model, model.new_guide())
    gates = [
        model.family.combine(model.family.sample_prior(priors), model.spec).gates[model.spec.blocks[0].name]
        for _ in range(1500)
    ]
    assert_drawn_from(scale[model.spec.blocks[0].name].prior, torch.stack(gates))


@every_family
def test_draws_repeat_and_survive_saving(name: str, tmp_path: object) -> None:
    model = lifted(name)
    guide = spread(model.new_guide())
    first, again, other = (Posterior(model, guide, 1).draw(seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    torch.save(guide.state_dict(), f"{tmp_path}/guide.pt")
    fresh = model.new_guide()
    fresh.load_state_dict(torch.load(f"{tmp_path}/guide.pt", weights_only=True))
    loaded = Posterior(model, fresh, 1).draw(5)
    assert all(torch.equal(first[n], loaded[n]) for n in first)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    model = lifted(name, dtype)
    guide = spread(model.new_guide())
    x, y = some_data(dtype=dtype)
    assert {v.dtype for v in guide().values()} == {dtype}
    assert {p.sample().dtype for p in model.priors().values()} == {dtype}
    for loss in (fast_loss(model, guide, 6), traced_loss(model, guide, 6)):
        value = loss(x, y, 1.0)
        assert value.dtype == dtype and bool(torch.isfinite(value))
    assert {s.posterior.mean.dtype for s in presence_of(model, guide).values()} == {torch.float64}
    assert next(guide.parameters()).dtype == dtype


@every_family
def test_pyro_tools_work_on_the_lifted_model(name: str) -> None:
    model = lifted(name, torch.float32)
    x, y = some_data(dtype=torch.float32)
    trace = poutine.trace(model).get_trace(x, y)
    assert bool(torch.isfinite(trace.log_prob_sum()))
    drawn = Predictive(model, guide=model.new_guide(), num_samples=3)(x)
    assert drawn["y"].shape == (3, 6)
    prior_drawn = Predictive(model, num_samples=2)(x)
    assert prior_drawn["y"].shape == (2, 6)
    auto = AutoNormal(model)
    svi = SVI(model, auto, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(3)]
    assert np.isfinite(losses).all()


@every_family
def test_nuts_runs_on_a_tiny_model(name: str) -> None:
    model = lift(build(2, (2,), 2).double(), name, "categorical", torch.zeros(1, 2).double(), prune_inputs=False)
    x, y = torch.randn(8, 2).double(), torch.randint(0, 2, (8,))
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=6, warmup_steps=6, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples()
    assert draws.keys() == model.priors().keys()
    assert all(bool(torch.isfinite(d).all()) for d in draws.values())


@every_family
def test_restricting_the_guide_is_slicing_the_network(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(),
                        nn.Linear(5, 3))  # fmt: skip
    x = torch.randn(3, 1, 4, 4)
    model = lift(net, name, "normal", x)
    posterior = Posterior(model, spread(model.new_guide()), 3)
    kept = {"0": np.array([1, 3]), "4": np.array([0, 2, 4])}
    small = posterior.restricted(kept)
    with torch.no_grad():
        expected = slice_groups(posterior.to_module(), model.spec, kept)(x)
        torch.testing.assert_close(small.to_module()(x), expected, rtol=1e-5, atol=1e-6)
        outputs = small.model.eval().run(small.mean(), x)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    laws, priors = small.guide.distributions(), small.model.priors()
    assert laws.keys() == priors.keys()
    assert all(laws[n].event_shape == priors[n].event_shape for n in laws)


@every_family
def test_settings_rebuild_the_family(name: str) -> None:
    family = make_family(name)
    assert repr(make_family(name, **family.settings())) == repr(family)
    assert make_family(family) is family
    for setting in family.settings():
        assert setting in repr(family)


@every_family
def test_references_are_present_and_the_docstring_names_their_years(name: str) -> None:
    cls = families()[name]
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    assert cls.references, "a method has a source"
    assert "References:" in text and ".. math::" in text
    for reference in cls.references:
        assert str(reference.year) in text, reference.key
        assert reference.authors.split(",")[0] in text, reference.key
        entry = reference.bibtex()
        assert reference.key in entry and reference.title in entry and entry.count("{") == entry.count("}")


@every_family
def test_building_and_scoring_leave_the_random_state_alone(name: str) -> None:
    model = lifted(name)
    guide = model.new_guide()
    before = torch.get_rng_state()
    lift(model.template, name, "categorical", torch.ones(1, 4).double())
    model.new_guide()
    presence_of(model, guide)
    Posterior(model, guide, 1).draw(3)
    assert torch.equal(before, torch.get_rng_state())
    assert len(list(pyro.get_param_store().keys())) == 0


def test_a_second_registration_of_a_name_is_refused() -> None:
    with pytest.raises(FamilyError, match="second registration.*another name"):
        type("Impostor", (families()["log_uniform"],), {"name": "log_uniform"})


def test_a_family_without_a_name_or_with_open_methods_is_not_registered() -> None:
    before = families()

    class Unnamed(families()["log_uniform"]):  # type: ignore[misc]
        pass

    class Open(Family):
        name = "open"

    assert families() == before


def test_unknown_names_and_settings_suggest_the_nearest() -> None:
    with pytest.raises(FamilyError, match=r"got 'grup_horseshoe'.*did you mean 'group_horseshoe'"):
        make_family("grup_horseshoe")
    with pytest.raises(FamilyError, match=r"got weight_scal.*did you mean 'weight_scale'"):
        make_family("log_uniform", weight_scal=2.0)
    with pytest.raises(FamilyError, match="low < high"):
        make_family("log_uniform", low=1.0)
    with pytest.raises(FamilyError, match="positive"):
        make_family("group_horseshoe", global_scale=0.0)
    with pytest.raises(FamilyError, match="settings"):
        make_family(make_family("log_uniform"), low=-10.0)


def test_a_family_from_outside_can_be_used_without_registration() -> None:
    """A user's own subclass without a name is still a family: it lifts and fits like the others."""

    class Narrow(families()["log_uniform"]):  # type: ignore[misc]
        def prior(self, spec: GroupSpec, like: Tensor) -> Mapping[str, Distribution]:
            return dict(super().prior(spec, like))

    model = lift(build(4, (5,), 3), Narrow(), Categorical(), torch.zeros(1, 4))
    x, y = some_data(dtype=torch.float32)
    assert bool(torch.isfinite(fast_loss(model, model.new_guide(), 6)(x, y, 1.0)))
