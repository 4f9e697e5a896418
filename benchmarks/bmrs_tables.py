"""Accuracy against compression of gated networks, by every rule of the BMRS paper and by posterior odds.

``python -m benchmarks.bmrs_tables --data FOLDER`` follows the protocol of Wright, Igel and Selvan (2024): 80/20 split,
Adam without decay; *post-training*: one fit, then for each score groups leave in its order, one epoch of re-adapting a
level; *continuous*: groups leave after every epoch, ten epochs of re-adapting at the end.  Every run is kept in
``runs/bmrs_tables`` and not repeated; ``--part`` trains a share and writes no tables, ``--measure`` only writes them.
Compression is counted on the network that is left, cut physically.  Seconds are CPU time of the process.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._bmrs_report import write_report
from benchmarks._cifar import load_cifar, load_cifar_test
from benchmarks._mnist import Mnist, Rows, load_mnist, load_test
from benchmarks._record import RESULTS, describe_place
from pyrobc.baselines import Cut
from pyrobc.batches import seeded
from pyrobc.checkpoint import write_text
from pyrobc.fit import anneal, fit
from pyrobc.guides.log_uniform import RELEASED_PROBABILITY, LogUniform
from pyrobc.lift import lift
from pyrobc.models import lenet, mlp, resnet
from pyrobc.posterior import Posterior
from pyrobc.pruning import PruneEachEpoch, prune_in_steps
from pyrobc.scores import PriorOdds, Score, score

RUNS = Path("runs/bmrs_tables")
LEVELS = (0.4, 0.6, 0.75, 0.85, 0.92)
"""Shares of the groups that leave, besides those at which a rule stops."""
TUNE_EPOCHS = 10
NUM_DRAWS = 16


@dataclass(frozen=True)
class Setting:
    """A network on a data set: how it is built, its batch size and learning rate, its regimes."""

    build: Callable[[], nn.Module]
    batch_size: int
    lr: float
    regimes: tuple[str, ...] = ("after", "along")


@dataclass(frozen=True)
class Rule:
    """A score and where it stops."""

    reduction: str
    prior_odds: PriorOdds = "implied"
    cut: Cut = "published"


SETTINGS: dict[tuple[str, str], Setting] = {
    ("mnist", "mlp"): Setting(lambda: mlp.build(784, (100,) * 7, activation=nn.Tanh), 128, 8.5e-4),
    ("mnist", "lenet_5"): Setting(lenet.lenet_5, 128, 1.4e-3),
    ("cifar10", "mlp"): Setting(lambda: mlp.build(3072, (150,) * 5, activation=nn.Tanh), 32, 6.8e-4),
    ("cifar10", "lenet_5"): Setting(lambda: lenet.build((18, 48), (360, 252), 3, side=32), 64, 1e-3),
    ("cifar10", "resnet_20"): Setting(resnet.resnet_20, 128, 1e-3, regimes=("along",)),
}
RULES: dict[str, Rule] = {
    "BMRS_N": Rule("spike", "none"),
    "BMRS_N as released": Rule("spike", RELEASED_PROBABILITY),
    "BMRS_N, learned odds": Rule("spike", "learned"),
    "BMRS_U 8": Rule("uniform8", "none"),
    "BMRS_U 4": Rule("uniform4", "none"),
    "BMRS_U 4, posterior odds": Rule("uniform4"),
    "BMRS_U 4 and all below": Rule("below4", "none"),
    "ROPE, posterior odds": Rule("rope"),
    "SNR < 1": Rule("log_noise"),
    "E[gate] < 0.1": Rule("log_closure"),
    "L2": Rule("l2", cut="gap"),
    "magnitude": Rule("magnitude", cut="gap"),
}
ALONG = ("BMRS_N as released", "BMRS_U 4", "SNR < 1", "ROPE, posterior odds")


def main() -> None:
    """Train what is missing, then write the tables."""
    datasets, networks = sorted({d for d, _ in SETTINGS}), sorted({n for _, n in SETTINGS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's IDX files and CIFAR10-jpeg")
    parser.add_argument("--datasets", nargs="+", choices=datasets, default=["mnist", "cifar10"])
    parser.add_argument("--networks", nargs="+", choices=networks, default=["mlp", "lenet_5", "resnet_20"])
    parser.add_argument("--kl-scales", nargs="+", choices=["elbo", "mean"], default=["mean", "elbo"])
    parser.add_argument("--temperature", type=float, default=1.0, help="weight of the KL, besides that of the scale")
    scores = list(dict.fromkeys(rule.reduction for rule in RULES.values()))
    parser.add_argument("--scores", nargs="+", choices=scores, default=scores, help="of post-training pruning")
    parser.add_argument("--inputs", action="store_true", help="prune inputs too, which the paper does not")
    parser.add_argument("--anneal", action="store_true", help="anneal fits, and re-adapt at a tenth of the rate")
    parser.add_argument("--rules", nargs="+", choices=ALONG, default=list(ALONG), help="of continuous pruning")
    parser.add_argument("--regimes", nargs="+", choices=["after", "along"], default=["after", "along"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=50, help="of the first fit, or of a continuous run in all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--part", action="store_true", help="train what these options name, and write no tables")
    parser.add_argument("--measure", action="store_true", help="write the tables of what is there")
    parser.add_argument("--smoke", action="store_true", help="a thousand rows and one level: shows only that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dataset in arguments.datasets if not arguments.measure else ():
        data, test = load(dataset, arguments.data, 1_000 if arguments.smoke else None)
        for seed in arguments.seeds:
            for network in arguments.networks:
                for kl_scale in arguments.kl_scales:
                    if (dataset, network) in SETTINGS:
                        run = Run(dataset, network, kl_scale, seed, data, test, arguments)
                        run.train()
    if not arguments.part:
        results = arguments.runs if arguments.smoke else RESULTS
        write_report(arguments.runs, {name: vars(rule) for name, rule in RULES.items()}, results)


def load(dataset: str, folder: Path, limit: int | None) -> tuple[Mnist, Rows]:
    """Training, validation and test rows, each channel standardised by the training rows."""
    if dataset == "mnist":
        data, test = load_mnist(folder, (1, 28, 28), limit, 12_000), load_test(folder, (1, 28, 28))
    else:
        data, test = load_cifar(folder, 10_000, limit), load_cifar_test(folder)
    shift, scale = (f(data.train[0], (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    parts = [((x - shift) / scale, y) for x, y in (data.train, data.validation, test)]
    return Mnist(parts[0], parts[1]), parts[2]


class Run:
    """One network on one data set from one seed, under one weight of the KL."""

    def __init__(
        self, dataset: str, network: str, kl_scale: Any, seed: int, data: Mnist, test: Rows, arguments: Any
    ) -> None:
        self.setting, self.seed, self.data, self.test = SETTINGS[dataset, network], seed, data, test
        self.epochs, self.regimes = arguments.epochs, [r for r in self.setting.regimes if r in arguments.regimes]
        self.levels = LEVELS[1:2] if arguments.smoke else LEVELS
        label = kl_scale if arguments.temperature == 1.0 else f"{kl_scale} x {arguments.temperature:g}"
        label += ", inputs" * arguments.inputs + ", annealed" * arguments.anneal
        self.folder = arguments.runs / f"{dataset}-{network}-{label.replace(' ', '').replace(',', '-')}-{seed}"
        self.identity = {"dataset": dataset, "network": network, "kl_scale": label, "seed": seed}
        self.rules, self.scores = arguments.rules, arguments.scores
        self.schedule, self.step_lr = (
            (anneal(self.epochs), 0.1 * self.setting.lr) if arguments.anneal else (None, self.setting.lr)
        )
        self.identity |= {"epochs": self.epochs, "rows": len(data.train[1]), "command": describe_command(arguments)}
        self.identity |= {"place": describe_place(arguments.device)}
        with seeded(seed):
            net = self.setting.build()
        family = LogUniform(num_draws=NUM_DRAWS, kl_scale=kl_scale)
        self.model = lift(net, family, "categorical", data.train[0][:1], prune_inputs=arguments.inputs)
        self.shared: dict[str, Any] = {
            "seed": seed, "lr": self.setting.lr, "batch_size": self.setting.batch_size, "progress": False,
            "device": arguments.device, "temperature": arguments.temperature,
        }  # fmt: skip

    def train(self) -> None:
        """All regimes; the first names the network that both are compared with."""
        if "after" in self.regimes:
            posterior = fit(
                copy.deepcopy(self.model),
                self.data.train,
                epochs=self.epochs,
                checkpoint=self.folder / "fit.pt",
                **self.shared,
            )
            self.keep("none", "after", 0, lambda: [self.describe(posterior)])
            for reduction in self.scores:
                self.keep(reduction, "after", 1, lambda name=reduction: self.prune_after(posterior, name))
        if "along" in self.regimes:
            for name in self.rules:
                self.keep(name, "along", 2, lambda name=name: self.prune_along(RULES[name]))

    def keep(self, name: str, regime: str, number: int, make: Callable[[], list[dict[str, Any]]]) -> None:
        """Write what ``make`` returns, if it is not there."""
        file = self.folder / f"{number}-{regime}-{name.replace(' ', '_').replace('/', '')}.json"
        if file.exists():
            return
        start = time.process_time()
        points = make()
        record = self.identity | {"regime": regime, "name": name, "seconds": time.process_time() - start}
        write_text(file, json.dumps(record | {"points": points}, indent=1) + "\n")
        last = points[-1]
        shown = {key: round(last[key], 2) for key in ("removed", "validation", "macs")}
        print(self.folder.name, regime, name, f"{record['seconds']:.0f} s", shown, flush=True)

    def prune_after(self, posterior: Posterior, reduction: str) -> list[dict[str, Any]]:
        """Levels in the order of one score; the points at which its rules stop are named."""
        total = posterior.model.spec.num_groups
        rules = {name: rule for name, rule in RULES.items() if rule.reduction == reduction}
        stops = {name: count_pruned(score(posterior, reduction, cut=rule.cut), rule) for name, rule in rules.items()}
        first = next(iter(rules.values()))
        counts = sorted({round(share * total) for share in self.levels} | {n for n in stops.values() if n})
        steps = prune_in_steps(
            posterior, self.data.train, reduction, counts=counts, prior_odds=first.prior_odds, cut=first.cut,
            **self.shared | {"lr": self.step_lr},
        )  # fmt: skip
        points = [
            self.describe(step.posterior) | {"count": n, "stops": [name for name, stop in stops.items() if stop == n]}
            for n, step in zip(counts, steps, strict=True)
        ]
        unpruned = [name for name, stop in stops.items() if stop == 0]
        return [self.describe(posterior) | {"count": 0, "stops": unpruned}, *points]

    def prune_along(self, rule: Rule) -> list[dict[str, Any]]:
        """The network at the end, with the CPU time and the MACs of every epoch."""
        clock, times = [time.process_time()], []

        def note(_: dict[str, float]) -> None:
            times.append(time.process_time() - clock[0])
            clock[0] = time.process_time()

        stop = max(1, self.epochs - TUNE_EPOCHS)
        prune = PruneEachEpoch(rule.reduction, rule.prior_odds, cut=rule.cut, stop_after=stop)
        posterior = fit(
            copy.deepcopy(self.model),
            self.data.train,
            epochs=self.epochs,
            schedule=self.schedule,
            prune=prune,
            on_epoch=note,
            **self.shared,
        )
        macs = [numbers["macs"] for numbers in posterior.history]
        return [self.describe(posterior) | {"epoch_seconds": times, "epoch_macs": macs}]

    def describe(self, posterior: Posterior) -> dict[str, Any]:
        """What is left of the network, and how it does."""
        net = posterior.to_module()
        before, after = (spec.forecast(spec.everything()) for spec in (self.model.spec, posterior.model.spec))
        return {
            "removed": 100 * (1 - after[0] / before[0]),
            "validation": measure_accuracy(net, self.data.validation),
            "test": measure_accuracy(net, self.test),
            "macs": after[1] / before[1],
            "parameters": after[0],
            "widths": {block.name: block.size for block in posterior.model.spec.blocks},
        }


def count_pruned(scored: Score, rule: Rule) -> int:
    """Groups that a rule prunes."""
    odds = np.concatenate(list(scored.log_odds(rule.prior_odds).values()))
    return int((np.isfinite(odds) & (odds > 0)).sum())


@torch.no_grad()
def measure_accuracy(net: nn.Module, rows: Rows) -> float:
    """Percent."""
    device = next(net.parameters()).device
    outputs: Tensor = torch.cat([net(x.to(device)).cpu() for x in rows[0].split(1000)])
    return 100 * float((outputs.argmax(1) == rows[1]).double().mean())


def describe_command(arguments: Any) -> str:
    """The options that made a run; those that only share the work out are left out."""
    words = [f"--{flag}" for flag in ("inputs", "anneal") if getattr(arguments, flag)]
    if arguments.temperature != 1.0:
        words.append(f"--temperature {arguments.temperature:g}")
    if arguments.device != "cpu":
        words.append(f"--device {arguments.device}")
    return " ".join([f"python -m benchmarks.bmrs_tables --data FOLDER --epochs {arguments.epochs}", *words])


if __name__ == "__main__":
    main()
