"""Masked equals cut, for networks and cuts drawn at random, and the forecast is exact."""

import copy

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyrobc.calling import call_network
from pyrobc.dependency import trace_groups
from pyrobc.errors import GroupError
from pyrobc.groups import GroupSpec, Kept
from pyrobc.slicing import SelectLinear, mask_groups, slice_groups

TOLERANCE = 1e-9  # float64: what differs by more is not rounding
SOME = hypothesis.settings(max_examples=25, suppress_health_check=list(hypothesis.HealthCheck))


class Residual(nn.Module):
    """h + f(h), f with an inner width of its own and batch norms."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.second, self.norm_out = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.norm_out(self.second(torch.relu(self.norm(self.first(h)))))


class Concatenate(nn.Module):
    """[h, f(h)] along channels."""

    def __init__(self, width: int, extra: int) -> None:
        super().__init__()
        self.branch = nn.Conv2d(width, extra, 1)

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([h, torch.tanh(self.branch(h))], dim=1)


@st.composite
def images(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Convolutions: plain, residual, depthwise, grouped and concatenating stages, pooling, flatten or global pool."""
    width, side = draw(st.integers(2, 5)), draw(st.sampled_from([4, 6]))
    layers: list[nn.Module] = [nn.Conv2d(2, width, 3, padding=1), nn.ReLU()]
    for stage in draw(
        st.lists(st.sampled_from(["plain", "residual", "depthwise", "grouped", "concatenate", "drop"]), max_size=3)
    ):
        if stage == "plain":
            new = draw(st.integers(2, 5))
            layers += [nn.Conv2d(width, new, 3, padding=1), nn.BatchNorm2d(new), nn.GELU()]
            width = new
        elif stage == "residual":
            layers += [Residual(width, draw(st.integers(2, 4)))]
        elif stage == "depthwise":
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU()]
        elif stage == "grouped":
            new = 2 * width * draw(st.integers(1, 2))
            layers += [nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, new, 3, padding=1, groups=width)]
            width = new
        elif stage == "concatenate":
            extra = draw(st.integers(2, 3))
            layers += [Concatenate(width, extra)]
            width += extra
        else:
            layers += [nn.Dropout2d(0.0)]
    pool = draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Identity()]))
    end = {nn.MaxPool2d: side // 2, nn.AvgPool2d: side // 2, nn.AdaptiveAvgPool2d: 1, nn.Identity: side}[type(pool)]
    hidden = draw(st.integers(2, 6))
    layers += [pool, nn.Flatten(), nn.Linear(width * end * end, hidden), nn.BatchNorm1d(hidden), nn.SiLU()]
    return shake(nn.Sequential(*layers, nn.Linear(hidden, 3)), draw), torch.randn(5, 2, side, side).double()


@st.composite
def perceptrons(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A perceptron, with batch norm and dropout here and there, on rows or on sequences of rows."""
    widths = draw(st.lists(st.integers(2, 7), min_size=2, max_size=4))
    is_sequence = draw(st.booleans())
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out, bias=draw(st.booleans()))]
        if draw(st.booleans()) and not is_sequence:
            layers += [nn.BatchNorm1d(fan_out, affine=draw(st.booleans()))]
        layers += [draw(st.sampled_from([nn.ReLU(), nn.Sigmoid(), nn.Dropout(0.0)]))]
    net = nn.Sequential(*layers, nn.Linear(widths[-1], 2))
    return shake(net, draw), torch.randn(*((5, 3) if is_sequence else (5,)), widths[0]).double()


@st.composite
def signals(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """One-dimensional convolutions."""
    a, b = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    first = [nn.Conv1d(1, a, 3), nn.BatchNorm1d(a), nn.ReLU(), nn.MaxPool1d(2)]
    net = nn.Sequential(*first, nn.Conv1d(a, b, 2), nn.ReLU(), nn.Flatten(), nn.Linear(b * 2, 2))
    return shake(net, draw), torch.randn(5, 1, 8).double()


def shake(net: nn.Module, draw: st.DrawFn) -> nn.Module:
    """Random parameters and statistics, in float64: nothing is at a value that hides a mistake."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    net = net.double()
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor))
    return net


def some_kept(spec: GroupSpec, seed: int) -> dict[str, np.ndarray]:
    """A random cut that leaves every layer at least one channel."""
    rng = np.random.default_rng(seed)
    kept = {b.name: np.sort(rng.permutation(b.size)[: rng.integers(1, b.size + 1)]) for b in spec.blocks}
    while emptied := spec.emptied(kept):
        block, group = next(iter(emptied.values()))[0]
        kept[block] = np.union1d(kept[block], [group])
    return kept


def assert_masked_equals_cut(net: nn.Module, spec: GroupSpec, kept: Kept, x: object) -> nn.Module:
    masked, cut = mask_groups(net, spec, kept), slice_groups(net, spec, kept)
    for is_training in (False, True):
        with torch.no_grad():
            a, b = (call_network(n.train(is_training), x) for n in (masked, cut))
        assert float((a - b).abs().max()) <= TOLERANCE * (1 + float(a.abs().max())), f"training={is_training}"
    indices, after = spec.kept_indices(kept), dict(cut.named_buffers())
    for name, buffer in masked.named_buffers():  # batch-norm statistics moved the same way
        if name in after and "running" in name:
            want = buffer[torch.as_tensor(indices[name, 0])] if (name, 0) in indices else buffer
            torch.testing.assert_close(after[name], want, rtol=1e-9, atol=1e-9)
    return cut


def count_macs(net: nn.Module, x: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call_network(net.eval(), x)
    return counter.get_total_flops() // 2


@SOME
@hypothesis.given(st.one_of(images(), perceptrons(), signals()), st.integers(0, 10_000))
def test_masked_equals_cut_and_the_forecast_is_exact(case: tuple[nn.Module, Tensor], seed: int) -> None:
    net, x = case
    before = copy.deepcopy(net.state_dict())
    spec = trace_groups(net, x[:2])
    kept = some_kept(spec, seed)
    cut = assert_masked_equals_cut(net, spec, kept, x)
    parameters, macs = spec.forecast(kept)
    assert parameters == sum(p.numel() for p in cut.parameters())
    assert macs * len(x) == count_macs(cut, x)
    assert spec.forecast(spec.everything()) == (sum(p.numel() for p in net.parameters()), count_macs(net, x) // len(x))
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items()), "the network itself was changed"


@SOME
@hypothesis.given(st.one_of(images(), perceptrons()), st.integers(0, 10_000))
def test_two_cuts_are_one(case: tuple[nn.Module, Tensor], seed: int) -> None:
    """Cutting what is left, in the numbering of what is left, is the cut of the composed indices."""
    net, x = case
    spec = trace_groups(net, x[:2])
    first = some_kept(spec, seed)
    left = spec.restricted(first)
    second = some_kept(left, seed + 1)
    composed = {name: index[second[name]] for name, index in first.items()}
    once = slice_groups(net, spec, composed).eval()
    small = slice_groups(net, spec, first)
    assert_masked_equals_cut(small, left, second, x)
    twice = slice_groups(small, left, second).eval()
    with torch.no_grad():
        torch.testing.assert_close(once(x), twice(x), rtol=1e-9, atol=1e-9)
    assert left.restricted(second).tensors == {n: tuple(t.shape) for n, t in twice.state_dict().items()}
    assert left.forecast(second) == spec.forecast(composed)
    assert left.tensors == {n: tuple(t.shape) for n, t in small.state_dict().items()}


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_loses_whole_groups(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=groups), nn.ReLU(),
                        nn.Flatten(), nn.Linear(48, 2)).double()  # fmt: skip
    x = torch.randn(4, 3, 4, 4).double()
    spec = trace_groups(net, x)
    assert {b.name: b.size for b in spec.blocks} == {"0": groups}
    cut = assert_masked_equals_cut(net, spec, {"0": np.array([0, groups - 1])[: groups // 2]}, x)
    assert (cut[0].out_channels, cut[3].in_channels, cut[3].out_channels, cut[3].groups) == (4, 4, 6, groups // 2)


class Negate(nn.Module):
    """-h."""

    def forward(self, h: Tensor) -> Tensor:
        return -h


def test_concatenated_channels_keep_their_place_through_a_flatten() -> None:
    """Whatever comes before a ReLU, and whichever sign passes it."""
    net = nn.Sequential(nn.Conv2d(2, 3, 1), Negate(), nn.ReLU(), Concatenate(3, 2), nn.BatchNorm2d(5), nn.ReLU(),
                        Concatenate(5, 2), nn.Flatten(), nn.Linear(28, 3)).double()  # fmt: skip
    with torch.no_grad():
        net[4].weight.fill_(-1.0)
        net[4].bias.fill_(-0.1)
    x = torch.randn(4, 2, 2, 2).double()
    spec = trace_groups(net, x)
    assert {b.name: b.size for b in spec.blocks} == {"0": 3, "3.branch": 2, "6.branch": 2}
    for seed in range(5):
        assert_masked_equals_cut(net, spec, some_kept(spec, seed), x)


def test_keeping_everything_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    spec = trace_groups(net, torch.randn(1, 4))
    same = slice_groups(net, spec, spec.everything())
    assert [type(m) for m in same] == [type(m) for m in net]
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), net.state_dict().values(), strict=True))
    assert same is not net and all(a is not b for a, b in zip(same.parameters(), net.parameters(), strict=True))


def test_pruned_input_features_are_selected_and_selected_again() -> None:
    net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    x = torch.randn(4, 6).double()
    spec = trace_groups(net, x)
    small = slice_groups(net, spec, {"input": np.array([1, 2, 5]), "0": np.arange(3)})
    assert isinstance(small[0], SelectLinear) and small[0].index.tolist() == [1, 2, 5] and small[0].in_features == 3
    traced = trace_groups(small, x)  # a cut network can be traced like any other
    assert {b.name: b.size for b in traced.blocks} == {"input": 3, "0": 3}
    smaller = slice_groups(small, traced, {"input": np.array([0, 2]), "0": np.array([1])})
    assert smaller[0].index.tolist() == [1, 5]
    with torch.no_grad():
        expected = (
            torch.relu(x[:, [1, 5]] @ net[0].weight[1, [1, 5]] + net[0].bias[1])[:, None] @ net[2].weight[:, 1:2].T
        )
        torch.testing.assert_close(smaller(x), expected + net[2].bias)


def test_cut_layers_say_what_they_are() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.Linear(16, 2))  # fmt: skip
    spec = trace_groups(net, torch.randn(1, 2, 6, 6))
    small = slice_groups(net, spec, {"0": np.array([0, 3])})
    assert (small[0].out_channels, small[1].in_channels, small[1].out_channels, small[1].groups) == (2, 2, 2, 2)
    assert (small[2].num_features, small[5].in_features, small[5].out_features) == (2, 8, 2)
    frozen = net.requires_grad_(False)
    assert not any(p.requires_grad for p in slice_groups(frozen, spec, {"0": np.array([0])}).parameters())


def test_a_layer_may_be_emptied_while_its_block_is_not() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), Concatenate(3, 2), nn.Conv2d(5, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)
    )
    net = nn.Sequential(*net[:2], Residual(5, 2), *net[2:])
    spec = trace_groups(net, torch.randn(2, 2, 4, 4))
    block = next(b for b in spec.blocks if any(m.parameter == "1.branch.weight" and m.axis == 0 for m in b.members))
    branch = next(m for m in block.members if m.parameter == "1.branch.weight" and m.axis == 0)
    kept = spec.everything() | {block.name: np.flatnonzero(np.diff(branch.ptr) == 0)}
    emptied = spec.emptied(kept)
    assert ("1.branch.weight", 0) in emptied
    assert emptied["1.branch.weight", 0] == [(block.name, int(g)) for g in np.flatnonzero(np.diff(branch.ptr))]
    with pytest.raises(GroupError, match=r"groups to keep.*branch.*at least one channel"):
        slice_groups(net, spec, kept)
