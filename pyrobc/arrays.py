"""Inputs and targets from ``.npz`` and ``.npy`` files, checked; nothing is unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrobc.errors import DataError

__all__ = ["read_arrays"]

Array = NDArray[Any]
_NAMES = ("x", "y")


def read_arrays(
    source: str | Mapping[str, str], *, are_labels: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Inputs as reals and targets as int64 labels or reals, with equally many rows.

    Args:
        source: an ``.npz`` file with arrays ``x`` and ``y``, or ``{"x": file, "y": file}`` of ``.npy`` files.
        are_labels: whether targets are class numbers.
        dtype: of the reals.

    Raises:
        DataError: a file is missing or damaged, or the arrays cannot be used.
    """
    if isinstance(source, str):
        where, arrays = source, _read_npz(source)
    else:
        where = ", ".join(source.values())
        _check_names(where, source)
        arrays = {name: _read_npy(source[name]) for name in _NAMES}
    x, y = arrays["x"], arrays["y"]
    if x.ndim == 0 or len(x) == 0:
        raise DataError(f"data {where}", got="no rows", allowed="at least one row", fix="check how it was written")
    if y.ndim == 0 or len(x) != len(y):
        rows = f"{len(x)} inputs and {0 if y.ndim == 0 else len(y)} targets"
        raise DataError(f"data {where}", got=rows, allowed="as many targets as inputs", fix="check how it was split")
    if x.dtype.kind != "f":
        raise DataError(
            f"data {where}: x", got=str(x.dtype), allowed="real numbers", fix="scale it and write x.astype('float32')"
        )
    if are_labels and y.dtype.kind not in "iub":
        raise DataError(
            f"data {where}: y", got=str(y.dtype), allowed="integer labels, as the likelihood is categorical",
            fix="write y.astype('int64'), or set likelihood: normal",
        )  # fmt: skip
    if y.dtype.kind not in "iubf":
        raise DataError(f"data {where}: y", got=str(y.dtype), allowed="numbers", fix="encode the targets as numbers")
    for name, array in (("x", x), ("y", y)):
        if not np.isfinite(array).all():
            raise DataError(
                f"data {where}: {name}", got="NaN or infinite values", allowed="finite numbers",
                fix="drop or impute those rows",
            )  # fmt: skip
    targets = torch.from_numpy(y.astype(np.int64 if are_labels else np.float64))
    return torch.from_numpy(x.astype(np.float64)).to(dtype), targets if are_labels else targets.to(dtype)


def _read_npz(path: str) -> Mapping[str, Array]:
    loaded = _read(path)
    if not isinstance(loaded, Mapping):
        fix = "np.savez(path, x=x, y=y), or give {x: a.npy, y: b.npy}"
        raise DataError(f"data {path}", got="one array", allowed="an .npz file with x and y", fix=fix)
    return loaded


def _read_npy(path: str) -> Array:
    loaded = _read(path)
    if isinstance(loaded, Mapping):
        fix = f"give {path} itself as the data"
        raise DataError(f"data {path}", got="several arrays", allowed="an .npy file", fix=fix)
    return loaded


def _read(path: str) -> Mapping[str, Array] | Array:
    try:
        with Path(path).open("rb") as file:  # numpy leaves a file open that is no archive after all
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return np.asarray(loaded)
            _check_names(path, loaded)
            return {name: loaded[name] for name in _NAMES}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    return DataError(
        f"data {path}",
        got=" ".join(reason.split()),
        allowed="an .npz or .npy file of plain numbers",
        fix="write it with np.savez or np.save, without objects",
    )


def _check_names(where: str, names: Any) -> None:
    missing = [name for name in _NAMES if name not in names]
    if missing:
        known = ", ".join(names) or "nothing"
        fix = f"name the {'inputs x' if missing[0] == 'x' else 'targets y'}"
        raise DataError(f"data {where}", got=f"{known}, without {missing[0]}", allowed="x and y", fix=fix)
