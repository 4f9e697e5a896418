"""What a Markov chain of supports buys on MNIST: clusters, mask bits and error, beside independent supports.

``python -m benchmarks.turbo_vbi --data FOLDER`` fits what is missing in ``runs/turbo_vbi``, one file for each point,
and writes ``results/turbo_vbi.json`` and ``.md``.  ``--part`` fits only, for several processes; ``--measure`` reports
what is there.

LeNet-300-100 is trained plainly, then fitted from there under Turbo-VBI with a chain and with independent supports, for
some rates of inactive weights' precision, all else equal.  Each posterior deletes what it holds inactive, loses the
units that are then dead, is fitted again, and deletes once more.  Errors are of validation rows.  The two priors weigh
the same rate differently, so each has rates of its own, and they are compared where errors are equal: an independent
prior is beaten by a chain whose error is no more than one standard error above, with fewer clusters and fewer bits of
mask per weight.  A fit that has broken down (``LARGEST_ERROR``) is listed and not compared.

Masks of what is left are priced by the best Markov chain, the best independent rate, and the mask model of the ``.rbc``
coder, which knows the image's width.  Times are processor seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks._mnist import Mnist, load_mnist
from benchmarks._record import write_result
from pyrobc.checkpoint import write_text
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

RATES = {"chain": (3e-6, 1e-5, 3e-5, 1e-4), "independent": (1e-6, 3e-6, 1e-5)}
LARGEST_ERROR = 5.0
NOT_SHOWN = ("structure", "idle rate", "seed", "plain epoch", "epoch", "messages")
LARGEST_SHARE = 0.10
NUM_WEIGHTS = (1000, 1000)
ERROR = "validation error after two more epochs, %"
CLUSTERS, BITS = "clusters", "bits of mask per weight, code of its own prior"


def main() -> None:
    """Fit, or report, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's IDX files")
    parser.add_argument("--epochs", type=int, default=4, help="of each fit")
    parser.add_argument("--structures", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="training rows, for smoke runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/turbo_vbi"), help="where points are kept")
    parser.add_argument("--part", action="store_true", help="fit what these options name, and do not report")
    parser.add_argument("--measure", action="store_true", help="report what is there, and do not fit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_mnist(arguments.data, (784,), arguments.limit)
    place = arguments.runs / f"{len(data.train[1])}_rows_{arguments.epochs}_epochs"
    if not arguments.measure:
        for seed in arguments.seeds:
            for structure in arguments.structures:
                run(data, structure, seed, arguments.epochs, place)
    if not arguments.part:
        report(place, len(data.validation[1]), arguments.epochs, len(data.train[1]))


def run(data: Mnist, structure: str, seed: int, epochs: int, place: Path) -> None:
    """Every rate of one prior on one seed; what is on disk is not made again."""
    files = {rate: place / f"{structure}-{rate:g}-{seed}.json" for rate in RATES[structure]}
    missing = {rate: file for rate, file in files.items() if not file.exists()}
    if not missing:
        return
    place.mkdir(parents=True, exist_ok=True)
    net, plain_epoch = train_plainly(data, seed)
    for rate, file in missing.items():
        posterior, epoch = fit_supports(net, data, structure, rate, seed, epochs)
        found = {"structure": structure, "idle rate": rate, "seed": seed, "plain epoch": plain_epoch, "epoch": epoch}
        found["messages"] = time_messages()
        found |= {"plain error": measure(net, data)} | compare(posterior, data, structure, seed)
        write_text(file, json.dumps(found, indent=1) + "\n")
        print(found, flush=True)


def report(place: Path, validation_rows: int, epochs: int, rows_trained: int) -> None:
    """The table of all points that are there."""
    points = [json.loads(file.read_text()) for file in sorted(place.glob("*.json"))]
    chains = [p for p in points if p["structure"] == "chain"]
    rows = describe_times(chains)
    for point in points:
        label = f"{point['structure']}, idle rate {point['idle rate']:g}, seed {point['seed']}"
        rows += [row(f"{label}: {what}", point[what], "") for what in point if what not in NOT_SHOWN]
    others = [p for p in points if p["structure"] == "independent" and p[ERROR] <= LARGEST_ERROR]
    beaten = [
        any(is_better(chain, point, validation_rows) for chain in chains if chain["seed"] == point["seed"])
        for point in others
    ]
    rows.append(
        row(
            "independent priors beaten by a chain",
            sum(beaten),
            f"of {len(beaten)}",
            "all",
            0 < sum(beaten) == len(beaten),
        )
    )
    left_out = sum(p["structure"] == "independent" for p in points) - len(others)
    notes = (
        f"LeNet-300-100, {rows_trained} training rows, {epochs} epochs a fit and 2 after deletion.  Fits of the "
        f"independent prior above {LARGEST_ERROR:g} % of errors, not compared: {left_out}."
    )
    write_result("turbo_vbi", rows, seeds=sorted({p["seed"] for p in points}), notes=notes, options="--data FOLDER")


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
    net: nn.Module, data: Mnist, structure: str, idle_rate: float, seed: int, epochs: int
) -> tuple[Posterior, float]:
    """The posterior, and the seconds of one of its epochs."""
    family = make_family("turbo_vbi", structure=structure, idle_rate=idle_rate)
    model = lift(net, family, "categorical", data.train[0][:1])
    start = time.process_time()
    posterior = fit(
        model, data.train, epochs=epochs, seed=seed, schedule=anneal(epochs), warmup_epochs=1, progress=False
    )
    return posterior, (time.process_time() - start) / epochs


def time_messages() -> float:
    """Seconds of messages, marginals, divergence and M-step over a million weights."""
    evidence = torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(0))
    chain = BinaryChain(Rates(*torch.tensor([0.2, 0.05, 0.2])), evidence)
    times = []
    for _ in range(7):
        start, fresh = time.process_time(), chain.given(evidence)
        fresh.kl_from_prior.sum(), fresh.estimate()
        times.append(time.process_time() - start)
    return float(np.median(times))


def describe_times(chains: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages beside the epochs of the same process; medians over runs."""
    shares = [p["messages"] / p["epoch"] for p in chains]
    share, messages, epoch, plain = (
        float(np.median(values))
        for values in (shares, *([p[key] for p in chains] for key in ("messages", "epoch", "plain epoch")))
    )
    return [
        row("messages over 1e6 weights", 1e3 * messages, "ms"),
        row("one epoch, Turbo-VBI", epoch, "s"),
        row("one epoch, plain network", plain, "s"),
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
        BITS: float(bits[list(RATES).index(structure)]),
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
