"""What a Markov chain of supports buys on MNIST: clusters, mask bits and error, beside independent supports.

LeNet-300-100 is trained plainly, then fitted from there under Turbo-VBI with a chain and with independent supports, for
some rates of inactive weights' precision, all else equal.  Each posterior deletes what it holds inactive, loses the
units that are then dead, is fitted again, and deletes once more.  Errors are of validation rows.  The two priors weigh
the same rate differently, so they are compared where errors are equal: an independent prior is beaten by a chain whose
error is no more than one standard error above, with fewer clusters and fewer bits of mask per weight.

Masks of what is left are priced by the best Markov chain, the best independent rate, and the mask model of the ``.rbc``
coder, which knows the image's width.  Times are processor seconds of this process.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks._mnist import Mnist, load_mnist
from benchmarks._record import write_result
from pyrobc.codec.coder import BitMeter
from pyrobc.codec.geometry import Geometry
from pyrobc.codec.priors import find_level
from pyrobc.codec.sparse import SparseCoder
from pyrobc.dead_units import remove_dead_units
from pyrobc.dists import BinaryChain, Rates, count_bits
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.lift import lift
from pyrobc.meanfield import NormalFactor
from pyrobc.models import lenet_300_100
from pyrobc.posterior import Posterior
from pyrobc.weights import count_weights, prune_weights

STRUCTURES = ("chain", "independent")
LARGEST_SHARE = 0.10
NUM_WEIGHTS = (1000, 1000)
ERROR = "validation error after two more epochs, %"
CLUSTERS, BITS = "clusters", "bits of mask per weight, code of its own prior"


def main() -> None:
    """Train, fit twice, delete, compare, and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's IDX files")
    parser.add_argument("--epochs", type=int, default=4, help="of each fit")
    parser.add_argument("--idle-rates", type=float, nargs="+", default=[1e-5, 3e-5], help="of inactive weights")
    parser.add_argument("--limit", type=int, help="training rows, for smoke runs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_mnist(arguments.data, (784,), arguments.limit)
    net, plain_epoch = train_plainly(data, arguments.seed)
    points: dict[str, list[dict[str, float]]] = {structure: [] for structure in STRUCTURES}
    for rate in arguments.idle_rates:
        for structure in STRUCTURES:
            posterior, epoch = fit_supports(net, data, structure, rate, arguments)
            points[structure].append(
                {"idle rate": rate, "epoch": epoch} | compare(posterior, data, structure, arguments.seed)
            )
    rows = time_messages(plain_epoch, points["chain"][0]["epoch"])
    rows.append(row("plain network: validation error", measure(net, data), "%"))
    for structure, found in points.items():
        for point in found:
            label = f"{structure}, idle rate {point.pop('idle rate'):g}"
            rows += [row(f"{label}: {what}", value, "") for what, value in point.items() if what != "epoch"]
    beaten = [
        any(is_better(chain, point, len(data.validation[1])) for chain in points["chain"])
        for point in points["independent"]
    ]
    rows.append(row("independent priors beaten by a chain", sum(beaten), f"of {len(beaten)}", "all", all(beaten)))
    notes = f"LeNet-300-100, {len(data.train[1])} training rows, {arguments.epochs} epochs a fit and 2 after deletion."
    write_result("turbo_vbi", rows, seeds=[arguments.seed], notes=notes, options="--data FOLDER")


def train_plainly(data: Mnist, seed: int, epochs: int = 6) -> tuple[nn.Module, float]:
    """A trained network, and the seconds of one of its epochs."""
    torch.manual_seed(seed)
    net = lenet_300_100()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    start = time.process_time()
    for _ in range(epochs):
        for index in torch.randperm(len(data.train[1])).split(128):
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(net(data.train[0][index]), data.train[1][index]).backward()  # type: ignore
            optimizer.step()
    return net, (time.process_time() - start) / epochs


def fit_supports(
    net: nn.Module, data: Mnist, structure: str, idle_rate: float, options: argparse.Namespace
) -> tuple[Posterior, float]:
    """The posterior, and the seconds of one of its epochs."""
    family = make_family("turbo_vbi", structure=structure, idle_rate=idle_rate)
    model, epochs = lift(net, family, "categorical", data.train[0][:1]), options.epochs
    start = time.process_time()
    posterior = fit(
        model, data.train, epochs=epochs, seed=options.seed, schedule=anneal(epochs), warmup_epochs=1, progress=False
    )
    return posterior, (time.process_time() - start) / epochs


def time_messages(plain_epoch: float, epoch: float) -> list[dict[str, Any]]:
    """Messages, marginals, divergence and M-step over a million weights, beside one epoch."""
    evidence = torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(0))
    chain = BinaryChain(Rates(*torch.tensor([0.2, 0.05, 0.2])), evidence)
    times = []
    for _ in range(7):
        start, fresh = time.process_time(), chain.given(evidence)
        fresh.kl_from_prior.sum(), fresh.estimate()
        times.append(time.process_time() - start)
    share = float(np.median(times)) / epoch
    return [
        row("messages over 1e6 weights", 1e3 * float(np.median(times)), "ms"),
        row("one epoch, Turbo-VBI", epoch, "s"),
        row("one epoch, plain network", plain_epoch, "s"),
        row("messages over 1e6 weights / one epoch", share, "", f"<= {LARGEST_SHARE}", share <= LARGEST_SHARE),
    ]


def compare(posterior: Posterior, data: Mnist, structure: str, seed: int) -> dict[str, float]:
    """What is left after deletion, and how it is coded."""
    found = {"validation error before deletion, %": measure(posterior.to_module(), data)}
    prune_weights(posterior)
    found |= {"validation error after deletion, %": measure(posterior.to_module(), data)}
    small = remove_dead_units(posterior, data.train)
    small = fit(small.model, data.train, epochs=2, seed=seed, schedule=anneal(2), guide=small.guide, progress=False)
    prune_weights(small)
    small = remove_dead_units(small, data.train)
    masks = [f.kept for f in small.guide.by_site().values() if isinstance(f, NormalFactor) and f.loc.dim() > 1]
    origin = small.model.spec.block("input").origin
    pixels = np.arange(784) if origin is None else origin
    weights, runs = sum(int(mask.sum()) for mask in masks), sum(count_runs(mask) for mask in masks)
    bits = np.sum([price_mask(mask, pixels) for mask in masks], 0) / weights
    found |= {
        "weights and biases kept": float(count_weights(small)[0]),
        ERROR: measure(small.to_module(), data),
        CLUSTERS: float(runs),
        "mean length of a cluster": weights / runs,
        BITS: float(bits[STRUCTURES.index(structure)]),
        "bits of mask per weight, Markov chain": float(bits[0]),
        "bits of mask per weight, independent": float(bits[1]),
        "bits of mask per weight, coder of .rbc files": float(bits[2]),
    }
    widths = [small.model.spec.tensors[layer.weight][1] for layer in small.model.spec.layers]
    return found | {f"inputs of layer {i + 1}": float(width) for i, width in enumerate(widths)}


def is_better(chain: dict[str, float], other: dict[str, float], rows: int) -> bool:
    """Whether a chain has fewer clusters and mask bits at an error that is no larger, within one standard error."""
    share = other[ERROR] / 100
    slack = 100 * (share * (1 - share) / rows) ** 0.5
    return chain[ERROR] <= other[ERROR] + slack and all(chain[what] < other[what] for what in (CLUSTERS, BITS))


def count_runs(mask: Tensor) -> int:
    """Runs of kept weights along the inputs of each output."""
    return int(mask[:, 0].sum()) + int((mask[:, 1:] & ~mask[:, :-1]).sum())


def price_mask(mask: Tensor, pixels: NDArray[np.int64]) -> tuple[float, float, float]:
    """Bits of a mask under a chain, an independent rate, and the coder; columns are pixels where there are as many."""
    rows, columns = mask.shape
    if columns == len(pixels):
        geometry = Geometry("image", pixels, int(pixels[-1]) + 1, 28)
    else:
        geometry = Geometry("out" if rows <= 16 else "flat", np.arange(columns))
    meter = BitMeter()
    coder = SparseCoder(meter, geometry, rows, find_level(int(mask.sum()), mask.numel()), only_mask=True)
    for line in mask.long().tolist():
        coder.code_row(line)
    return *count_bits(mask.double()), meter.bits


@torch.no_grad()
def measure(net: nn.Module, data: Mnist) -> float:
    """Validation error, %."""
    return 100 * float((net(data.validation[0]).argmax(1) != data.validation[1]).double().mean())


def row(what: str, value: float, unit: str, target: str = "reported", is_met: bool | None = None) -> dict[str, Any]:
    """One line of the table."""
    return {
        "what": what,
        "value": value,
        "unit": unit,
        "target": target,
        "met": {None: "", True: "yes"}.get(is_met, "NO"),
    }


if __name__ == "__main__":
    main()
