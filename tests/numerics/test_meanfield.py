"""Mean-field guides: one factor per site, whatever its name, put back into range and cut with the network."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import kl_divergence

from pyrobc.groups import Block, GroupSpec, Member, ParameterInfo
from pyrobc.meanfield import LogNormalFactor, MeanFieldGuide, NormalFactor, PointFactor


def guide() -> MeanFieldGuide:
    return MeanFieldGuide(
        {
            "a.weight": NormalFactor(torch.arange(6.0).reshape(3, 2), -1.0),
            "b.c.weight": PointFactor(torch.arange(12.0).reshape(2, 6)),
            "a.local": LogNormalFactor(torch.tensor([0.1, 0.2, 0.3]), -2.0),
            "a.global": LogNormalFactor(torch.tensor(0.5), -2.0),
        }
    )


def spec() -> GroupSpec:
    ptr = np.array([0, 1, 2, 3])
    block = Block(
        "a",
        3,
        (
            Member("a.weight", 0, "produce", ptr, np.arange(3)),
            Member("b.c.weight", 1, "consume", 2 * ptr, np.arange(6)),
        ),
    )
    shapes = {"a.weight": (3, 2), "b.c.weight": (2, 6)}
    parameters = {n: ParameterInfo(s, "weight") for n, s in shapes.items()}
    return GroupSpec((block,), parameters, (), {}, shapes)


def test_sites_keep_their_dotted_names() -> None:
    g = guide()
    trace = poutine.trace(g).get_trace("anything", more=1)
    assert set(trace.stochastic_nodes) == set(g.by_site()) == {"a.weight", "b.c.weight", "a.local", "a.global"}
    assert all(trace.nodes[n]["fn"].batch_shape == () for n in trace.stochastic_nodes)
    assert torch.equal(trace.nodes["b.c.weight"]["value"], torch.arange(12.0).reshape(2, 6))


def test_factors_have_the_moments_they_say() -> None:
    laws = guide().distributions()
    normal, log_normal = laws["a.weight"].base_dist, laws["a.local"].base_dist
    assert float(normal.scale[0, 0].detach()) == pytest.approx(math.exp(-1))
    want = (torch.tensor([0.1, 0.2, 0.3]) + 0.5 * math.exp(-4)).exp()
    torch.testing.assert_close(log_normal.mean.detach(), want)
    prior = dist.Normal(torch.zeros(2, 6), torch.ones(2, 6)).to_event(2)
    kl = kl_divergence(laws["b.c.weight"], prior)
    torch.testing.assert_close(kl.detach(), -prior.log_prob(torch.arange(12.0).reshape(2, 6)))


def test_scales_are_clipped_where_asked() -> None:
    g = MeanFieldGuide({"w": NormalFactor(torch.zeros(3), 1.0, max_scale=0.2), "v": NormalFactor(torch.zeros(3), 1.0)})
    g.project_()
    scales = {n: float(law.base_dist.scale.max().detach()) for n, law in g.distributions().items()}
    assert scales == {"w": pytest.approx(0.2), "v": pytest.approx(math.e)}


def test_factors_do_not_share_memory_with_what_started_them() -> None:
    start = torch.zeros(3)
    g = MeanFieldGuide({"w": PointFactor(start), "v": NormalFactor(start, -1.0)})
    with torch.no_grad():
        for p in g.parameters():
            p.add_(1.0)
    assert torch.equal(start, torch.zeros(3))


def test_parameter_groups_carry_their_factor_on_the_learning_rate() -> None:
    g = guide()
    g.by_site()["a.local"].lr_scale = 10.0
    groups = {group["lr_scale"]: len(group["params"]) for group in g.parameter_groups()}
    assert groups == {1.0: 5, 10.0: 2}
    assert sum(len(group["params"]) for group in g.parameter_groups()) == len(list(g.parameters()))


def test_restricting_slices_parameters_and_scales_and_nothing_else() -> None:
    g = guide()
    small = g.restricted(spec(), {"a": np.array([0, 2])}).by_site()
    assert torch.equal(small["a.weight"].loc, torch.tensor([[0.0, 1.0], [4.0, 5.0]]))
    assert small["a.weight"].log_scale.shape == (2, 2)
    assert torch.equal(small["b.c.weight"].value, torch.tensor([[0.0, 1.0, 4.0, 5.0], [6.0, 7.0, 10.0, 11.0]]))
    assert torch.equal(small["a.local"].loc, torch.tensor([0.1, 0.3]))
    assert small["a.global"].loc.shape == ()
    assert g.by_site()["a.weight"].loc.shape == (3, 2), "the guide itself was cut"
    assert all(p.is_leaf and p.requires_grad for f in small.values() for p in f.parameters())
