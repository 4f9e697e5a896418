"""A compact network as a ``.pt2`` archive: exported with a free batch size, read back as data, never as code.

``torch.export.load`` unpickles when an archive asks for it, loads compiled libraries that lie in it, looks operators up
by dotted name and evaluates symbolic sizes as Python.  ``read_program`` therefore looks at the archive first and hands
it on only if it holds tensors, a graph of registered operators, plain names and plain arithmetic.
"""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pyrobc.errors import OutputError

__all__ = ["ExportedNetwork", "export_program", "quiet", "read_program", "write_program"]

_FILES = re.compile(
    r"archive_(format|version)|byteorder|\.data/\w+|models/model\.json|extra/\w+"
    r"|data/(weights|constants)/(weight_\d+|tensor_\d+|model_(weights|constants)_config\.json)"
    r"|data/sample_inputs/model\.pt"
)
_OPERATORS = re.compile(r"torch\.ops\.[a-z]\w*\.\w+\.\w+|torch\.sym_\w+|_operator\.\w+|math\.\w+")
_NAME = re.compile(r"\w*")
# Symbols, numbers, named assumptions, capitalised functions, signs: no way to a builtin, an attribute or an item.
_TERM = re.compile(
    r"'?\b[a-z]{1,2}\d+\b'?|\b\d+(\.\d+)?\b|\b[a-z]+=(True|False)\b|\b[A-Z][A-Za-z]*\b|[ +*/%(),<>=&|~-]"
)


class ExportedNetwork(nn.Module):
    """A network read from disk; runs in evaluation mode only."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module()
        self.training = False

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Call it as the network that was saved, with any batch size."""
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Evaluation mode stays; dropout and batch statistics were not exported.

        Raises:
            OutputError: ``mode`` is True.
        """
        if mode:
            raise OutputError(
                "network read from .pt2",
                got="training mode",
                allowed="evaluation mode",
                fix="apply the plan to the original network and load model.safetensors to train on",
            )
        return self


def export_program(net: nn.Module, example_inputs: Any) -> ExportedProgram:
    """Trace ``net``, which is in evaluation mode, with a free first axis.

    Raises:
        OutputError: torch.export cannot trace it, or it fixes the batch size.
    """
    batch = torch.export.Dim("batch")
    rows = _three_rows(example_inputs)
    if isinstance(rows, Mapping):
        args, kwargs, shapes = (), dict(rows), {key: {0: batch} for key in rows}
    else:
        args, kwargs = rows if isinstance(rows, tuple) else (rows,), {}
        shapes = tuple({0: batch} for _ in args)  # type: ignore[assignment]
    try:
        with quiet():
            program = torch.export.export(net, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises whatever the network raises, and a family of its own
        raise OutputError(
            "export of the network",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            allowed="a network that torch.export can trace with a free batch size",
            fix="keep Python control flow on tensor values, and the batch size, out of forward",
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that wrote the file
    return program


def write_program(program: ExportedProgram, path: Path, **extra: str) -> None:
    """Write a ``.pt2`` archive with short texts beside the program."""
    with quiet(), path.open("wb") as file:
        torch.export.save(program, file, extra_files=dict(extra))


def read_program(path: Path) -> tuple[ExportedNetwork, dict[str, str]]:
    """The network of a ``.pt2`` archive and the texts written beside it.

    Raises:
        OutputError: it cannot be read, is damaged, or holds more than tensors and a graph.
    """
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip() is not None:
                raise ValueError("check sums differ")
            files = _relative_names(archive)
            _check_files(archive, files)
            extra = {n[6:]: archive.read(f).decode() for n, f in files.items() if n.startswith("extra/")}
        with quiet():
            program = torch.export.load(io.BytesIO(content))
            return ExportedNetwork(program), extra
    except Exception as error:  # what a damaged archive makes torch raise is not documented
        raise OutputError(
            f"network {path}",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            allowed="model.pt2 as pyrobc.save wrote it",
            fix="save the network again",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' progress notes and deprecation warnings held back, and the log level put back."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _three_rows(value: Any) -> Any:
    """Three copies of the first row: one row would be taken for a constant of the network."""
    if isinstance(value, Tensor):
        return torch.cat([value[:1]] * 3)
    if isinstance(value, Mapping):
        return {key: _three_rows(part) for key, part in value.items()}
    return tuple(_three_rows(part) for part in value)


def _relative_names(archive: zipfile.ZipFile) -> dict[str, str]:
    """Names below the archive's single root folder."""
    names = archive.namelist()
    if len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) != 1:
        raise ValueError("not one folder of distinct files")
    return {name.partition("/")[2]: name for name in names}


def _check_files(archive: zipfile.ZipFile, files: Mapping[str, str]) -> None:
    strange = [name for name in files if not _FILES.fullmatch(name)]
    if strange:
        raise ValueError(f"{strange[0]!r} is neither a tensor nor a graph")
    for name, file in files.items():
        if name.endswith("_config.json"):
            entries = json.loads(archive.read(file))["config"].values()
            stored = [f"data/weights/{entry['path_name']}" for entry in entries if not entry["use_pickle"]]
            if len(stored) < len(entries) or not all(map(_FILES.fullmatch, stored)):
                raise ValueError(f"{name!r} asks for pickles")
    _check_graph(json.loads(archive.read(files["models/model.json"])))
    torch.load(io.BytesIO(archive.read(files["data/sample_inputs/model.pt"])), weights_only=True)


def _check_graph(value: Any) -> None:
    """Refuse what the reader would look up or evaluate unless it is an operator, a name or arithmetic."""
    if isinstance(value, list):
        for part in value:
            _check_graph(part)
    elif isinstance(value, dict):
        for key, text in value.items():
            if key in _PLAIN and isinstance(text, str) and not _PLAIN[key](text):
                raise ValueError(f"{key} {text!r} in the graph")
        for part in value.values():
            _check_graph(part)


def _is_arithmetic(text: str) -> bool:
    return not _TERM.sub("", text)


_PLAIN: dict[str, Callable[[str], object]] = {
    "target": _OPERATORS.fullmatch,
    "name": _NAME.fullmatch,
    "expr_str": _is_arithmetic,
}
