"""The table of a plan: the published rates from plans of the published widths, and the bytes of real files."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import pyrobc as bc
from pyrobc import codec
from pyrobc.accounting import _find_variances
from pyrobc.batches import seeded
from pyrobc.bits import layer_bits, published_rates, round_to_grid
from pyrobc.errors import FamilyError, OutputError, PlanError
from pyrobc.family import make_family
from pyrobc.folding import fold_scales
from pyrobc.lift import lift
from pyrobc.models.mlp import build
from pyrobc.plan import BlockPlan, Plan, SlicePlan
from pyrobc.posterior import Posterior
from pyrobc.report import compression_table
from pyrobc.surgery import apply

VGG_DENSE = [3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6]


def pairs(widths):
    return list(zip(widths[:-1], widths[1:], strict=True))


def chain(*widths, area=1):
    """(inputs, outputs, area of the kernel) of each layer."""
    return [(a, b, area) for a, b in pairs(widths)]


def vgg(widths):
    """13 convolutions; the last two widths are the inputs of the two linear layers."""
    return chain(3, *widths[:13], area=9) + chain(*widths[13:], 10)


LENET_300_100, LENET_5 = chain(784, 300, 100, 10), chain(1, 20, 50, area=25) + chain(800, 500, 10)
VGG = chain(*VGG_DENSE, area=9) + chain(512, 512, 10)

# Louizos, Ullrich and Welling (2017): layers before, layers after, bits, pruning and fast prediction
PUBLISHED = {
    "LeNet-300-100 normal-Jeffreys": (LENET_300_100, chain(278, 98, 13, 10), [8, 9, 14], 9.29, 36.84),
    "LeNet-300-100 horseshoe": (LENET_300_100, chain(311, 86, 14, 10), [13, 11, 10], 9.48, 23.51),
    "LeNet-5 horseshoe":
        (LENET_5, chain(1, 5, 10, area=25) + chain(76, 16, 10), [10, 10, 14, 13], 156.49, 419.31),
    "VGG normal-Jeffreys":
        (VGG, vgg([63, 64, 128, 128, 245, 155, 63, 26, 24, 20, 14, 12, 11, 11, 15]),
         [10, 10, 10, 10, 8, 8, 8, 5, 5, 5, 5, 5, 6, 7, 11], 14.96, 56.78),
    "VGG horseshoe":
        (VGG, vgg([51, 62, 125, 128, 228, 129, 38, 13, 9, 6, 5, 6, 6, 6, 20]),
         [11, 12, 9, 14, 10, 8, 5, 5, 6, 6, 6, 8, 11, 17, 10], 18.22, 59.85),
}  # fmt: skip


def plan_of(before, after, bits):
    """The first so many inputs and outputs of every layer stay; biases and a batch norm are there to be ignored."""
    network, slices = {"norm.weight": (before[0][1],)}, []
    for i, ((fan_in, fan_out, area), (kept_in, kept_out, _)) in enumerate(zip(before, after, strict=True)):
        kernel = (math.isqrt(area),) * 2 if area > 1 else ()
        network |= {f"{i}.weight": (fan_out, fan_in, *kernel), f"{i}.bias": (fan_out,)}
        slices += [
            SlicePlan(f"{i}.weight", 0, "produce", tuple(range(kept_out))),
            SlicePlan(f"{i}.bias", 0, "produce", tuple(range(kept_out))),
            SlicePlan(f"{i}.weight", 1, "consume", tuple(range(kept_in))),
        ]
    count = sum(math.prod(shape) for shape in network.values())
    block = BlockPlan("0", 1, ("keep",), ("",), (0.0,), (0.0,), (0.0,))
    return Plan(
        network=network, blocks=(block,), slices=tuple(slices), parameters=(count, 1), macs=(1, 1),
        bits={f"{i}.weight": b for i, b in enumerate(bits)}, rule={}, evidence={}, provenance={}, left_alone={},
    )  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rates_of_a_plan(name):
    before, after, bits, pruning, fast = PUBLISHED[name]
    plan = plan_of(before, after, bits)
    table = compression_table(Plan.from_json(plan.to_json()))
    assert [round(row["ratio"], 2) for row in table.rows] == [pruning, fast]
    assert f"{pruning:.2f}\u00d7" in str(table) and f"{fast:.2f}\u00d7" in str(table)
    assert table.rates.maximum is None and table.num_bytes is None
    dense, kept = ([a * b * k for a, b, k in layers] for layers in (before, after))
    assert [part.dense for part in table.layers] == dense
    rates = published_rates(dense, kept, bits)
    assert (round(rates.pruning, 2), round(rates.fast, 2), rates.maximum) == (pruning, fast, None)
    assert rates.density == pytest.approx(1 / rates.pruning)


def test_vgg_has_the_published_number_of_weights():
    assert sum(a * b * k for a, b, k in VGG) == 14_977_728


def test_rows_of_a_network_and_its_file(compressed, tmp_path):
    """Maximum compression and bytes of what a file holds, by hand from the decoded network."""
    codec.pack(compressed.net, tmp_path / "x.rbc", bits=4)
    table = bc.compression_table(compressed.plan, tmp_path / "x.rbc")
    weights = [bc.load(tmp_path / "x.rbc")[i].weight.detach().numpy() for i in (0, 2, 4)]
    coded = 0.0
    for values in weights:
        share = np.unique(values, return_counts=True)[1] / values.size
        coded += 32 * len(share) - values.size * (share * np.log2(share)).sum()
    assert [row["name"] for row in table.rows] == [
        "pruning, weights", "fast prediction, bits", "maximum compression, bits", "coded file, bytes",
    ]  # fmt: skip
    before = 6 * 10 + 10 * 5 + 5 * 2
    assert table.rows[2]["ratio"] == pytest.approx(32 * before / coded)
    size = (tmp_path / "x.rbc").stat().st_size
    assert table.rows[3] == {
        "name": "coded file, bytes", "before": 4 * compressed.plan.parameters[0], "after": size,
        "ratio": 4 * compressed.plan.parameters[0] / size,
    }  # fmt: skip


def test_network_in_memory_is_coded_at_the_widths_of_the_plan(mlp_spec, keeping):
    plan = keeping(mlp_spec, {b.name: range(0, b.size, 2) for b in mlp_spec.blocks})
    with seeded(1):
        net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 2))
    small = apply(plan, net, example_inputs=torch.randn(2, 6))
    plain = compression_table(plan, small)
    assert plain.num_bytes == codec.encode(small)[1].num_bytes
    coarse = compression_table(dataclasses.replace(plan, bits=dict.fromkeys(plan.bits, 2)), small)
    assert coarse.num_bytes < plain.num_bytes and coarse.rates.maximum > plain.rates.maximum
    assert coarse.rates.fast == pytest.approx(coarse.rates.pruning * 32 / 2)


def test_text_is_markdown(compressed):
    blocks = str(compression_table(compressed.plan, compressed.net)).split("\n\n")
    assert len(blocks) == 2
    for block in blocks:
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
        assert re.fullmatch(r"\| -+ \|( -+: \|){3}", lines[1])


@pytest.mark.parametrize("family", ["group_normal_jeffreys", "group_horseshoe", "log_uniform"])
def test_bits_from_the_posterior_follow_the_published_rule(family, keeping):
    """Variances of deployed weights against draws; the posterior before the cut gives the numbers of the one after."""
    with seeded(3):
        net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        model = lift(net, make_family(family), "categorical", torch.randn(1, 1, 3, 3))
        guide = model.new_guide()
        with torch.no_grad():
            for key, parameter in guide.named_parameters():
                is_multiplier = key.endswith("loc") and not key.endswith(("weight.loc", "bias.loc"))
                shift = -2.0 if is_multiplier else 3.0 if key.endswith("log_scale") else 0.0  # multipliers far from one
                parameter.add_(0.1 * torch.randn_like(parameter) + shift)
        posterior = Posterior(model, guide, 10)
    plan = keeping(model.spec, {"0": [0, 2]})
    small = posterior.restricted({"0": np.array([0, 2])})
    table = compression_table(plan, posterior=posterior)
    assert str(table) == str(compression_table(plan, posterior=small))

    effective = [small.model.family.combine(small.draw(s), small.model.spec) for s in range(4000)]
    gates = torch.stack([e.gates["0"] for e in effective]).repeat_interleave(4, dim=1)[:, None, :]
    weights = torch.stack([e.parameters["3.weight"] for e in effective]) * gates
    first = torch.stack([e.parameters["0.weight"] for e in effective])
    for name, drawn in {"0.weight": first, "3.weight": weights}.items():  # summed, as single ones have heavy tails
        assert _find_variances(small)[name].sum() == pytest.approx(float(drawn.detach().double().var(0).sum()), rel=0.1)
    bits = [layer_bits(w.detach().double().var(0).numpy())[1] for w in (first, weights)]
    assert [part.bits for part in table.layers] == pytest.approx(bits, abs=1)  # a mean near a whole number may tip
    wide = compression_table(plan, posterior=small, exponent=5)
    assert [part.bits for part in wide.layers] == [part.bits + 2 for part in table.layers]

    significands = [part.bits - 4 for part in table.layers]
    state = small.to_module().state_dict()
    values = [
        round_to_grid(state[f"{n}.weight"].double().numpy(), 2.0**-t) if t < 23 else state[f"{n}.weight"].numpy()
        for n, t in zip((0, 3), significands, strict=True)
    ]
    counts = [part.kept for part in table.layers]
    dense = [part.dense for part in table.layers]
    assert counts == [8, 24] and dense == [16, 48]
    expected = published_rates(dense, counts, [part.bits for part in table.layers], values)
    assert table.rates == expected


def test_architecture_that_the_format_does_not_hold(traced, keeping):
    net, spec, inputs = traced
    plan = keeping(spec, spec.everything())
    small = apply(plan, net, example_inputs=inputs)

    class Own(nn.Sequential):
        pass

    table = compression_table(plan, Own(*small))
    assert table.num_bytes is None and len(table.rows) == 3
    assert "No coded file: layer network: Own, which the format does not hold." in str(table)


def test_refusals(compressed, tmp_path):
    with pytest.raises(PlanError, match="network: got 0.* of shape"):
        compression_table(compressed.plan, nn.Sequential(nn.Linear(3, 2)))
    codec.pack(nn.Sequential(nn.Linear(3, 2)), tmp_path / "other.rbc")
    with pytest.raises(PlanError, match="network .*other.rbc: got"):
        compression_table(compressed.plan, tmp_path / "other.rbc")
    with pytest.raises(OutputError, match="no such file"):
        compression_table(compressed.plan, tmp_path / "nosuch.rbc")
    model = lift(build(6, (3,), 2), make_family("group_horseshoe", slab=1.0), "categorical", torch.randn(1, 6))
    posterior = Posterior(model, model.new_guide(), 10)
    with pytest.raises(PlanError, match="posterior: got that of another network"):
        compression_table(compressed.plan, posterior=posterior)


def test_posterior_without_a_variance_is_refused(keeping, monkeypatch):
    model = lift(build(6, (3,), 2), make_family("group_horseshoe", slab=1.0), "categorical", torch.randn(1, 6))
    plan, posterior = keeping(model.spec, model.spec.everything()), Posterior(model, model.new_guide(), 10)
    assert all(4 < part.bits < 32 for part in compression_table(plan, posterior=posterior).layers)

    def refuse(_):
        raise NotImplementedError

    monkeypatch.setattr("pyrobc.dists.SoftCapped.variance", property(refuse))
    with pytest.raises(FamilyError, match="multipliers without a variance.*leave posterior out"):
        compression_table(plan, posterior=posterior)


def test_folded_and_pruned_posteriors_count_what_is_kept(keeping):
    model = lift(build(6, (3,), 2), "group_normal_jeffreys", "categorical", torch.randn(1, 6))
    posterior = Posterior(model, model.new_guide(), 10)
    plan = keeping(model.spec, model.spec.everything())
    whole = compression_table(plan, posterior=posterior)
    folded = fold_scales(posterior)
    assert compression_table(plan, posterior=folded).layers == whole.layers
    folded.guide.by_site()["1.weight"].keep_(torch.rand(3, 6) < 0.3)
    pruned = compression_table(plan, posterior=folded)
    assert pruned.layers == whole.layers, "what is deleted needs no bits, and none are averaged in"
    assert pruned.num_bytes < whole.num_bytes
