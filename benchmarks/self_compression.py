"""Self-compression on MNIST: one convolution of 100 kernels, trained on propagated moments, cut, trained again.

``python -m benchmarks.self_compression --data FOLDER`` fits the network on ``--rows`` of the 55,000 training rows, cuts
it by each criterion, trains what is left, and reads the test rows at the end, once: accuracy on all 10,000, and
accuracy and output variance under noise on the first 2,000.  Settings, and the criterion whose network is measured,
were chosen on the 5,000 validation rows.  The network is that of the authors' related demonstration (5 x 5 kernels,
ReLU, 2 x 2 max pooling, one linear layer) with the 100 kernels that the paper starts from.  Fits resume from
``--runs``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._mnist import Rows, load_mnist, load_test
from benchmarks._record import write_result
from pyrobc.batches import seeded
from pyrobc.compare import measure_error
from pyrobc.family import make_family
from pyrobc.fit import anneal, fit
from pyrobc.lift import lift
from pyrobc.posterior import Posterior
from pyrobc.predictive import keep_covariance
from pyrobc.propagation import MomentNetwork
from pyrobc.scores import score

KERNELS, SEED = 100, 0
SETTINGS: dict[str, Any] = {"lr": 5e-3, "batch_size": 100, "seed": SEED, "progress": False}
FAMILY = {"initial_variance": 1e-3}
CRITERIA = {"spike": "learned", "rope": "implied"}
NOISE = {"gaussian noise, sd": (0.1, 0.2, 0.3, 0.4, 0.5), "FGSM, eps": (0.01, 0.05, 0.1, 0.2)}
BATTERY_ROWS, CHUNK = 2_000, 250


def main() -> None:
    """Train, cut, train again, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's IDX files")
    parser.add_argument("--rows", type=int, default=20_000, help="training rows")
    parser.add_argument("--epochs", type=int, default=3, help="of each fit")
    parser.add_argument("--runs", type=Path, default=Path("runs/self_compression"), help="where checkpoints are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_mnist(arguments.data, (1, 28, 28), arguments.rows)
    train = {"epochs": arguments.epochs, "schedule": anneal(arguments.epochs), **SETTINGS}
    name = f"{arguments.rows}_{arguments.epochs}"
    with seeded(SEED):
        net = build()
    model = lift(net, make_family("moment_propagation", **FAMILY), "categorical", data.train[0][:1])
    full = fit(model, data.train, checkpoint=arguments.runs / f"{name}_full.pt", **train)
    rows = [_row("validation error, 100 kernels", 100 * measure(full, data.validation), "%")]
    cuts = find_cuts(full)
    for criterion, kept in cuts.items():
        before = 100 * measure(full.restricted(kept), data.validation)
        rows += [
            _row(f"{criterion}: kernels kept", len(kept["0"]), "", "<= 50", len(kept["0"]) <= 50),
            _row(f"{criterion}: validation error after the cut, not trained again", before, "%"),
        ]
    small = {}
    for criterion in ("spike", "kernel_norm, as many as spike"):
        cut = full.restricted(cuts[criterion])
        file = arguments.runs / f"{name}_{criterion.partition(',')[0]}_{len(cuts[criterion]['0'])}.pt"
        small[criterion] = fit(cut.model, data.train, guide=cut.guide, checkpoint=file, **train)
        error = 100 * measure(small[criterion], data.validation)
        rows.append(_row(f"{criterion}: validation error, trained again", error, "%"))
    networks = {"100 kernels": full, f"{len(cuts['spike']['0'])} kernels": small["spike"]}
    rows += measure_test(networks, load_test(arguments.data, (1, 28, 28)))
    notes = (
        f"Conv 5 x 5 ({KERNELS}) - ReLU - max pool 2 - linear 10.  {len(data.train[1]):,} of 55,000 training rows, "
        f"{arguments.epochs} epochs a fit, Adam 5e-3 to 0, batches of 100, KL weight 1, diagonal covariance, "
        "first-order ReLU, expected log likelihood.  Variance: of the outputs before the softmax, mean over classes "
        f"and rows.  Noise is not clipped to pixel range; its rows are the first {BATTERY_ROWS:,} test rows."
    )
    write_result("self_compression", rows, seeds=[SEED], notes=notes, options="--data FOLDER")


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, KERNELS, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(KERNELS * 144, 10)
    )


def find_cuts(posterior: Posterior) -> dict[str, dict[str, np.ndarray]]:
    """Kernels that each criterion keeps: reductions by posterior odds, the published norm by its gap and by rank."""
    cuts = {}
    for label, odds in CRITERIA.items():
        cuts[label] = ~(score(posterior, label).log_odds(odds)["0"] > 0)  # type: ignore[arg-type]
    norms = score(posterior, "kernel_norm")
    cuts["kernel_norm, widest gap"] = ~(norms.delta_f["0"] > norms.cuts["0"])  # type: ignore[index]
    rank = norms.delta_f["0"].argsort().argsort()
    cuts["kernel_norm, as many as spike"] = rank < cuts["spike"].sum()
    return {label: {"0": np.flatnonzero(kept)} for label, kept in cuts.items()}


def measure(posterior: Posterior, rows: Rows) -> float:
    return measure_error(posterior.to_module(), rows, "categorical")[0]


def measure_test(networks: Mapping[str, Posterior], test: Rows) -> list[dict[str, Any]]:
    """Accuracy of the mean networks, then accuracy and variance as noise grows."""
    rows = []
    for name, posterior in networks.items():
        accuracy = 100 * (1 - measure(posterior, test))
        target = "" if name == "100 kernels" else ">= 97"
        rows.append(_row(f"{name}: test accuracy", accuracy, "%", target, accuracy >= 97 if target else ""))
        network = keep_covariance(posterior)
        gap = compare_known(network, test)
        rows.append(_row(f"{name}: no variance against the plain network, max abs difference", gap, "", "0", gap == 0))
        few = test[0][:BATTERY_ROWS], test[1][:BATTERY_ROWS]
        clean = watch(network, few)
        rows += _noise_rows(name, "no noise", 0.0, clean)
        for kind, sizes in NOISE.items():
            path = [clean]
            for size in sizes:
                path.append(watch(network, (disturb(network.net, few, kind, size), few[1])))
                rows += _noise_rows(name, kind, size, path[-1])
            pairs = list(zip(path[:-1], path[1:], strict=True))
            lower, higher = (sum(b[0] < a[0] for a, b in pairs), sum(b[1] > a[1] for a, b in pairs))
            what = f"{name}: {kind.partition(',')[0]}, steps at which accuracy falls ({lower}) and variance rises"
            rows.append(_row(what, higher, f"of {len(sizes)}", "all", higher == len(sizes)))
    return rows


@torch.no_grad()
def watch(network: MomentNetwork, rows: Rows) -> tuple[float, float]:
    """Accuracy in percent and mean variance of the outputs."""
    right, variance = 0, 0.0
    for x, y in zip(rows[0].split(CHUNK), rows[1].split(CHUNK), strict=True):
        outputs = network(x)
        right += int((outputs.mean.argmax(1) == y).sum())
        variance += float(outputs.variance.mean(1).sum())
    return 100 * right / len(rows[1]), variance / len(rows[1])


@torch.no_grad()
def compare_known(network: MomentNetwork, rows: Rows) -> float:
    """Largest difference between the means with all variances at zero and the plain network's outputs."""
    zero = {name: torch.zeros_like(getattr(network, key)) for key, name in network.names.items()}
    known = MomentNetwork(network.net, zero)
    return float((known(rows[0][:CHUNK]).mean - network.net(rows[0][:CHUNK])).abs().max())


def disturb(net: nn.Module, rows: Rows, kind: str, size: float) -> Tensor:
    """Images with Gaussian noise, or moved by the sign of the gradient of their loss (fast gradient sign method)."""
    x, y = rows
    if kind.startswith("gaussian"):
        return x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED))
    moved = []
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        point = part.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(point), labels, reduction="sum"), point)
        moved.append(part + size * slope.sign())
    return torch.cat(moved)


def _noise_rows(name: str, kind: str, size: float, seen: tuple[float, float]) -> list[dict[str, Any]]:
    label = f"{name}: {kind} {size:g}" if size else f"{name}: {kind}"
    return [_row(f"{label}: accuracy", seen[0], "%"), _row(f"{label}: output variance", seen[1], "")]


def _row(what: str, value: float, unit: str, target: str = "", met: bool | str = "") -> dict[str, Any]:
    word = met if isinstance(met, str) else "yes" if met else "NO"
    return {"what": what, "value": value, "unit": unit, "target": target, "met": word}


if __name__ == "__main__":
    main()
