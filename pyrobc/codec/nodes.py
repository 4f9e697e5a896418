"""The tree of an ``.rbc`` file: from a network to layers, tensor headers and symbols, and back."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyrobc.codec.format import ByteReader, ByteWriter, damaged
from pyrobc.codec.index import IndexForm, read_index, take_index, write_index
from pyrobc.codec.layers import SEQUENTIAL, build_layer, describe_layer, read_layer, write_layer
from pyrobc.codec.streams import MAX_WIDTH, SymbolReader, SymbolWriter
from pyrobc.codec.tensors import Form, choose_form, read_form, take_tensor, write_tensor
from pyrobc.errors import OutputError
from pyrobc.slicing import SelectLinear

__all__ = ["GRIDDED", "NodeReader", "NodeWriter"]

GRIDDED = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers whose weights and biases share a grid if one is given for all."""
_NAMED = SEQUENTIAL | 0x80
_MAX_DEPTH = 32
_MAX_NAME = 255
_MAX_MODULES = 4096
_TENSORS = ("weight", "bias", "running_mean", "running_var")


class NodeWriter:
    """Appends nodes and tensor headers to ``header`` and symbols to ``stream``; ``ledger`` counts bits by part."""

    def __init__(self, steps: Mapping[str, float]) -> None:
        self.header, self.stream = ByteWriter(), SymbolWriter()
        self.ledger: defaultdict[str, float] = defaultdict(float)
        self.numbers = 0
        self._steps = steps
        self._seen: dict[int, str] = {}
        self._modules = 0

    def put_node(self, module: nn.Module, name: str, depth: int) -> None:
        """A module and all below it."""
        self._modules += 1
        if self._modules > _MAX_MODULES:
            raise _refuse("", "network", "more modules", f"up to {_MAX_MODULES}", "merge its layers")
        if type(module) is not nn.Sequential:
            self._put_layer(module, name)
            return
        if depth == _MAX_DEPTH:
            raise _refuse(name, "Sequential", f"more than {_MAX_DEPTH} levels", "a flatter network", "flatten the tree")
        before, names = len(self.header.content), list(module._modules)
        is_plain = names == [str(i) for i in range(len(names))]
        self.header.put_byte(SEQUENTIAL if is_plain else _NAMED)
        self.header.put_varint(len(names))
        self.ledger["layers"] += 8 * (len(self.header.content) - before)
        for child, part in module._modules.items():
            if not is_plain:
                if len(child.encode()) > _MAX_NAME:
                    raise _refuse(name, "name", f"{len(child)} letters", f"up to {_MAX_NAME} bytes", "shorten it")
                self.header.put_text(child)
                self.ledger["layers"] += 8 * (len(child.encode()) + (1 if len(child.encode()) < 128 else 2))
            assert part is not None
            self.put_node(part, f"{name}.{child}" if name else child, depth + 1)

    def _put_layer(self, module: nn.Module, name: str) -> None:
        before = len(self.header.content)
        write_layer(describe_layer(module, name), self.header)
        self.ledger["layers"] += 8 * (len(self.header.content) - before)
        positions, width = None, _kernel_width(module)
        if isinstance(module, SelectLinear):
            positions = _check_index(module, name)
            width = write_index(positions, self.header, self.stream, self.ledger)
            self.numbers += _index_numbers(len(positions), int(positions[-1]))
        tracked = getattr(module, "num_batches_tracked", None)
        if tracked is not None:
            before = len(self.header.content)
            self.header.put_varint(int(tracked))
            self.ledger["headers"] += 8 * (len(self.header.content) - before)
        for attribute in _TENSORS:
            tensor = getattr(module, attribute, None)
            if tensor is None:
                continue
            path = f"{name}.{attribute}" if name else attribute
            values = _to_matrix(self._check_tensor(tensor, path))
            columns = positions if positions is not None and attribute == "weight" else np.arange(values.shape[1])
            form = choose_form(
                values, self._steps.get(path), columns, width if attribute == "weight" else 0, self.stream.room
            )
            write_tensor(values, form, columns, self.header, self.stream, self.ledger)
            self.numbers += values.size

    def _check_tensor(self, tensor: Tensor, path: str) -> NDArray[np.float32]:
        if tensor.dtype != torch.float32:
            raise _refuse(path, "tensor", str(tensor.dtype), "torch.float32", "call net.float() first")
        if id(tensor) in self._seen:
            raise _refuse(path, "tensor", f"the tensor of {self._seen[id(tensor)]}", "one place", "copy the layer")
        self._seen[id(tensor)] = path
        values = tensor.detach().cpu().numpy()
        if values.size == 0 or not np.isfinite(values).all():
            raise _refuse(path, "tensor", "no or non-finite numbers", "finite numbers", "train it again")
        return values


@dataclass(frozen=True)
class _Job:
    """A tensor whose header is read and whose symbols are not."""

    module: nn.Module
    attribute: str
    form: Form | IndexForm


class NodeReader:
    """Reads all nodes first, so that all sizes are known, then fills the tensors from the stream.

    Args:
        content: nodes and stream.
        max_numbers: refuse more.
    """

    def __init__(self, content: memoryview, max_numbers: int) -> None:
        self._reader, self._left = ByteReader(content), max_numbers
        self._jobs: list[_Job] = []
        self._modules = 0

    def take_node(self, depth: int) -> nn.Module:
        """A module, its tensors without memory yet."""
        self._modules += 1
        if self._modules > _MAX_MODULES:
            raise damaged(f"more than {_MAX_MODULES} modules")
        code = self._reader.take_byte()
        if code not in (SEQUENTIAL, _NAMED):
            return self._take_layer(code)
        if depth == _MAX_DEPTH:
            raise damaged(f"more than {_MAX_DEPTH} levels")
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(self._reader.take_varint()):
            name = self._reader.take_text(_MAX_NAME) if code == _NAMED else str(i)
            if name in children:
                raise damaged(f"two layers of the name {name!r}")
            children[name] = self.take_node(depth + 1)
        try:
            return nn.Sequential(children)
        except (KeyError, TypeError) as error:
            raise damaged("a name that a layer cannot have") from error

    def fill(self) -> None:
        """Decode every tensor into its place."""
        stream = SymbolReader(bytes(self._reader.content[self._reader.position :]))
        for job in self._jobs:
            old = getattr(job.module, job.attribute)
            if isinstance(job.form, IndexForm):
                job.module.register_buffer("index", torch.from_numpy(take_index(job.form, len(old), stream)))
                continue
            columns = np.arange(old.numel() // _num_rows(old.shape))
            if isinstance(job.module, SelectLinear) and job.attribute == "weight":
                columns = job.module.index.numpy()
            values = torch.from_numpy(take_tensor(job.form, _num_rows(old.shape), columns, stream)).reshape(old.shape)
            if job.attribute == "running_var" and bool((values < 0.0).any()):
                raise damaged("a negative variance")
            setattr(job.module, job.attribute, nn.Parameter(values) if isinstance(old, nn.Parameter) else values)

    def _take_layer(self, code: int) -> nn.Module:
        module = build_layer(read_layer(code, self._reader))
        if isinstance(module, SelectLinear):
            index = read_index(self._reader, module.in_features)
            self._claim(_index_numbers(module.in_features, index.last))
            self._jobs.append(_Job(module, "index", index))
        if getattr(module, "num_batches_tracked", None) is not None:
            module.register_buffer("num_batches_tracked", torch.tensor(self._reader.take_varint()))
        for attribute in _TENSORS:
            tensor = getattr(module, attribute, None)
            if tensor is not None:
                self._claim(tensor.numel())
                self._jobs.append(_Job(module, attribute, read_form(self._reader, tensor.numel())))
        return module

    def _claim(self, numbers: int) -> None:
        self._left -= numbers
        if self._left < 0:
            raise damaged("more numbers than a file of its size may hold")


def _num_rows(shape: torch.Size | tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _to_matrix(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """One row for each output, one row in all for a vector."""
    return values.reshape(_num_rows(values.shape), -1)


def _kernel_width(module: nn.Module) -> int:
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or not 1 < module.kernel_size[-1] <= MAX_WIDTH:
        return 0
    return int(module.kernel_size[-1])


def _index_numbers(count: int, last: int) -> int:
    """Memory of an index in numbers of four bytes: itself, and a mask where it is one."""
    return 2 * count + last // 4


def _check_index(module: SelectLinear, name: str) -> NDArray[np.int64]:
    index = module.index.detach().cpu().numpy().astype(np.int64)
    if len(index) == 0 or index[0] < 0 or (np.diff(index) <= 0).any() or index[-1] >= 2**31 - 1:
        raise _refuse(name, "layer", "an index that does not ascend", "ascending features", "sort it with its columns")
    return index


def _refuse(name: str, what: str, got: str, allowed: str, fix: str) -> OutputError:
    return OutputError(f"{what} {name or 'network'}", got=got, allowed=allowed, fix=fix)
