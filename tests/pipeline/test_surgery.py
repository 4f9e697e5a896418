"""Cut networks against masked ones, on random cuts, and every refusal."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pyrobc.errors import PlanError, SurgeryError
from pyrobc.plan import Plan
from pyrobc.surgery import apply, mask

SHARED = HealthCheck.function_scoped_fixture


@settings(max_examples=25, suppress_health_check=[SHARED])
@given(data=st.data())
def test_cut_equals_masked(traced, keeping, data):
    """The masked network is also built here a second way: zero what reads a removed group, by the group table."""
    net, spec, inputs = traced
    kept = {b.name: data.draw(st.sets(st.integers(0, b.size - 1), min_size=1), label=b.name) for b in spec.blocks}
    plan = keeping(spec, {name: sorted(groups) for name, groups in kept.items()})
    small = apply(plan, net, example_inputs=inputs)
    twin = copy.deepcopy(net)
    tensors = dict(twin.named_parameters())
    with torch.no_grad():
        for block in spec.blocks:
            for group in set(range(block.size)) - kept[block.name]:
                for member in block.consumers:
                    for index in member.indices[member.ptr[group] : member.ptr[group + 1]]:
                        tensors[member.parameter].select(member.axis, int(index)).zero_()
        expected = twin(inputs)
        torch.testing.assert_close(small(inputs), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(mask(plan, net)(inputs), expected, rtol=0, atol=0)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1]
    assert not small.training


def test_empty_cut_changes_nothing(traced, keeping):
    net, spec, inputs = traced
    plan = keeping(spec, {b.name: np.arange(b.size) for b in spec.blocks})
    small = apply(plan, net, example_inputs=inputs)
    assert plan.compression_ratio == 1
    assert torch.equal(small(inputs), net(inputs))
    assert small.state_dict().keys() == net.state_dict().keys()


def test_user_network_is_not_changed(traced, keeping):
    net, spec, inputs = traced
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small = apply(keeping(spec, {b.name: [0] for b in spec.blocks}), net, example_inputs=inputs)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_plan_from_disk_cuts_the_same(traced, keeping):
    net, spec, inputs = traced
    plan = keeping(spec, {b.name: [0, b.size - 1] for b in spec.blocks})
    first, again = (apply(p, net, example_inputs=inputs) for p in (plan, Plan.from_json(plan.to_json())))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_compact_network_can_be_trained(traced, keeping):
    net, spec, inputs = traced
    small = apply(keeping(spec, {b.name: [0, 1] for b in spec.blocks}), net, example_inputs=inputs)
    small.train()(inputs).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in small.parameters())


def test_already_cut_network_is_refused(traced, keeping):
    net, spec, inputs = traced
    plan = keeping(spec, {b.name: [0] for b in spec.blocks})
    with pytest.raises(PlanError, match="apply the plan to the network it was made for, before any cut"):
        apply(plan, apply(plan, net, example_inputs=inputs), example_inputs=inputs)


def test_other_network_is_refused(traced, keeping):
    _, spec, inputs = traced
    plan = keeping(spec, {b.name: [0] for b in spec.blocks})
    with pytest.raises(PlanError, match="got shape"):
        apply(plan, nn.Linear(3, 2), example_inputs=inputs)


def test_plan_that_mixes_up_channels_is_refused(traced, keeping):
    """The last layer would read other channels than the ones that were kept for it."""
    net, spec, inputs = traced
    plan = keeping(spec, {b.name: np.arange(b.size - 2) for b in spec.blocks})
    last = max(i for i, part in enumerate(plan.slices) if part.role == "consume")
    length = plan.network[plan.slices[last].tensor][plan.slices[last].axis]
    wrong = dataclasses.replace(plan.slices[last], kept=tuple(range(length - len(plan.slices[last].kept), length)))
    mixed = dataclasses.replace(plan, slices=(*plan.slices[:last], wrong, *plan.slices[last + 1 :]))
    with pytest.raises(SurgeryError, match="differ from the masked network's by"):
        apply(mixed, net, example_inputs=inputs)


def test_not_a_number_does_not_pass_the_check(traced, keeping):
    net, spec, inputs = traced
    plan = keeping(spec, {b.name: [0, 1] for b in spec.blocks})
    with pytest.raises(SurgeryError, match="nan"):
        apply(plan, net, example_inputs=torch.full_like(inputs, torch.nan))


def test_posterior_is_cut_at_its_mean(compressed):
    x, y = compressed.data
    full, small = compressed.posterior.to_module(), compressed.net
    assert sum(p.numel() for p in small.parameters()) == compressed.plan.parameters[1]
    with torch.no_grad():
        agree = (full(x).argmax(1) == small(x).argmax(1)).float().mean()
        right = (small(x).argmax(1) == y).float().mean()
    assert agree > 0.97 and right > 0.85
