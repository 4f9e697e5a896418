"""CIFAR-10 as JPEG files in two archives: every image decoded, labels by class name, in a fixed shuffled order."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks._mnist import Mnist, Rows
from pyrobc.errors import DataError

__all__ = ["load_cifar", "load_cifar_test"]


def load_cifar(folder: Path, validation_rows: int, limit: int | None = None) -> Mnist:
    """The 50,000 training images in [0, 1], ``(rows, 3, 32, 32)``, some of them for validation, always the same."""
    x, y = _read_archive(folder, "train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:validation_rows], order[validation_rows:][:limit]
    return Mnist((x[rest], y[rest]), (x[held], y[held]))


def load_cifar_test(folder: Path) -> Rows:
    """The 10,000 test images."""
    return _read_archive(folder, "test")


def _read_archive(folder: Path, part: str) -> Rows:
    for file in (folder / "CIFAR10-jpeg" / f"{part}.tar.xz", folder / f"{part}.tar.xz"):
        if file.is_file():
            with tarfile.open(file, "r:xz") as archive:
                images, classes = [], []
                for member in archive:
                    if stream := archive.extractfile(member):
                        images.append(np.asarray(Image.open(stream)))
                        classes.append(member.name.split("/")[1])
            labels = np.unique(classes, return_inverse=True)[1]
            x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)
            return x.contiguous(), torch.from_numpy(labels)
    raise DataError(
        f"CIFAR-10 in {folder}", got=f"no {part}.tar.xz", fix="pass --data",
        allowed="a folder with train.tar.xz and test.tar.xz, or with CIFAR10-jpeg, files named part/class/number.jpg",
    )  # fmt: skip
