"""What is found in a network, what is left alone and why, and what is refused."""

import copy
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pyrobc.dependency import trace_groups
from pyrobc.errors import GroupError
from pyrobc.family import Effective
from pyrobc.lift import lift
from pyrobc.models.lenet import lenet_5, lenet_5_caffe
from pyrobc.models.mlp import lenet_300_100
from pyrobc.slicing import mask_groups, slice_groups


class Forward(nn.Module):
    """Named layers and a forward pass given as a function of them and the inputs."""

    def __init__(self, forward: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._run = forward

    def forward(self, *args: Tensor, **kwargs: Tensor) -> object:
        return self._run(self, *args, **kwargs)


def sizes(net: nn.Module, x: object, **kwargs: bool) -> dict[str, int]:
    return {b.name: b.size for b in trace_groups(net, x, **kwargs).blocks}


def test_documented_networks_have_their_published_groups_and_costs() -> None:
    spec = trace_groups(lenet_300_100(), torch.zeros(1, 1, 28, 28))
    assert {b.name: b.size for b in spec.blocks} == {"input": 784, "1": 300, "3": 100}
    assert spec.forecast(spec.everything()) == (266_610, 784 * 300 + 300 * 100 + 1000)
    assert spec.left_alone == {"5": "it makes the network's output"}
    caffe = trace_groups(lenet_5_caffe(), torch.zeros(1, 1, 28, 28))
    assert {b.name: b.size for b in caffe.blocks} == {"0": 20, "3": 50, "7": 500}
    assert caffe.forecast(caffe.everything()) == (431_080, 288_000 + 1_600_000 + 400_000 + 5_000)
    assert [len(m.indices) for m in caffe.block("3").consumers] == [800]  # 4 x 4 positions a channel
    assert sizes(lenet_5(), torch.zeros(1, 1, 28, 28)) == {"0": 6, "3": 16, "7": 120, "9": 84}


def test_a_residual_add_ties_its_branches_into_one_block() -> None:
    net = Forward(
        lambda n, x: n.head(torch.relu((h := torch.relu(n.stem(x))) + n.b(torch.relu(n.a(h))))),
        stem=nn.Linear(4, 6), a=nn.Linear(6, 3), b=nn.Linear(3, 6), head=nn.Linear(6, 2),
    )  # fmt: skip
    spec = trace_groups(net, torch.randn(2, 4))
    assert {b.name: b.size for b in spec.blocks} == {"input": 4, "stem": 6, "a": 3}
    members = {(m.parameter, m.axis, m.role) for m in spec.block("stem").members}
    assert members == {
        ("stem.weight", 0, "produce"), ("stem.bias", 0, "produce"), ("b.weight", 0, "produce"),
        ("b.bias", 0, "produce"), ("a.weight", 1, "consume"), ("head.weight", 1, "consume"),
    }  # fmt: skip


def test_the_order_of_registration_does_not_matter() -> None:
    net = Forward(lambda n, x: n.head(torch.relu(n.b(torch.relu(n.a(x))))), head=nn.Linear(5, 2), b=nn.Linear(4, 5),
                  a=nn.Linear(3, 4))  # fmt: skip
    assert sizes(net, torch.randn(1, 3)) == {"input": 3, "b": 5, "a": 4}


def test_adding_the_raw_input_keeps_its_width() -> None:
    net = Forward(lambda n, x: n.head(x + n.a(x)), a=nn.Linear(4, 4), head=nn.Linear(4, 2))
    spec = trace_groups(net, torch.randn(2, 4))
    assert "a" not in spec.by_name and "a" in spec.left_alone


def repeated() -> nn.Module:
    return Forward(lambda n, x: n.out(n.same(torch.tanh(n.same(x)))), same=nn.Linear(4, 4), out=nn.Linear(4, 2))


def tied() -> nn.Module:
    net = Forward(lambda n, x: n.out(torch.tanh(n.b(torch.tanh(n.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4),
                  out=nn.Linear(4, 2))  # fmt: skip
    net.b.weight = net.a.weight
    return net


@pytest.mark.parametrize(
    ("net", "x", "layer", "why"),
    [
        (repeated(), torch.randn(1, 4), "same", "called 2 times"),
        (tied(), torch.randn(1, 4), "a", "tied: a.weight = b.weight"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
            torch.randn(1, 3),
            "0",
            "layer normalisation.*prune_residual=True",
        ),
        (nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), torch.randn(1, 3), "0", "PReLU"),
        (
            nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2)),
            torch.randn(1, 2, 2, 2),
            "0",
            "GroupNorm",
        ),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2)),
            torch.randn(1, 4, 2, 2),
            "0",
            "grouped convolution that reads what cannot be cut",
        ),
        (
            Forward(lambda n, x: n.out(n.a(x).view(-1, 4)), a=nn.Conv2d(1, 1, 1), out=nn.Linear(4, 2)),
            torch.randn(1, 1, 2, 2),
            "out",
            "output",
        ),
        (
            Forward(
                lambda n, x: n.c(torch.relu(n.b(torch.relu(n.a(x)).view(-1, 12)))),
                a=nn.Conv2d(1, 3, 1), b=nn.Linear(12, 5), c=nn.Linear(5, 2),
            ),
            torch.randn(1, 1, 2, 2),
            "a",
            "cut|shape",
        ),
        (
            Forward(lambda n, x: n.c(n.b(torch.softmax(n.a(x), 1))), a=nn.Linear(3, 4), b=nn.Linear(4, 3),
                    c=nn.Linear(3, 2)),
            torch.randn(1, 3),
            "a",
            "cutting it changes an output by",
        ),
        (
            Forward(lambda n, x: n.c(n.b((h := n.a(x)) - h.mean(1, keepdim=True))), a=nn.Linear(3, 4, bias=False),
                    b=nn.Linear(4, 3), c=nn.Linear(3, 2)),
            torch.zeros(1, 3),  # on which nothing that is done to `a` would show
            "a",
            "cutting it changes an output by",
        ),
        (
            Forward(lambda n, x: (n.c(torch.relu(h := n.a(x))), h), a=nn.Linear(3, 4), c=nn.Linear(4, 2)),
            torch.randn(1, 3),
            "a",
            "output",
        ),
    ],
    ids=["repeated", "tied", "layer norm", "prelu", "group norm", "grouped", "output", "view", "softmax", "centred on "
         "zeros", "second output"],
)  # fmt: skip
def test_layers_are_left_alone_with_the_reason(net: nn.Module, x: Tensor, layer: str, why: str) -> None:
    try:
        reasons = trace_groups(net, x).left_alone
    except GroupError as error:  # nothing else is left to prune: the message holds the reasons
        reasons = dict(part.split(": ", 1) for part in error.got.split("; "))
    assert re.search(why, reasons[layer]), reasons


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "got None"),
        ((), "got no tensor"),
        (torch.zeros(0, 4), "no examples"),
        (torch.zeros(()), "no examples"),
        (torch.zeros(1, 5), r"example_inputs: got shape \(1, 5\), on which the network raises RuntimeError"),
        ({"y": torch.zeros(1, 4)}, "on which the network raises TypeError"),
        ((torch.zeros(1, 4), torch.zeros(1, 4)), "on which the network raises TypeError"),
    ],
)
def test_examples_the_network_cannot_take_are_refused(example: object, message: str) -> None:
    with pytest.raises(GroupError, match=message) as caught:
        trace_groups(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), example)
    assert "x[:1]" in caught.value.fix


def test_networks_without_groups_are_refused() -> None:
    with pytest.raises(GroupError, match="without a prunable group.*prune_inputs=True"):
        trace_groups(nn.Linear(4, 2), torch.randn(1, 4), prune_inputs=False)
    with pytest.raises(GroupError, match="no linear or convolution layer"):
        trace_groups(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.randn(1, 4))
    with pytest.raises(GroupError, match="remove_parametrizations"):
        trace_groups(nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)), torch.randn(1, 4))
    assert sizes(nn.Linear(4, 2), torch.randn(1, 4)) == {"input": 4}


def test_networks_autograd_cannot_follow_are_refused_or_left_alone() -> None:
    net = Forward(lambda n, x: n.b(n.a(x).detach()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    try:
        spec = trace_groups(net, torch.randn(1, 3))
    except GroupError:
        return
    assert "a" not in spec.by_name  # else cutting `a` without `b` was offered


def test_inputs_may_be_dicts_and_tuples() -> None:
    net = Forward(lambda n, left, right: n.out(torch.relu(n.a(left) + n.b(right))), a=nn.Linear(2, 3),
                  b=nn.Linear(4, 3), out=nn.Linear(3, 2))  # fmt: skip
    pair = torch.randn(2, 2), torch.randn(2, 4)
    expected = {"input:a": 2, "input:b": 4, "a": 3}
    assert sizes(net, pair) == sizes(net, {"left": pair[0], "right": pair[1]}) == expected
    assert sizes(net, pair, prune_inputs=False) == {"a": 3}


def test_a_layer_called_input_does_not_clash_with_the_input_features() -> None:
    net = Forward(lambda n, x: n.out(torch.relu(n.input(x))), input=nn.Linear(4, 3), out=nn.Linear(3, 2))
    assert sizes(net, torch.randn(1, 4)) == {"input:input": 4, "input": 3}


def test_modules_that_are_not_used_stay_as_they_are() -> None:
    net = Forward(lambda n, x: n.b(torch.relu(n.a(x))), a=nn.Linear(4, 3), unused=nn.Linear(3, 3), b=nn.Linear(3, 2))
    x = torch.randn(5, 4)
    model = lift(net, "group_horseshoe", "categorical", x)
    assert set(model.spec.by_name) == {"input", "a"}
    assert model.spec.left_alone["unused"] == "called 0 times on the example (once is needed)"
    assert model.spec.parameters["unused.weight"].kind == "other"
    model(x, torch.zeros(5, dtype=torch.long))
    assert torch.equal(model.template.unused.weight, net.unused.weight)


def test_weights_used_without_a_call_are_no_gated_layer() -> None:
    """Numbers that a forward pass takes from a layer past its call would miss the gates: it is not lifted."""
    net = Forward(
        lambda n, x: n.b(torch.relu(nn.functional.linear(x, n.a.weight))), a=nn.Linear(4, 3), b=nn.Linear(3, 2)
    )
    x = torch.randn(5, 4)
    model = lift(net, "log_uniform", "categorical", x)
    assert "a" not in model.spec.by_name and "called 0 times" in model.spec.left_alone["a"]
    effective = Effective({b.name: torch.ones(b.size) for b in model.spec.blocks}, dict(net.named_parameters()))
    torch.testing.assert_close(model.run(effective, x), net(x))


@pytest.mark.parametrize("is_training", [True, False])
def test_in_place_operations_after_an_add_are_followed(is_training: bool) -> None:
    net = Forward(
        lambda n, x: n.head(n.relu((h := n.relu(n.stem(x))) + n.b(n.relu(n.norm(n.a(h))))).mean((2, 3))),
        stem=nn.Conv2d(2, 4, 1), a=nn.Conv2d(4, 3, 1), norm=nn.BatchNorm2d(3), b=nn.Conv2d(3, 4, 1),
        head=nn.Linear(4, 2), relu=nn.ReLU(inplace=True),
    ).train(is_training)  # fmt: skip
    x = torch.randn(3, 2, 4, 4)
    spec = trace_groups(net, x)
    assert {b.name: b.size for b in spec.blocks} == {"stem": 4, "a": 3}
    kept = {"stem": np.array([0, 3]), "a": np.array([1])}
    masked, cut = mask_groups(net, spec, kept), slice_groups(net, spec, kept)
    torch.testing.assert_close(cut(x), masked(x), rtol=0, atol=1e-5)
    model = lift(net, "log_uniform", "categorical", x)
    gates = {
        name: torch.zeros(spec.block(name).size).index_fill(0, torch.as_tensor(i), 1.0) for name, i in kept.items()
    }
    lifted = model.run(Effective(gates, dict(net.named_parameters())), x)
    torch.testing.assert_close(lifted, cut.train(is_training)(x), rtol=0, atol=1e-5)


def test_frozen_parameters_are_no_sites_but_can_be_cut() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    spec = trace_groups(net, torch.randn(1, 4))
    assert set(spec.parameters) == {"2.weight", "2.bias"} and set(spec.by_name) == {"input", "0"}


@pytest.mark.parametrize("family", ["log_uniform", "group_horseshoe"])
@pytest.mark.parametrize("is_training", [True, False])
def test_tracing_and_lifting_change_nothing_of_the_users(family: str, is_training: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                        nn.Linear(12, 2)).train(is_training)  # fmt: skip
    net[0].bias.requires_grad_(False)
    x = torch.randn(2, 1, 4, 4)
    before, x_before = copy.deepcopy(net), x.clone()
    identities = [id(p) for p in net.parameters()]
    random_state = torch.get_rng_state()
    model = lift(net, family, "categorical", x)
    assert torch.equal(random_state, torch.get_rng_state())
    model(x, torch.tensor([0, 1]))
    for (name, a), b in zip(net.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(x, x_before) and x.grad is None
    assert identities == [id(p) for p in net.parameters()]
    for p, q in zip(net.parameters(), before.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and p.grad is None
    for m in net.modules():
        assert m.training == is_training
        assert not m._forward_hooks and not m._forward_pre_hooks
    assert [type(m) for m in net.modules()] == [type(m) for m in before.modules()]
