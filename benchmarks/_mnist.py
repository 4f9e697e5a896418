"""MNIST from its four IDX files: the rows every method trains on, those it may choose on, and those read once."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrobc.errors import DataError

__all__ = ["DroppedRows", "Mnist", "load_mnist", "load_test"]

VALIDATION_ROWS = 5_000
_POOL = 6_000_000

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Mnist:
    """Images in [0, 1], shape ``(rows, *shape)``, and labels."""

    train: Rows
    validation: Rows


def load_mnist(
    folder: Path, shape: tuple[int, ...], limit: int | None = None, validation_rows: int = VALIDATION_ROWS
) -> Mnist:
    """The 60,000 training rows, some of them drawn for validation, always the same; ``limit`` for smoke runs."""
    x, y = _read_pair(folder, "train", shape)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:validation_rows], order[validation_rows:][:limit]
    return Mnist((x[rest], y[rest]), (x[held], y[held]))


def load_test(folder: Path, shape: tuple[int, ...]) -> Rows:
    """The 10,000 test rows."""
    return _read_pair(folder, "t10k", shape)


def _read_pair(folder: Path, part: str, shape: tuple[int, ...]) -> Rows:
    images, labels = (_read_idx(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return torch.from_numpy(images).float().div(255).reshape(-1, *shape), torch.from_numpy(labels).long()


def _read_idx(folder: Path, name: str) -> np.ndarray:
    for file in (folder / "MNIST" / "raw" / f"{name}.gz", folder / f"{name}.gz"):
        if file.is_file():
            content = gzip.decompress(file.read_bytes())
            shape = np.frombuffer(content, ">i4", content[3], 4)
            return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape).copy()
    raise DataError(
        f"MNIST in {folder}", got=f"no {name}.gz", allowed="a folder with MNIST's four .gz files, or with MNIST/raw",
        fix="pass --data",
    )  # fmt: skip


class DroppedRows:
    """Minibatches whose pixels are dropped at a rate and the rest scaled up, as input dropout does.

    The mask is a window into a pool of random bits drawn once: drawing it anew takes longer than the training step.
    """

    def __init__(self, rows: Rows, rate: float, batch_size: int = 128) -> None:
        self.inputs, self.targets = rows
        self.rate = rate
        self.batch_size, self.dataset = batch_size, range(len(rows[1]))
        noise = torch.rand(_POOL, generator=torch.Generator().manual_seed(1))
        self.pool = (noise >= rate).float() / (1 - rate)

    def __len__(self) -> int:
        return -(-len(self.targets) // self.batch_size)

    def __iter__(self) -> Iterator[Rows]:
        for index in torch.randperm(len(self.targets)).split(self.batch_size):
            x = self.inputs[index]
            if not self.rate:
                yield x, self.targets[index]
                continue
            start = int(torch.randint(_POOL - x.numel(), ()))
            yield x * self.pool[start : start + x.numel()].view_as(x), self.targets[index]
