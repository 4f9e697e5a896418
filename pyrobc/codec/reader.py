"""Reading the tree of an ``.rbc`` file: layers and tensor headers first, then the numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyrobc.codec.coder import BitReader, damaged
from pyrobc.codec.format import ByteReader, FieldReader
from pyrobc.codec.index import IndexForm, code_index, read_index
from pyrobc.codec.layers import (
    NAMED,
    SEQUENTIAL,
    build_layer,
    find_channels,
    read_layer,
    take_kind,
)
from pyrobc.codec.nodes import (
    GRIDDED,
    MAX_DEPTH,
    MAX_MODULES,
    MAX_NAME,
    TENSORS,
    Context,
    index_numbers,
    is_bulk,
    num_rows,
    tensor_geometry,
)
from pyrobc.codec.streams import SymbolReader
from pyrobc.codec.tensors import (
    BULK,
    ONE,
    RAW,
    SPARSE,
    Form,
    check_numbers,
    code_sparse,
    read_form,
    take_bulk,
)
from pyrobc.slicing import SelectLinear

__all__ = ["NodeReader"]


@dataclass(frozen=True)
class _Job:
    """A tensor whose header is read and whose numbers are not."""

    module: nn.Module
    attribute: str
    form: Form | IndexForm


class NodeReader:
    """Reads all headers first, so that all sizes are known, then the numbers.

    Args:
        data: what went through the coder.
        bulk: what follows, if there is more.
        max_numbers: refuse more.
    """

    def __init__(self, data: bytes, bulk: memoryview, max_numbers: int) -> None:
        self._coder = BitReader(data)
        self._reader, self._bulk, self._left = FieldReader(self._coder), ByteReader(bulk), max_numbers
        self._jobs: list[_Job] = []
        self._context = Context()
        self._modules = 0

    def take_node(self, depth: int) -> nn.Module:
        """A module, its tensors without memory yet."""
        self._modules += 1
        if self._modules > MAX_MODULES:
            raise damaged(f"more than {MAX_MODULES} modules")
        number = take_kind(self._reader, self._context.last)
        if number not in (SEQUENTIAL, NAMED):
            return self._take_layer(number)
        self._context.last = SEQUENTIAL
        if depth == MAX_DEPTH:
            raise damaged(f"more than {MAX_DEPTH} levels")
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(self._reader.take_number()):
            name = self._reader.take_text(MAX_NAME) if number == NAMED else str(i)
            if name in children:
                raise damaged(f"two layers of the name {name!r}")
            children[name] = self.take_node(depth + 1)
        try:
            return nn.Sequential(children)
        except (KeyError, TypeError) as error:
            raise damaged("a name that a layer cannot have") from error

    def fill(self) -> None:
        """Decode every tensor into its place."""
        raw = {id(job): self._bulk.take_array(count) for job, count in self._large()}
        has_stream = any(isinstance(job.form, Form) and job.form.kind == BULK for job in self._jobs)
        stream = SymbolReader(bytes(self._bulk.content[self._bulk.position :])) if has_stream else None
        supply: NDArray[np.int64] | None = None
        index, width = None, 0
        for job in self._jobs:
            old, form = getattr(job.module, job.attribute), job.form
            if isinstance(form, IndexForm):
                index, width = code_index(self._coder, form, None), max(form.width, 0)
                job.module.register_buffer("index", torch.from_numpy(index))
                continue
            shape = (num_rows(old.shape), old.numel() // num_rows(old.shape))
            geometry = tensor_geometry(job.module, job.attribute, shape[1], index, width, supply)
            if form.kind == RAW:
                numbers = form.raw if form.raw is not None else raw.pop(id(job))
            elif form.kind == ONE:
                numbers = np.full(old.numel(), form.levels[0], dtype=np.float32)
            else:
                if form.kind == SPARSE:
                    integers = code_sparse(self._coder, form, geometry, None, shape[0])[0].ravel()
                else:
                    assert stream is not None
                    integers = take_bulk(form, old.numel(), stream)
                with np.errstate(over="ignore"):
                    numbers = check_numbers(form.to_numbers(integers))
                del integers
            if job.attribute == "weight" and isinstance(job.module, GRIDDED):
                supply = np.count_nonzero(numbers.reshape(shape), axis=1)
            if job.attribute == "running_var" and bool((numbers < 0.0).any()):
                raise damaged("a negative variance")
            values = torch.from_numpy(numbers).reshape(old.shape)
            setattr(job.module, job.attribute, nn.Parameter(values) if isinstance(old, nn.Parameter) else values)

    def _large(self) -> Iterator[tuple[_Job, int]]:
        for job in self._jobs:
            if isinstance(job.form, Form) and is_bulk(job.form) and job.form.kind == RAW:
                yield job, getattr(job.module, job.attribute).numel()

    def _take_layer(self, number: int) -> nn.Module:
        context = self._context
        layer = read_layer(number, self._reader, context.channels)
        module = build_layer(layer)
        context.last, context.channels = number, find_channels(layer, context.channels)
        if isinstance(module, SelectLinear):
            index = read_index(self._reader, module.in_features)
            self._claim(index_numbers(index))
            self._jobs.append(_Job(module, "index", index))
        if getattr(module, "num_batches_tracked", None) is not None:
            module.register_buffer("num_batches_tracked", torch.tensor(self._reader.take_number()))
        for attribute in TENSORS:
            tensor = getattr(module, attribute, None)
            if tensor is not None:
                self._claim(tensor.numel())
                columns = tensor.numel() // num_rows(tensor.shape)
                is_weight = attribute == "weight" and isinstance(module, GRIDDED)
                step = context.steps.get(attribute, 0.0)
                form = read_form(self._reader, tensor.numel(), columns, step, is_weight)
                if form.step:
                    context.steps[attribute] = form.step
                self._jobs.append(_Job(module, attribute, form))
        return module

    def _claim(self, numbers: int) -> None:
        self._left -= numbers
        if self._left < 0:
            raise damaged("more numbers than a file of its size may hold")
