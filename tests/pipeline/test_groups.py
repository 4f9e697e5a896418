"""Groups as data: what belongs to whom, what stays of every axis, and what is left costs."""

import numpy as np
import pytest

from pyrobc.errors import GroupError
from pyrobc.groups import Block, GroupSpec, Layer, Member, ParameterInfo


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def two_blocks() -> GroupSpec:
    """conv (3 channels) and side (2 channels), concatenated and flattened over 2 positions into fc, 10 -> 4."""
    conv = Block(
        "conv",
        3,
        (
            Member("conv.weight", 0, "produce", ints(0, 1, 2, 3), ints(0, 1, 2)),
            Member("conv.bias", 0, "produce", ints(0, 1, 2, 3), ints(0, 1, 2)),
            Member("fc.weight", 1, "consume", ints(0, 2, 4, 6), ints(0, 1, 2, 3, 4, 5)),
        ),
    )
    side = Block(
        "side",
        2,
        (
            Member("side.weight", 0, "produce", ints(0, 1, 2), ints(0, 1)),
            Member("fc.weight", 1, "consume", ints(0, 2, 4), ints(6, 7, 8, 9)),
        ),
    )
    parameters = {
        "conv.weight": ParameterInfo((3, 1, 1), "weight"),
        "conv.bias": ParameterInfo((3,), "bias"),
        "side.weight": ParameterInfo((2, 1, 1), "weight"),
        "fc.weight": ParameterInfo((4, 10), "weight"),
        "fc.bias": ParameterInfo((4,), "bias"),
    }
    layers = (Layer("conv.weight", 6), Layer("side.weight", 4), Layer("fc.weight", 40))
    return GroupSpec((conv, side), parameters, layers, {}, {n: p.shape for n, p in parameters.items()})


def test_members_own_their_indices() -> None:
    member = Member("fc.weight", 1, "consume", ints(0, 2, 2, 5), ints(4, 0, 3, 1, 2))
    assert [member.owned_by(ints(g)).tolist() for g in range(3)] == [[4, 0], [], [3, 1, 2]]
    assert member.owned_by(ints(0, 2)).tolist() == [4, 0, 3, 1, 2]
    assert member.owned_by(ints()).tolist() == []
    assert member.group_of_index().tolist() == [0, 2, 2, 2, 0]
    assert member.module == "fc" and Member("weight", 1, "consume", ints(0), ints()).module == ""


def test_an_axis_shared_by_two_blocks_loses_the_parts_of_both() -> None:
    kept = {"conv": ints(0, 2), "side": ints(1)}
    found = two_blocks().kept_indices(kept)
    assert found["fc.weight", 1].tolist() == [0, 1, 4, 5, 8, 9]
    assert found["conv.weight", 0].tolist() == found["conv.bias", 0].tolist() == [0, 2]
    assert found["side.weight", 0].tolist() == [1]
    assert ("fc.bias", 0) not in found


def test_what_is_left_has_the_costs_that_were_forecast() -> None:
    spec, kept = two_blocks(), {"conv": ints(0, 2), "side": ints(1)}
    assert spec.forecast(spec.everything()) == (3 + 3 + 2 + 40 + 4, 50)
    assert spec.forecast(kept) == (2 + 2 + 1 + 24 + 4, 4 + 2 + 24)
    left = spec.restricted(kept)
    assert left.forecast(left.everything()) == spec.forecast(kept)
    assert left.tensors["fc.weight"] == left.parameters["fc.weight"].shape == (4, 6)
    assert left.block("side").members[1].indices.tolist() == [4, 5]
    assert left.block("conv").members[2].ptr.tolist() == [0, 2, 4]
    assert left.num_groups == 3


def test_counts_labels_and_names() -> None:
    spec = two_blocks()
    assert spec.num_groups == 5
    assert spec.labels() == ["conv[0]", "conv[1]", "conv[2]", "side[0]", "side[1]"]
    assert [m.parameter for m in spec.block("conv").consumers] == ["fc.weight"]
    assert not spec.block("conv").is_input and spec.selecting() == set()
    with pytest.raises(GroupError, match=r"block: got 'convv'; allowed: 'conv', 'side'; fix: did you mean 'conv'\?"):
        spec.block("convv")


def test_specs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        two_blocks().blocks = ()  # type: ignore[misc]
