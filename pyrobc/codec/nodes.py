"""The tree of an ``.rbc`` file: from a network to layers, tensor headers and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyrobc.codec.coder import MAX_STEPS, BitWriter
from pyrobc.codec.format import FieldWriter
from pyrobc.codec.geometry import Geometry, find_geometry
from pyrobc.codec.index import IndexForm, code_index, plan_index, write_index
from pyrobc.codec.layers import (
    NAMED,
    SEQUENTIAL,
    describe_layer,
    find_channels,
    put_kind,
    write_layer,
)
from pyrobc.codec.sparse import count_steps
from pyrobc.codec.streams import SymbolWriter
from pyrobc.codec.tensors import (
    BULK,
    FEW,
    RAW,
    SPARSE,
    Form,
    choose_form,
    code_sparse,
    put_bulk,
    to_integers,
    write_form,
)
from pyrobc.errors import OutputError
from pyrobc.slicing import SelectLinear

__all__ = [
    "GRIDDED",
    "MAX_DEPTH",
    "MAX_MODULES",
    "MAX_NAME",
    "TENSORS",
    "Context",
    "NodeWriter",
    "Written",
    "index_numbers",
    "is_bulk",
    "num_rows",
    "tensor_geometry",
]

GRIDDED = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers whose weights and biases share a grid if one is given for all."""
MAX_DEPTH = 32
MAX_NAME = 255
MAX_MODULES = 4096
TENSORS = ("weight", "bias", "running_mean", "running_var")
_ROOM = MAX_STEPS - 2**16  # what headers may take is left free


@dataclass
class Context:
    """What the layers so far tell about the next one."""

    last: int = -1
    channels: int = 0
    steps: dict[str, float] = field(default_factory=dict)
    supply: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Written:
    """A tensor whose header is written and whose numbers are not."""

    path: str
    form: Form | IndexForm
    geometry: Geometry | None
    integers: NDArray[np.int64]


class NodeWriter:
    """Writes all headers through ``coder``, then all numbers; ``ledger`` counts bits by part.

    Large tensors go to ``bulk``, raw ones, and to ``stream``.
    """

    def __init__(self, steps: Mapping[str, float]) -> None:
        self.coder, self.bulk, self.stream = BitWriter(), bytearray(), SymbolWriter()
        self.ledger: defaultdict[str, float] = defaultdict(float)
        self.numbers = 0
        self.jobs: list[Written] = []
        self._out, self._context, self._room = FieldWriter(self.coder), Context(), _ROOM
        self._steps = steps
        self._seen: dict[int, str] = {}
        self._modules = 0

    @property
    def has_bulk(self) -> bool:
        """Whether there is more than what went through ``coder``."""
        return any(isinstance(job.form, Form) and is_bulk(job.form) for job in self.jobs)

    def put_node(self, module: nn.Module, name: str, depth: int) -> None:
        """The headers of a module and all below it."""
        self._modules += 1
        if self._modules > MAX_MODULES:
            raise _refuse("", "network", "more modules", f"up to {MAX_MODULES}", "merge its layers")
        before = self.coder.bits
        if type(module) is not nn.Sequential:
            self._put_layer(module, name)
            return
        if depth == MAX_DEPTH:
            raise _refuse(name, "Sequential", f"more than {MAX_DEPTH} levels", "a flatter network", "flatten the tree")
        names = list(module._modules)
        is_plain = names == [str(i) for i in range(len(names))]
        put_kind(self._out, SEQUENTIAL if is_plain else NAMED, self._context.last)
        self._context.last = SEQUENTIAL
        self._out.put_number(len(names))
        self._book("layers", before)
        for child, part in module._modules.items():
            before = self.coder.bits
            if not is_plain:
                if len(child.encode()) > MAX_NAME:
                    raise _refuse(name, "name", f"{len(child)} letters", f"up to {MAX_NAME} bytes", "shorten it")
                self._out.put_text(child)
                self._book("layers", before)
            assert part is not None
            self.put_node(part, f"{name}.{child}" if name else child, depth + 1)

    def put_numbers(self) -> None:
        """What the headers announced."""
        for job in self.jobs:
            before = self.coder.bits
            if isinstance(job.form, IndexForm):
                code_index(self.coder, job.form, job.integers)
                self._book("indices", before)
            elif job.form.kind == SPARSE:
                assert job.geometry is not None
                _, values = code_sparse(self.coder, job.form, job.geometry, job.integers, len(job.integers))
                self.ledger["values"] += values
                self._book("masks", before + values)
            elif job.form.kind == BULK:
                self.ledger["blocks"] += put_bulk(job.form, job.integers, self.stream)
            elif is_bulk(job.form):
                assert job.form.raw is not None
                self.bulk += job.form.raw.astype("<f4").tobytes()
                self.ledger["raw numbers"] += 32 * len(job.form.raw)

    def _put_layer(self, module: nn.Module, name: str) -> None:
        before, context = self.coder.bits, self._context
        layer = describe_layer(module, name)
        put_kind(self._out, layer.number, context.last)
        write_layer(layer, self._out, context.channels)
        context.last, context.channels = layer.number, find_channels(layer, context.channels)
        self._book("layers", before)
        index, width = None, 0
        if isinstance(module, SelectLinear):
            before = self.coder.bits
            index = _check_index(module, name)
            plan = plan_index(index, module.weight.detach().cpu().numpy())
            write_index(plan, self._out)
            self._book("indices", before)
            width = max(plan.width, 0)
            self._room -= plan.steps
            self.numbers += index_numbers(plan)
            self.jobs.append(Written(f"{name}.index", plan, None, index))
        tracked = getattr(module, "num_batches_tracked", None)
        if tracked is not None:
            before = self.coder.bits
            self._out.put_number(int(tracked))
            self._book("headers", before)
        for attribute in TENSORS:
            tensor = getattr(module, attribute, None)
            if tensor is not None:
                self._put_tensor(module, attribute, tensor, f"{name}.{attribute}" if name else attribute, index, width)

    def _put_tensor(
        self, module: nn.Module, role: str, tensor: Tensor, path: str, index: NDArray[np.int64] | None, width: int
    ) -> None:
        before, context = self.coder.bits, self._context
        values = _to_matrix(self._check_tensor(tensor, path))
        geometry = tensor_geometry(module, role, values.shape[1], index, width, context.supply)
        last_step = context.steps.get(role, 0.0)
        form = choose_form(values, self._steps.get(path), geometry, last_step, self._room)
        write_form(form, self._out, last_step, geometry.kind != "vector")
        if form.step:
            context.steps[role] = form.step
        raw = 32.0 * values.size if form.kind == RAW and values.size <= FEW else 0.0
        self.ledger["raw numbers"] += raw
        self._book("headers", before + raw)
        self.numbers += values.size
        integers = to_integers(values, form) if form.kind in (SPARSE, BULK) else np.zeros(0, dtype=np.int64)
        if form.kind == SPARSE:
            self._room -= count_steps(integers, form.largest)
        if role == "weight" and isinstance(module, GRIDDED):
            # A level of zero aside, only zeros stay zero: grids are not that fine.
            kept = integers if form.kind == SPARSE or form.step else values
            context.supply = np.count_nonzero(kept, axis=1)
        self.jobs.append(Written(path, form, geometry, integers))

    def _book(self, part: str, before: float) -> None:
        self.ledger[part] += self.coder.bits - before

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


def tensor_geometry(
    module: nn.Module, role: str, count: int, index: NDArray[np.int64] | None, width: int,
    supply: NDArray[np.int64] | None,
) -> Geometry:  # fmt: skip
    """Where a tensor's columns lie."""
    if role != "weight":
        return Geometry("vector", np.arange(count))
    return find_geometry(module, count, index, width, supply)


def is_bulk(form: Form) -> bool:
    """Whether a tensor lies outside of what the coder wrote."""
    return form.kind == BULK or (form.kind == RAW and (form.raw is None or len(form.raw) > FEW))


def num_rows(shape: torch.Size | tuple[int, ...]) -> int:
    """Of the matrix that a tensor is taken for: one for each output, one in all for a vector."""
    return shape[0] if len(shape) > 1 else 1


def _to_matrix(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """One row for each output, one row in all for a vector."""
    return values.reshape(num_rows(values.shape), -1)


def index_numbers(form: IndexForm) -> int:
    """Memory of an index in numbers of four bytes: itself, and a mask where it is one."""
    return 2 * form.count + form.last // 4


def _check_index(module: SelectLinear, name: str) -> NDArray[np.int64]:
    index = module.index.detach().cpu().numpy().astype(np.int64)
    if len(index) == 0 or index[0] < 0 or (np.diff(index) <= 0).any() or index[-1] >= 2**31 - 1:
        raise _refuse(name, "layer", "an index that does not ascend", "ascending features", "sort it with its columns")
    return index


def _refuse(name: str, what: str, got: str, allowed: str, fix: str) -> OutputError:
    return OutputError(f"{what} {name or 'network'}", got=got, allowed=allowed, fix=fix)
