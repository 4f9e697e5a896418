"""The demonstration: scikit-learn's handwritten digits, a 64-300-100-10 network, the whole pipeline in a minute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyrobc.batches import TensorLoader, seeded
from pyrobc.compress import Result, compress

__all__ = ["DEMO_SETTINGS", "Digits", "build_network", "compress_digits", "load_digits", "run_demo", "train_dense"]

_SHARED = {"lr": 1e-2, "batch_size": 64}
DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "group_normal_jeffreys": _SHARED | {"epochs": 240, "warmup_epochs": 80, "family_args": {"num_draws": 8}},
    "group_horseshoe": _SHARED | {"epochs": 160, "warmup_epochs": 80, "family_args": {"num_draws": 8, "scale_lr": 3.0}},
    "log_uniform": _SHARED | {"epochs": 240, "warmup_epochs": 0, "family_args": {"num_draws": 8, "gate_lr": 5.0}},
}
"""Of the settings that ``python -m benchmarks.digits --choose`` tries, those with the fewest errors on the validation
rows among networks at least forty times smaller."""

DEFAULT_FAMILY = "group_normal_jeffreys"
"""The one with the fewest errors there."""


class Digits(NamedTuple):
    """1,797 images of 8 x 8 pixels in [0, 1], split once and for all, stratified by class."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits() -> Digits:
    """Scikit-learn's digits: 1,257 rows to train, 180 to choose settings with, 360 to test on once."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    x, y = (data.data / 16).astype("float32"), data.target
    x, x_test, y, y_test = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=180, stratify=y, random_state=0)
    pairs = ((x, y), (x_valid, y_valid), (x_test, y_test))
    return Digits(*((torch.tensor(a), torch.tensor(b)) for a, b in pairs))


def train_dense(
    net: nn.Module, data: tuple[Tensor, Tensor], epochs: int, *, batch_size: int = 64, lr: float = 1e-3, seed: int = 0
) -> nn.Module:
    """Plain training for as long as the Bayesian one: Adam on the cross-entropy."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    with seeded(seed):
        for _ in range(epochs):
            for x, y in TensorLoader(*data, batch_size):
                loss = nn.functional.cross_entropy(net(x), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()
    return net.eval()


def build_network(seed: int) -> nn.Module:
    """The 64-300-100-10 network with seeded initial weights: 50,610 parameters."""
    from pyrobc.models import mlp

    with seeded(seed):
        return mlp.build(64, (300, 100), 10)


def compress_digits(
    digits: Digits, family: str, settings: Mapping[str, Any], *, seed: int, test: Any = None, **options: Any
) -> Result:
    """Train the network densely for as long, then compress it."""
    epochs = settings["epochs"]
    readapt = settings.get("readapt_epochs", epochs // 4)
    dense = train_dense(build_network(seed), digits.train, epochs + readapt, seed=seed)
    return compress(
        build_network(seed), digits.train, family=family, dense=dense, seed=seed, test=test, **settings, **options
    )


def run_demo(
    output: str | Path | None = "runs/demo", *, seed: int = 0, family: str = DEFAULT_FAMILY, progress: bool = True
) -> Result:
    """Compress the digits network; the table compares it with the dense one on the test rows, read once."""
    digits = load_digits()
    settings = DEMO_SETTINGS[family]
    with single_thread():
        return compress_digits(digits, family, settings, seed=seed, test=digits.test, output=output, progress=progress)


@contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread inside: matrices this small lose more to threads that wait than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
