"""Attention by separate layers: the function of the packed one, cut by heads, by dimensions and along the stream."""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrobc.attention import Attention, SeparateAttention, match_attention, separate_attention
from pyrobc.calling import call_network, tensors_of
from pyrobc.dependency import trace_groups
from pyrobc.errors import FamilyError, GroupError
from pyrobc.family import Effective
from pyrobc.fit import fit
from pyrobc.folding import fold_scales
from pyrobc.groups import GroupSpec
from pyrobc.lift import lift
from pyrobc.models import vit
from pyrobc.posterior import measure_input_rms
from pyrobc.slicing import PartialLayerNorm, mask_groups, slice_groups
from pyrobc.surgery import apply

SOME = hypothesis.settings(max_examples=2, suppress_health_check=list(hypothesis.HealthCheck))


def shake(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return net.double()


def some_kept(spec: GroupSpec, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {b.name: np.sort(rng.permutation(b.size)[: rng.integers(1, b.size + 1)]) for b in spec.blocks}


def assert_masked_equals_cut(net: nn.Module, spec: GroupSpec, x: Any, seed: int, **fixed: list[int]) -> nn.Module:
    net = match_attention(net, spec.tensors)
    kept = some_kept(spec, seed) | {name: np.array(groups) for name, groups in fixed.items()}
    masked, cut = mask_groups(net, spec, kept), slice_groups(net, spec, kept)
    for is_training in (False, True):
        a, b = (tensors_of(call_network(n.train(is_training), x))[0] for n in (masked, cut))
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    assert spec.forecast(kept)[0] == sum(p.numel() for p in cut.parameters())
    return cut


class Attending(nn.Module):
    """A sequence attends to a shorter one, made by other layers, through ``nn.MultiheadAttention``."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True, **options)
        self.query, self.key = nn.Linear(3, 8), nn.Linear(3, options.get("kdim", 8))
        self.value, self.head = nn.Linear(3, options.get("vdim", 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.query(x), self.key(x[:, 1:]), self.value(x[:, 1:]))[0].mean(1))


class Sequences(nn.Module):
    """``nn.TransformerEncoder`` between a linear layer and the mean."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True, norm_first=norm_first)
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)).mean(1))


class Foreign(nn.Module):
    """Heads by view, sizes in attributes, the output layer elsewhere, as in BERT; or one packed layer, as in DINO."""

    def __init__(self, is_packed: bool) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 2, 8
        self.scaling = 0.6
        names = ["qkv"] if is_packed else ["query", "key", "value"]
        for name in names:
            self.add_module(name, nn.Linear(5, 24 // len(names)))
        self.is_packed = is_packed

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
        if self.is_packed:
            packed = self.qkv(x).reshape(*x.shape[:-1], 3, *shape[-2:]).permute(2, 0, 3, 1, 4)
            q, k, v = packed[0], packed[1], packed[2]
        else:
            q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        h = (self.scaling * q @ k.transpose(-1, -2)).softmax(-1) @ v
        return h.transpose(1, 2).reshape(*x.shape[:-1], self.all_head_size)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 5, "vdim": 3}, {"batch_first": True}, {"batch_first": True, "kdim": 8, "vdim": 8}],
    ids=str,
)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both"])
def test_separate_layers_give_what_the_packed_ones_give(options: dict[str, Any], masks: str) -> None:
    packed = shake(nn.MultiheadAttention(8, 4, **options)).eval()
    separate = separate_attention(packed)
    assert isinstance(separate, SeparateAttention) and separate_attention(separate) is separate
    rows = (2, 6), (2, 5), (2, 5)
    if not packed.batch_first:
        rows = tuple((length, count) for count, length in rows)
    q, k, v = (torch.randn(*r, w).double() for r, w in zip(rows, (8, packed.kdim, packed.vdim), strict=True))
    hidden = torch.zeros(6, 5, dtype=torch.bool).index_fill_(1, torch.tensor([3]), True)
    mask = {"bool": hidden, "both": hidden, "float": torch.randn(6, 5).double()}.get(masks)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]]) if masks in ("padding", "both") else None
    expected, got = (m(q, k, v, padding, False, mask)[0] for m in (packed, separate))
    torch.testing.assert_close(got, expected)
    if masks == "none":
        one = 0 if packed.batch_first else 1
        torch.testing.assert_close(separate(*(t.select(one, 0) for t in (q, k, v)))[0], expected.select(one, 0))


def test_frozen_and_trained_tensors_stay_so() -> None:
    packed = nn.MultiheadAttention(8, 2)
    packed.in_proj_weight.requires_grad_(False)
    separate = separate_attention(packed.eval())
    trained = {name for name, p in separate.named_parameters() if p.requires_grad}
    assert trained == {"query.bias", "key.bias", "value.bias", "output.weight", "output.bias"}
    assert not separate.training and separate.scale == 0.5


def test_masks_that_differ_between_heads_are_refused() -> None:
    separate, x = separate_attention(nn.MultiheadAttention(8, 2)), torch.randn(3, 1, 8)
    with pytest.raises(GroupError, match="attention mask: got shape .2, 3, 3., one for each head"):
        separate(x, x, x, attn_mask=torch.zeros(2, 3, 3))
    with pytest.raises(GroupError, match="attention: got 8 features for 3 heads"):
        Attention(8, 3)


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 6, "bias": False}], ids=str)
@pytest.mark.parametrize("head_dims", [False, True])
@SOME
@hypothesis.given(seed=st.integers(0, 1000))
def test_packed_attention_is_cut_exactly(options: dict[str, Any], head_dims: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net, x = shake(Attending(**options)), torch.randn(3, 5, 3).double()
    spec = trace_groups(net, x, head_dims=head_dims)
    names = {"attention.query": 8, "attention.value": 8} if head_dims else {"attention": 4}
    assert names.items() <= {b.name: b.size for b in spec.blocks}.items()
    cut = assert_masked_equals_cut(net, spec, x, seed)
    assert cut.attention.scale == 2**-0.5, "that of the heads that were built"


def test_products_keep_the_scale_of_the_heads_that_were_built() -> None:
    net, x = shake(Attending()), torch.randn(3, 5, 3).double()
    spec = trace_groups(net, x, head_dims=True)
    ones = {"attention.query": [0, 3, 4, 7], "attention.value": [1, 2, 5, 6]}
    cut = assert_masked_equals_cut(net, spec, x, 0, **ones)
    assert cut.attention.query_sizes == cut.attention.value_sizes == (1,) * 4
    uneven = {"attention.query": [0, 1, 4], "attention.value": [2, 3, 4]}  # values alone, queries alone, both, neither
    cut = assert_masked_equals_cut(net, spec, x, 0, **uneven)
    assert (cut.attention.query_sizes, cut.attention.value_sizes) == ((2, 0, 1), (0, 2, 1))
    assert cut.attention.scale == 2**-0.5


def test_attention_that_cannot_be_separated_is_left_alone() -> None:
    x = torch.randn(3, 5, 3)
    spec = trace_groups(Attending(add_bias_kv=True), x)
    assert "rows added to keys" in spec.left_alone["attention"] and not any("attention" in b for b in spec.by_name)

    class Reading(Attending):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.attention(q := self.query(x), q, q)[1] @ q).mean(1))

    net = Reading()
    spec = trace_groups(net, x)
    assert "separating its tensors makes the network fail" in spec.left_alone["attention"]
    model = lift(net, "group_horseshoe", "categorical", x)
    model(x, torch.zeros(3, dtype=torch.long))
    assert isinstance(model.template.attention, nn.MultiheadAttention)


@pytest.mark.parametrize("head_dims", [False, True])
@pytest.mark.parametrize("prune_residual", [False, True])
@pytest.mark.parametrize("name", ["token", "mean", "pre-norm", "post-norm", "embedded"])
@SOME
@hypothesis.given(seed=st.integers(0, 1000))
def test_transformers_are_cut_exactly(name: str, prune_residual: bool, head_dims: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net, x = build_transformer(name)
    spec = trace_groups(net, x, prune_residual=prune_residual, head_dims=head_dims)
    stream = {"token": "patches", "mean": "patches", "embedded": "encoder.layers.0.self_attn.output"}.get(name, "stem")
    assert (stream in spec.by_name) == prune_residual
    if not prune_residual:
        assert "prune_residual=True prunes it" in spec.left_alone[stream]
    cut = assert_masked_equals_cut(net, spec, x, seed)
    with torch.no_grad():  # where torch's own layers look for their fused road
        torch.testing.assert_close(cut.eval()(x), mask_of(net, spec, seed).eval()(x), rtol=1e-9, atol=1e-9)


def build_transformer(name: str) -> tuple[nn.Module, Tensor]:
    if name in ("token", "mean"):
        net: nn.Module = vit.build(8, features=8, depth=1, num_heads=2, hidden=5, has_token=name == "token")
        return shake(net), torch.randn(3, 3, 8, 8).double()
    if name == "embedded":
        return shake(Embedded()), torch.randint(0, 7, (3, 5))
    return shake(Sequences(name == "pre-norm")), torch.randn(3, 5, 4).double()


class Embedded(Sequences):
    """The same on symbols and their places, as in BERT; places are the same for all examples."""

    def __init__(self) -> None:
        super().__init__(norm_first=False)
        self.stem, self.places = nn.Embedding(7, 8), nn.Embedding(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x) + self.places(torch.arange(5)[None])).mean(1))


def mask_of(net: nn.Module, spec: GroupSpec, seed: int) -> nn.Module:
    return mask_groups(match_attention(net, spec.tensors), spec, some_kept(spec, seed))


@pytest.mark.parametrize("name", ["token", "post-norm", "embedded"])
def test_lifted_gates_are_the_ones_that_are_cut(name: str) -> None:
    """Gates of zero and one give the cut network, others fold into it, and drawn ones are those of their examples."""
    net, x = build_transformer(name)
    model = lift(net.eval(), "log_uniform", "categorical", x, prune_residual=True, head_dims=True)
    parameters = dict(model.template.named_parameters())
    kept = some_kept(model.spec, 3)

    def run(gates: dict[str, Tensor], inputs: Tensor = x) -> Tensor:
        return copy.deepcopy(model).run(Effective(gates, parameters), inputs)

    with torch.no_grad():
        full = {b.name: torch.ones(b.size).double() for b in model.spec.blocks}
        torch.testing.assert_close(run(full), net(x), rtol=1e-9, atol=1e-9)
        hard = {n: torch.zeros_like(g).index_fill_(0, torch.as_tensor(kept[n]), 1.0) for n, g in full.items()}
        cut = slice_groups(model.template, model.spec, kept)
        torch.testing.assert_close(run(hard), cut(x), rtol=1e-9, atol=1e-9)
        soft = {n: torch.rand_like(g) for n, g in full.items()}
        folded = model.to_module(Effective(soft, parameters))
        torch.testing.assert_close(run(soft), folded(x), rtol=1e-9, atol=1e-9)
        drawn = {n: torch.rand(3, len(g)).double() for n, g in full.items()}
        each = [run({n: g[i] for n, g in drawn.items()}, x[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(run(drawn), torch.cat(each), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["log_uniform", "group_horseshoe", "group_normal_jeffreys"])
def test_every_kind_of_block_is_fitted_scored_and_cut(family: str, keeping: Callable[..., Any]) -> None:
    net, x = vit.build(8, features=8, depth=1, num_heads=2, hidden=5), torch.randn(12, 3, 8, 8)
    model = lift(net, family, "categorical", x[:2], prune_residual=True, head_dims=True)
    posterior = fit(model, (x, torch.randint(0, 10, (12,))), epochs=1, batch_size=6, progress=False)
    for name, thresholds in posterior.thresholds(0.01).items():
        assert bool(torch.isfinite(thresholds).all()) and len(thresholds) == model.spec.block(name).size
    kept = some_kept(model.spec, 1)
    small = apply(keeping(model.spec, kept), posterior, example_inputs=x)
    assert isinstance(small.norm, PartialLayerNorm) and small.norm.full_size == 8
    if family != "log_uniform":
        with pytest.raises(FamilyError, match="gates on rows.*without prune_residual"):
            fold_scales(posterior)


def test_a_query_dimension_counts_by_its_products() -> None:
    """Of two dimensions that carry the same, both have half the power: share = z / sqrt(2)."""
    net, x = vit.build(8, features=4, depth=1, num_heads=2, hidden=5), torch.randn(2, 3, 8, 8)
    model = lift(net, "log_uniform", "categorical", x, head_dims=True)
    posterior = fit(model, (x, torch.tensor([0, 1])), epochs=1, progress=False)
    with torch.no_grad():
        for name, factor in posterior.guide.by_site().items():
            if name in ("blocks.0.attention.query.weight", "blocks.0.attention.key.weight"):
                factor.value.copy_(torch.tensor([[1.0], [1.0], [0.0], [0.0]]).expand(4, 4))
            elif name in ("blocks.0.attention.query.bias", "blocks.0.attention.key.bias"):
                factor.value.zero_()
    gate = posterior.mean().gates["blocks.0.attention.query"].double()
    found = posterior.thresholds(0.01)["blocks.0.attention.query"]
    torch.testing.assert_close(found[:2], 0.01 * gate[:2].square().sum().sqrt().expand(2), rtol=1e-6, atol=0)
    assert bool((found[2:] > 1e-2).all()), "a dimension without products carries nothing"


def test_what_reads_gated_channels_counts_them_before_the_gate() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    x = torch.randn(20, 3)
    model = lift(net, "log_uniform", "categorical", x[:2], prune_inputs=False, prune_residual=True)
    posterior = fit(model, (x, torch.randint(0, 2, (20,))), epochs=1, progress=False)
    with torch.no_grad():
        posterior.guide.by_site()["0.gate"].loc.copy_(torch.linspace(-3, -1, 6))
    posterior.input_rms = measure_input_rms(model, posterior.mean(), [(x, x)])
    gate = posterior.mean().gates["0"].double()
    assert float(gate.max() / gate.min()) > 4
    column = posterior.mean().parameters["2.weight"].double().norm(dim=0)
    read = posterior.input_rms["2.weight"].double() * column
    torch.testing.assert_close(posterior.thresholds(0.01)["0"], 0.01 * read.norm() / (read / gate))


def test_partial_normalisation_counts_zeros() -> None:
    norm, x = shake(nn.LayerNorm(6)), torch.randn(4, 6).double()
    kept = torch.tensor([0, 2, 5])
    zeros = torch.zeros_like(x).index_copy_(1, kept, x[:, kept])
    cut = copy.deepcopy(norm)
    cut.weight, cut.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
    partial = PartialLayerNorm(cut)
    torch.testing.assert_close(partial(x[:, kept]), norm(zeros)[:, kept])
    again = copy.deepcopy(partial)
    again.weight, again.bias = nn.Parameter(partial.weight[:2]), nn.Parameter(partial.bias[:2])
    zeros[:, 5] = 0
    torch.testing.assert_close(PartialLayerNorm(again)(x[:, kept[:2]]), norm(zeros)[:, kept[:2]])


@pytest.mark.parametrize("is_packed", [False, True])
def test_heads_of_foreign_attention_are_found(is_packed: bool) -> None:
    net = shake(nn.Sequential(nn.Linear(3, 5), Foreign(is_packed), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(3, 6, 3).double()
    spec = trace_groups(net, x)
    heads = "1.qkv" if is_packed else "1"
    assert spec.block(heads).size == 4
    assert sum(layer.macs for layer in spec.layers if layer.axes == (0,)) == 2 * 6 * 6 * 8
    cut = assert_masked_equals_cut(net, spec, x, 2, **{heads: [0, 1, 3]})
    assert (cut[1].num_attention_heads, cut[1].all_head_size, cut[1].scaling) == (3, 6, 0.6)
    again = trace_groups(cut, x)
    assert_masked_equals_cut(cut, again, x, 5)


def test_attention_is_that_of_torch() -> None:
    attention, x = shake(Attention(6, 3)), torch.randn(2, 4, 6).double()
    q, k, v = (layer(x).view(2, 4, 3, 2).transpose(1, 2) for layer in (attention.query, attention.key, attention.value))
    expected = attention.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 6))
    torch.testing.assert_close(attention(x), expected)
    uneven = copy.deepcopy(attention)
    uneven.query_sizes = uneven.value_sizes = (2, 2, 2)
    uneven.split = lambda h, sizes: [part.unsqueeze(-3) for part in h.split(list(sizes), -1)]
    torch.testing.assert_close(uneven(x), expected)


transformers = pytest.mark.skipif("not __import__('importlib').util.find_spec('transformers')", reason="an extra")


@transformers
@pytest.mark.parametrize("prune_residual", [False, True])
@pytest.mark.parametrize("name", ["ViT", "BERT"])
def test_networks_of_the_transformers_library(name: str, prune_residual: bool) -> None:
    import transformers as hf

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 6}
    if name == "ViT":
        net = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4))
        x = {"pixel_values": torch.randn(3, 3, 8, 8).double()}
    else:
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        net = hf.BertForSequenceClassification(hf.BertConfig(**sizes, **rates, vocab_size=11))
        x = {"input_ids": torch.randint(0, 11, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    net = shake(net)
    spec = trace_groups(net, x, prune_residual=prune_residual)
    assert sorted(b.size for b in spec.blocks)[:4] == [4, 4, 6, 6]
    for seed in range(3):
        assert_masked_equals_cut(net, spec, x, seed)
    model = lift(net, "log_uniform", "categorical", x, prune_residual=prune_residual)
    assert bool(torch.isfinite(model(x, torch.tensor([0, 1, 1]))).all())
