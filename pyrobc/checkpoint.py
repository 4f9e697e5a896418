"""Checkpoints: written whole or not at all, refused if they belong to something else, read without unpickling code."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pyrobc.errors import CheckpointError, OutputError

__all__ = ["read_checkpoint", "write_atomically", "write_checkpoint", "write_text"]

_FORMAT = 1
_FULL_DISK = ("write", "iostream", "unexpected pos")  # what torch's writers say in a RuntimeError
_UNREADABLE = (
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary name beside ``path``, then rename: readers see the old file or the new one.

    Raises:
        OutputError: the directory cannot be made or written, or the disk is full; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _FULL_DISK):
            raise
        raise OutputError(
            f"output {path}",
            got=f"{type(error).__name__}: {error}",
            allowed="a directory that can be written, with room on its disk",
            fix="choose another output directory or free some space",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """``write_atomically`` for text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_checkpoint(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Save ``state`` (tensors, numbers, strings, lists, dicts) under ``identity``."""
    payload = {"format": _FORMAT, "identity": {k: json.dumps(v, default=str) for k, v in identity.items()}}
    buffer = io.BytesIO()  # by way of memory, as torch's own writer does not say that a disk is full
    torch.save(payload | {"state": dict(state)}, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state saved at ``path``.

    Raises:
        CheckpointError: unreadable, another format, or saved under another identity; says which part differs.
    """
    fix = "delete it, or pass another checkpoint path"
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the check sums
            if archive.testzip() is not None:
                raise ValueError("check sums differ")
        payload = torch.load(path, map_location="cpu", weights_only=True)
        saved, state = payload["identity"], payload["state"]
        version = payload["format"]
    except _UNREADABLE as error:
        raise CheckpointError(
            f"checkpoint {path}",
            got=f"an unreadable file ({type(error).__name__})",
            allowed="a checkpoint of this run",
            fix=fix,
        ) from error
    if version != _FORMAT:
        raise CheckpointError(f"checkpoint {path}", got=f"format {version}", allowed=f"format {_FORMAT}", fix=fix)
    for key, value in identity.items():
        here = json.loads(json.dumps(value, default=str))
        there = json.loads(saved.get(key, "null"))
        if there != here:
            if isinstance(here, dict) and isinstance(there, dict):  # say what differs, not all there is
                differing = [k for k in here.keys() | there.keys() if here.get(k) != there.get(k)]
                there, here = ({k: d[k] for k in sorted(differing) if k in d} for d in (there, here))
            raise CheckpointError(f"checkpoint {path}: {key}", got=_shorten(there), allowed=_shorten(here), fix=fix)
    return dict(state)


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
