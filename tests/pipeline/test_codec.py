"""The .rbc file: exact where it says so, within the round-off elsewhere, near the entropy, and safe to read."""

import math
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import nn

from pyrobc.codec import rbc as codec
from pyrobc.codec.coder import BitMeter, BitReader, BitWriter
from pyrobc.codec.format import FieldWriter
from pyrobc.codec.geometry import Geometry
from pyrobc.codec.priors import find_level
from pyrobc.codec.reader import NodeReader
from pyrobc.codec.sparse import SparseCoder
from pyrobc.codec.streams import SymbolReader, SymbolWriter, adaptive_cost
from pyrobc.errors import OutputError
from pyrobc.slicing import SelectLinear

ROUND_OFF = 1 + 1e-6  # float32 cannot hold every multiple of a step that is no power of two
SOME = hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))


def select(inputs: int, kept: list[int], outputs: int, bias: bool = True) -> SelectLinear:
    assert max(kept) < inputs
    return SelectLinear(nn.Linear(len(kept), outputs, bias=bias), torch.tensor(kept))


def sparsify(net: nn.Module, density: float) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_((torch.rand_like(parameter) < density).float())
    return net


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 5), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3),
    ).eval()  # fmt: skip


def differences(a: nn.Module, b: nn.Module) -> dict[str, float]:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert [(t.shape, t.dtype) for t in ours.values()] == [(t.shape, t.dtype) for t in theirs.values()]
    return {name: float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours}


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Trees of supported layers with sparse, constant, repeated or arbitrary tensors; not meant to be run."""
    sizes = st.integers(1, 9)

    def fill(module: nn.Module) -> nn.Module:
        for tensor in [*module.parameters(), *module.buffers()]:
            if not tensor.is_floating_point():
                continue
            kind = draw(st.sampled_from(["zero", "one", "few", "sparse", "any"]))
            values = torch.randn(tensor.shape) * draw(st.sampled_from([1e-3, 0.1, 1.0, 50.0]))
            if kind == "zero":
                values.zero_()
            elif kind == "one":
                values.fill_(0.3)
            elif kind == "few":
                values = values.sign() * 0.7
            elif kind == "sparse":
                values *= torch.rand(values.shape) < 0.2
            is_variance = tensor is getattr(module, "running_var", None)
            tensor.data.copy_(values.abs() if is_variance else values)
        return module

    def layer() -> nn.Module:
        makers: list[Callable[[], nn.Module]] = [
            lambda: nn.Linear(draw(sizes), draw(sizes), bias=draw(st.booleans())),
            lambda: select(200, sorted(draw(st.sets(st.integers(0, 199), min_size=1, max_size=40))), draw(sizes)),
            lambda: nn.Conv2d(draw(sizes), draw(sizes), (draw(sizes), draw(sizes)), stride=draw(sizes)),
            lambda: nn.Conv1d(4, 8, draw(sizes), groups=draw(st.sampled_from([1, 2, 4]))),
            lambda: nn.BatchNorm1d(draw(sizes), affine=draw(st.booleans())),
            nn.ReLU,
        ]
        return fill(draw(st.sampled_from(makers))())

    def tree(depth: int) -> nn.Module:
        if depth == 2 or draw(st.booleans()):
            return layer()
        children = [tree(depth + 1) for _ in range(draw(st.integers(0, 3)))]
        if draw(st.booleans()):
            return nn.Sequential(*children)
        return nn.Sequential(OrderedDict((f"part_{i}é", child) for i, child in enumerate(children)))

    return tree(0)


@hypothesis.given(networks())
@SOME
def test_every_number_is_kept_without_a_step(net: nn.Module) -> None:
    data, packing = codec.encode(net)
    back = codec.decode(data)
    assert not any(differences(net, back).values())
    assert repr(back) == repr(net)
    assert packing.num_bytes == len(data) == pytest.approx(sum(packing.parts.values()) / 8)
    assert codec.encode(back)[0] == data


@hypothesis.given(networks(), st.integers(-4, 24), st.booleans())
@SOME
def test_no_number_moves_by_more_than_half_a_step(net: nn.Module, bits: int, is_power: bool) -> None:
    step = 2.0**-bits * (1.0 if is_power else 0.7)
    data, _ = codec.encode(net, bits=bits) if is_power else codec.encode(net, steps=step)
    back = codec.decode(data)
    gridded = {f"{n}." if n else "" for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    for name, gap in differences(net, back).items():
        is_gridded = any(name in (f"{prefix}weight", f"{prefix}bias") for prefix in gridded)
        largest = float(net.state_dict()[name].abs().max())
        assert gap <= (step / 2 * ROUND_OFF + 2**-23 * largest * (not is_power) if is_gridded else 0.0)
    assert codec.encode(net, steps=float(np.float32(step)))[0] == data


def test_outputs_are_those_of_the_rounded_network(tmp_path: Path) -> None:
    net = sparsify(lenet(), 0.5)
    packing = codec.pack(net, tmp_path / "net.rbc", bits={"0.weight": 5, "9.weight": 3})
    assert packing.num_bytes == (tmp_path / "net.rbc").stat().st_size
    back = codec.unpack(tmp_path / "net.rbc")
    gaps = differences(net, back)
    assert 0 < gaps["0.weight"] <= 2**-6 and 0 < gaps["9.weight"] <= 2**-4
    assert not any(gap for name, gap in gaps.items() if name not in ("0.weight", "9.weight"))
    with torch.no_grad():
        net[0].weight.copy_(torch.round(net[0].weight * 32) / 32)  # type: ignore[index]
        net[9].weight.copy_(torch.round(net[9].weight * 8) / 8)  # type: ignore[index]
        x = torch.randn(5, 1, 12, 12)
        assert torch.equal(net(x), back(x))
    assert not back.training and all(p.requires_grad for p in back.parameters())


def test_same_network_same_bytes() -> None:
    first, second = (codec.encode(sparsify(lenet(), 0.3), bits=4)[0] for _ in range(2) if torch.manual_seed(1))
    assert first == second


LAYERS = [
    nn.Flatten(), nn.Flatten(0, -2), nn.Linear(3, 2), nn.Linear(3, 2, bias=False), select(784, [1, 29, 30, 700], 3),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), nn.Conv2d(2, 3, (3, 5), padding=(1, 2)),
    nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm1d(5), nn.BatchNorm2d(5, eps=1e-3),
    nn.BatchNorm2d(5, momentum=None, affine=False), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(),
    nn.ReLU(inplace=True), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.MaxPool1d(2),
    nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.MaxPool2d((2, 3), dilation=2), nn.AvgPool1d(4),
    nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), nn.Dropout(), nn.Dropout(0.1, inplace=True), nn.Identity(),
    nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_each_layer_comes_back_with_its_settings(layer: nn.Module) -> None:
    back = codec.decode(codec.encode(nn.Sequential(layer))[0])[0]  # type: ignore[index]
    assert type(back) is type(layer) and repr(back) == repr(layer)
    settings = {k: v for k, v in vars(layer).items() if not k.startswith("_") and k != "training"}
    assert {k: _plain(vars(back)[k]) for k in settings} == {k: _plain(v) for k, v in settings.items()}
    assert not any(differences(layer, back).values())


def _plain(value: Any) -> Any:
    """Sizes of one number and of equal numbers are the same setting."""
    value = tuple(value) if isinstance(value, list | tuple) else value
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def seal(body: bytes) -> bytes:
    return b"R\x02" + struct.pack("<I", zlib.crc32(body))[:3] + body


def write(*fields: tuple[str, Any]) -> bytes:
    """Fields as a body: flag, likely (7/8), unlikely (1/8), number, float, or fair bits by their count."""
    coder = BitWriter()
    out = FieldWriter(coder)
    for kind, value in fields:
        if kind in ("flag", "likely", "unlikely"):
            out.put_flag(value, {"flag": 1 << 15, "likely": 57344, "unlikely": 8192}[kind])
        elif kind == "number":
            out.put_number(value)
        elif kind == "float":
            out.put_floats(np.array([value], dtype=np.float32))
        else:
            out.put_bits(value, int(kind))
    return coder.to_bytes()


def test_a_file_written_by_hand() -> None:
    # Sequential of two: Flatten; Linear 2 -> 1, both tensors in the forms that need no model.
    flatten = [("likely", False), ("5", 1), ("unlikely", False)]
    linear = [("likely", True), ("number", 2), ("number", 1), ("unlikely", False)]
    weight = [("2", 0), ("flag", True), ("16", 0x3800), ("16", 0xC200)]  # raw, two float16
    bias = [("2", 1), ("flag", True), ("float", 0.25)]
    body = write(("likely", True), ("number", 2), *flatten, *linear, *weight, *bias)
    net = codec.decode(seal(body))
    assert net(torch.tensor([[[2.0], [1.0]]])).item() == 0.5 * 2 - 3 + 0.25
    assert len(body) < 16


def test_bytes_are_those_of_version_2() -> None:
    # A change of the format shows here, and then takes a new version.
    image = np.add.outer((np.arange(14) - 6.5) ** 2, (np.arange(14) - 6.5) ** 2)
    index = np.flatnonzero(image < 30).tolist()
    row, column = torch.meshgrid(torch.arange(9), torch.arange(len(index)), indexing="ij")
    signs = torch.where((row + column) % 3 > 0, 1.0, -1.0)
    net = nn.Sequential(select(196, index, 9), nn.ReLU(), nn.Linear(9, 2))
    with torch.no_grad():
        net[0].weight.copy_(signs * ((column - 10 * row).abs() < 4) * (1 + column % 2) / 4)
        net[0].bias.copy_(torch.arange(9) / 7)
        net[2].weight.copy_(signs[:2, :9] * 0.3)
        net[2].bias.copy_(torch.tensor([0.5, 0.5]))
    grid = {"0.weight": 2, "0.bias": 12}
    data, packing = codec.encode(net, bits=grid)
    assert packing.parts["masks"] > 0 and packing.parts["indices"] < 1.25 * index[-1]
    assert data.hex() == GOLDEN
    assert codec.encode(codec.decode(bytes.fromhex(GOLDEN)), bits=grid)[0].hex() == GOLDEN


GOLDEN = (
    "5202cca0be1234bcc46bcfa7d80b392b4d5e1aaa1e38120d1c2d05c54a454be75a078cc3436b09ec28a7aa8dbf2464cfce25679894e42598"
    "1f92864a78f7575fe0728be7cc9d62bee1be50b91d578f54a850cfd40328f2ff1337cf0ad729771bc2d2b1cc"
)


@pytest.mark.parametrize("alphabet", [2, 3, 15, 200])
def test_symbols_cost_their_entropy_and_the_learning_of_it(alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    chances = rng.dirichlet(np.full(alphabet, 0.5))
    for count in (1_000, 100_000):
        symbols = rng.choice(alphabet, count, p=chances)
        writer = SymbolWriter()
        writer.put_adaptive(symbols, alphabet)
        got = 8 * len(writer.to_bytes())
        shares = np.bincount(symbols, minlength=alphabet) / count
        entropy = -count * float(np.sum(shares[shares > 0] * np.log2(shares[shares > 0])))
        side = 0.5 * (alphabet - 1) * math.log2(count) + 64  # learning the frequencies, and the coder's last words
        assert got <= 1.01 * (entropy + side)
        assert got == pytest.approx(adaptive_cost(symbols, alphabet), abs=64, rel=1e-3)


@pytest.mark.parametrize("density", [0.004, 0.05, 0.5])
def test_tensors_cost_their_entropy(density: float) -> None:
    torch.manual_seed(0)
    net = nn.Linear(300, 400, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.round(torch.randn(400, 300) * 3) / 4 * (torch.rand(400, 300) < density))
    data, packing = codec.encode(net)
    _, counts = np.unique(net.weight.detach().numpy(), return_counts=True)
    entropy = float(np.sum(counts * np.log2(counts.sum() / counts)))
    learning = 0.5 * (len(counts) - 1) * math.log2(120_000)
    headers = packing.parts["format"] + packing.parts["layers"] + packing.parts["headers"]
    assert 8 * len(data) <= sum(packing.parts.values()) + 1e-6 and abs(packing.parts["end of stream"]) <= 16 + 64 * (
        data[1] == 0x82
    )
    assert 8 * len(data) <= 1.01 * (entropy + learning) + headers + 64


def sparse_cost(values: Any, geometry: Geometry) -> float:
    meter, level = BitMeter(), find_level(int(np.count_nonzero(values)), values.size)
    coder = SparseCoder(meter, geometry, len(values), level, only_mask=True)
    for row in values.astype(int).tolist():
        coder.code_row(row)
    return meter.bits


def test_mask_in_rows_columns_and_patches_costs_less_than_its_entropy() -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.beta(0.5, 5, 60), rng.beta(0.5, 5, 300)
    mask = rng.random((60, 300)) < np.minimum(8 * rows[:, None] * columns, 1)
    share = mask.mean()
    entropy = -mask.size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert sparse_cost(mask, Geometry("flat", np.arange(300))) < 0.85 * entropy
    image = np.zeros((20, 28, 28), dtype=np.bool_)
    for unit in image:
        r, c = rng.integers(0, 22, 2)
        unit[r : r + 6, c : c + 6] = rng.random((6, 6)) < 0.9
    patches = image.reshape(20, 784)
    on_plane = sparse_cost(patches, Geometry("image", np.arange(784), 784, 28))
    assert on_plane < 0.6 * sparse_cost(patches, Geometry("flat", np.arange(784)))


GEOMETRIES = [
    Geometry("flat", np.arange(24)), Geometry("out", np.arange(24), 0, 0, np.arange(24)),
    Geometry("image", np.arange(3, 75, 3), 73, 9), Geometry("kernel", np.arange(24), 6, 3, np.arange(4)),
    Geometry("map", np.arange(24), 4, 2, np.arange(6)), Geometry("map", np.arange(24), 3, 0, np.arange(8)),
    Geometry("pixels", np.arange(24), 24, 6), Geometry("vector", np.arange(24)),
]  # fmt: skip


@hypothesis.given(
    st.integers(0, 2**32 - 1), st.sampled_from(GEOMETRIES), st.integers(0, 12), st.integers(0, 15), st.integers(0, 3),
    st.sampled_from([0, 1, 5, None]),
)  # fmt: skip
@SOME
def test_sparse_matrices_come_back_at_the_cost_of_their_model(
    seed: int, geometry: Geometry, num_rows: int, level: int, low_bits: int, largest: int | None
) -> None:
    rng = np.random.default_rng(seed)
    limit = (200 if largest is None else largest) << low_bits | (1 << low_bits) - 1
    values = rng.integers(-limit - 1, limit + 2, (num_rows, 24)) * (rng.random((num_rows, 24)) < rng.random())
    writer, prices = BitWriter(), []
    coder = SparseCoder(writer, geometry, num_rows, level, low_bits, largest)
    for row in values.tolist():
        coder.code_row(row, prices)
    data = writer.to_bytes()
    assert 8 * len(data) <= writer.bits * (1 + 1e-6) + 16
    assert sum(spent for spent, _ in prices) == pytest.approx(writer.bits)
    assert len(prices) == values.size
    coder = SparseCoder(BitReader(data), geometry, num_rows, level, low_bits, largest)
    assert [coder.code_row(None) for _ in range(num_rows)] == values.tolist()


@hypothesis.given(st.lists(st.integers(-(2**20) + 1, 2**20 - 1), max_size=50))
def test_integers_by_class_come_back(values: list[int]) -> None:
    writer = SymbolWriter()
    writer.put_classes(np.array(values, dtype=np.int64), 20)
    assert SymbolReader(writer.to_bytes()).take_classes(len(values), 20).tolist() == values


def test_long_indices_are_stored_as_gaps() -> None:
    index = np.cumsum(np.random.default_rng(0).integers(1, 100_000, 50)).tolist()
    net = select(index[-1] + 1, index, 2)
    assert codec.decode(codec.encode(net)[0]).index.tolist() == index


def test_pixels_of_an_image_cost_less_than_a_bit_each() -> None:
    image = np.add.outer((np.arange(28) - 13.5) ** 2, (np.arange(28) - 13.5) ** 2) < 100
    index = np.flatnonzero(image).tolist()
    _, packing = codec.encode(select(784, index, 2))
    assert packing.parts["indices"] < 0.25 * 784


def test_many_masks_stay_within_what_a_reader_accepts() -> None:
    net = nn.Sequential(*(nn.Linear(500, 500, bias=False) for _ in range(5)))
    with torch.no_grad():
        for layer in net:
            layer.weight.zero_()
            layer.weight[:50, :100] = torch.where(torch.rand(50, 100) < 0.9, 0.5, -0.5)
    data, packing = codec.encode(net)
    assert packing.parts["masks"] > 0
    assert not any(differences(net, codec.decode(data)).values())


def test_random_state_is_left_alone() -> None:
    data, _ = codec.encode(lenet())
    before = torch.get_rng_state()
    codec.decode(data)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = codec.encode(lenet(), bits=4)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    codec.decode(data)


class Doubling(nn.Linear):
    pass


def shared() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.ReLU(), layer)


def infinite() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = math.inf
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.Softmax(1)), "layer 1: got Softmax; allowed: a tree of Sequential, Flatten"),
        (Doubling(2, 2), "layer network: got Doubling"),
        (nn.Linear(2, 2).double(), "tensor weight: got torch.float64"),
        (shared(), "tensor 2.weight: got the tensor of 0.weight"),
        (infinite(), "tensor weight: got no or non-finite"),
        (hooked(), "layer network: got hooks"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (nn.Conv2d(1, 1, 3, padding="same"), "padding='same'"),
    ],
)
def test_refuses_what_the_format_does_not_hold(net: nn.Module, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        codec.encode(net)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"bits": {"0.wieght": 4}}, "did you mean '0.weight'"),
        ({"bits": 2000}, "bits of '0.weight'"),
        ({"steps": {"0.weight": 0.0}}, "step of '0.weight'"),
        ({"steps": math.nan}, "step of '0.weight'"),
    ],
)
def test_refuses_grids(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(OutputError, match=message):
        codec.encode(nn.Sequential(nn.Linear(2, 2)), **grid)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="FileNotFoundError"):
        codec.unpack(tmp_path / "none.rbc")
    (tmp_path / "other.rbc").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(OutputError, match="something else"):
        codec.unpack(tmp_path / "other.rbc")
    with pytest.raises(OutputError, match="version 1,"):
        codec.decode(b"RBC\x01" + bytes(10))
    with pytest.raises(OutputError, match="version 9"):
        codec.decode(b"R\x09" + bytes(10))
    with pytest.raises(OutputError, match="check sum"):
        codec.decode(codec.encode(nn.ReLU())[0] + b"\0")


def linear(inputs: int, outputs: int, kind: int = 2) -> list[tuple[str, Any]]:
    return [("likely", False), ("5", kind), ("number", inputs), ("number", outputs), ("unlikely", False)]


ONE = [("2", 1), ("flag", False)]
SOME_CHILDREN = [("likely", True), ("number", 5_000)]


@pytest.mark.parametrize(
    "fields",
    [
        [*linear(30_000, 30_000), *ONE, *ONE],
        [*linear(2**31 - 1, 2**31 - 1), *ONE, *ONE],
        [*linear(1, 1, 3), ("number", 2**31 - 2), ("flag", False), *ONE, *ONE],
        [("likely", False), ("5", 6), ("number", 2**31 - 1), ("unlikely", False), ("number", 0), *ONE * 4],
        [("likely", True), ("number", 2**31 - 1)],
        [("likely", True), ("number", 1), *[("likely", False), ("5", 0), ("number", 1)] * 200],
        [*SOME_CHILDREN, *[("likely", False), ("5", 10)] * 5_000],
        [("likely", False), ("5", 14), ("likely", True), ("number", 2), ("unlikely", True), ("flag", False),
         ("flag", True), ("likely", True), ("number", 3), *[("flag", False)] * 2],
        [*linear(0, 2), *ONE * 2],
        [("likely", False), ("5", 30)],
        [*linear(20_000, 2), ("2", 2), ("flag", True), ("flag", False), ("flag", True), ("number", 0), ("4", 3)],
    ],
    ids=range(11),
)  # fmt: skip
def test_claims_are_checked_before_memory_is_asked_for(
    fields: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NodeReader, "fill", lambda *_: pytest.fail("read on"))
    with pytest.raises(OutputError):
        codec.decode(seal(write(*fields)))


def test_empty_bodies_and_cut_bulks_are_refused() -> None:
    data, _ = codec.encode(nn.Linear(100, 100))
    assert data[1] == 0x82
    for body in (b"", data[5:9], data[5:200], data[5:-1000]):
        with pytest.raises(OutputError):
            codec.decode(b"R\x82" + seal(body)[2:])


def test_decisions_are_limited() -> None:
    sparse = [("2", 2), ("flag", True), ("flag", False), ("flag", True), ("number", 0),
              ("unlikely", False), ("4", 3), ("4", 0), *ONE]  # fmt: skip
    second = [("likely", False), ("5", 2), ("likely", True), ("number", 1000), ("unlikely", False), ("2", 2),
              ("flag", True), ("flag", True), ("unlikely", False), ("4", 3), ("4", 0), *ONE]  # fmt: skip
    body = write(("likely", True), ("number", 2), *linear(1000, 1000), *sparse, *second)
    with pytest.raises(OutputError, match="decisions"):
        codec.decode(seal(body + bytes(600)))


def test_a_network_of_nothing_is_padded() -> None:
    net = nn.Linear(2000, 2000, bias=False)
    nn.init.zeros_(net.weight)
    data, _ = codec.encode(net)
    assert len(data) == math.ceil(4_000_000 / codec.NUMBERS_PER_BYTE)
    assert not codec.decode(data).weight.any()


# Both run apart, as a crash would end the process and its peak memory is measured.
PEAK = """
import gc, sys
from pathlib import Path

def read(field):
    return 1024 * int(Path("/proc/self/status").read_text().partition(field)[2].split()[0])

def peak():
    return read("VmHWM:")

def now():
    return read("VmRSS:")

def forget():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
"""


def run_apart(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", PEAK + code, *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is given back, so that peaks show
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


FUZZ = """
import random, warnings, zlib
import torch
from torch import nn
from pyrobc.codec import rbc as codec
from pyrobc.errors import PyrobcError
from pyrobc.slicing import SelectLinear

warnings.simplefilter("error")
rng = random.Random(0)
torch.manual_seed(0)
select = SelectLinear(nn.Linear(20, 8), torch.arange(100, 300, 10))
dense = nn.Sequential(nn.Flatten(), select, nn.ReLU(), nn.Dropout(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Sequential(nn.Conv2d(3, 4, 3)))
for p in [*dense.parameters(), *conv.parameters()]:
    p.data *= torch.rand_like(p) < 0.4
files = [codec.encode(dense, bits=4)[0], codec.encode(conv, bits=6)[0], codec.encode(conv)[0],
         codec.encode(dense, steps=0.03)[0], codec.encode(dense, bits=16)[0]]
states = [codec.decode(f).state_dict() for f in files]

def mutate(data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(rng.choice([len(data), min(len(data), 40)]) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[at:at + 1] = bytes([(data[at] if data else 0) ^ 1 << rng.randrange(8)])
        elif kind == 1:
            data[at:at + 1] = bytes([rng.choice([0, 1, 2, 3, 127, 128, 255, rng.randrange(256)])])
        elif kind == 2:
            del data[at:at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            del data[at:]
        else:
            data[at:at + 5] = b"\\xff\\xff\\xff\\xff\\x07"
    return bytes(data)

outcomes = {"refused": 0, "original": 0, "another": 0}
forget()
before = now()
for i in range(2 * int(sys.argv[1])):
    which, is_sealed = rng.randrange(len(files)), i % 2 == 1
    data = mutate(files[which][5:] if is_sealed else files[which])
    if is_sealed:  # a check sum that is right, as an attacker would write it
        data = files[which][:2] + zlib.crc32(data).to_bytes(4, "little")[:3] + data
    try:
        state = codec.decode(data).state_dict()
    except PyrobcError:
        outcomes["refused"] += 1
        continue
    same = state.keys() == states[which].keys() and all(torch.equal(state[k], states[which][k]) for k in state)
    if not same and not is_sealed:
        sys.exit(f"another network from a file with a wrong check sum: {data.hex()}")
    outcomes["original" if same else "another"] += 1
legal = 4 * codec.NUMBERS_PER_BYTE * max(map(len, files))
print(outcomes, peak() - before, legal)
if peak() - before > 2 * legal:
    sys.exit(f"peak memory rose by {peak() - before} bytes; a legal network may take {legal}")
"""


MEMORY = """
import torch
from pyrobc.codec import rbc as codec

torch.manual_seed(0)
net = torch.nn.Linear(2048, 2048, bias=False)
codec.decode(codec.encode(torch.nn.Linear(2, 2), bits=4)[0])  # what is loaded on first use
for bits in (None, 5, 17):
    data, _ = codec.encode(net, bits=bits)
    forget()
    before = now()
    back = codec.decode(data)
    grown = peak() - before
    print(bits, grown)
    if not 4 * 2**22 <= grown <= 2 * 4 * 2**22 + len(data) + 2**21:
        sys.exit(f"{bits} bits: {grown} bytes to decode {4 * 2**22}")
    del back
"""


def test_decoding_takes_at_most_twice_the_network_and_the_file() -> None:
    run_apart(MEMORY)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_give_the_original_or_an_error(count: int) -> None:
    run_apart(FUZZ, str(count))
