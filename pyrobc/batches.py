"""Minibatches: what is accepted as data, its checks, and its randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyrobc.dependency import describe_inputs, first_tensor
from pyrobc.errors import DataError
from pyrobc.slicing import call_network

__all__ = [
    "TensorLoader",
    "as_loader",
    "check_batch",
    "check_rows",
    "count_batches",
    "count_rows",
    "move",
    "repeatable",
    "seeded",
]


class TensorLoader:
    """Minibatches sliced from tensors that are already in memory; shuffles with torch's current random state."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int = 128, shuffle: bool = True) -> None:
        if len(inputs) != len(targets):
            raise DataError(
                "data",
                got=f"{len(inputs)} inputs and {len(targets)} targets",
                allowed="as many targets as inputs",
                fix="check how the arrays were split",
            )
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.shuffle = batch_size, shuffle
        self.dataset = range(len(inputs))

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = len(self.inputs)
        order = torch.randperm(rows) if self.shuffle else torch.arange(rows)
        for index in order.split(self.batch_size):
            yield self.inputs[index], self.targets[index]


def as_loader(data: Any, *, batch_size: int = 128, shuffle: bool = True) -> Iterable[Any]:
    """A loader from a loader, or from a pair of tensors or arrays ``(inputs, targets)``."""
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        inputs, targets = (torch.as_tensor(part) for part in data)
        return TensorLoader(inputs, targets, batch_size, shuffle)
    if isinstance(data, Iterable):
        return data
    raise DataError(
        "data",
        got=type(data).__name__,
        allowed="a loader that yields (inputs, targets), or a pair of arrays",
        fix="pass torch.utils.data.DataLoader(dataset, batch_size=128, shuffle=True)",
    )


def count_rows(loader: Any) -> int:
    """Rows of the data behind ``loader``.

    Raises:
        DataError: there are none.
    """
    dataset: Any = getattr(loader, "dataset", None)
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, torch.utils.data.SubsetRandomSampler):
        rows = len(sampler)
    else:
        rows = len(dataset) if hasattr(dataset, "__len__") else sum(len(batch[1]) for batch in loader)
    if rows == 0:
        raise DataError("data", got="no rows", allowed="at least one row", fix="check the path and the split")
    return rows


def count_batches(loader: Any) -> float:
    """Batches of one pass, infinity where the loader cannot tell before (a stream)."""
    try:
        return max(1, len(loader))
    except TypeError:
        return math.inf


def move(value: Any, anchor: Tensor) -> Any:
    """Inputs or targets on ``anchor``'s device, reals in its dtype."""
    if isinstance(value, Tensor):
        dtype = anchor.dtype if value.is_floating_point() else value.dtype
        return value.to(device=anchor.device, dtype=dtype, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move(part, anchor) for key, part in value.items()}
    return tuple(move(part, anchor) for part in value)


def check_rows(data: Any, net: nn.Module, check_targets: Callable[[Tensor, Tensor], None], example_inputs: Any) -> None:
    """Refuse rows that ``net`` or a likelihood cannot take, before time is spent on a fit.

    Raises:
        DataError: no rows, NaN, other shapes than the example's, or targets that the likelihood cannot have produced.
    """
    loader = as_loader(data, batch_size=1024, shuffle=False)
    count_rows(loader)
    was_training, anchor = net.training, next(iter(net.parameters()))
    net.eval()
    with torch.no_grad(), repeatable(loader, 0):
        for batch in loader:
            inputs, targets = move(batch[0], anchor), move(batch[1], anchor)
            check_batch(inputs, targets, example_inputs)
            check_targets(targets, first_tensor(call_network(net, inputs)))
    net.train(was_training)


def check_batch(inputs: Any, targets: Tensor, example_inputs: Any) -> None:
    """Refuse NaN, infinities, and inputs shaped unlike ``example_inputs`` beyond their first axis.

    Raises:
        DataError: subject, what was got, what is allowed, the fix.
    """
    first, example = first_tensor(inputs), first_tensor(example_inputs)
    if first.shape[1:] != example.shape[1:]:
        raise DataError(
            "inputs",
            got=f"a batch of {describe_inputs(inputs)}",
            allowed=f"rows shaped like example_inputs, (rows, {', '.join(map(str, example.shape[1:]))})",
            fix="reshape the data, or lift the network with a batch of this shape",
        )
    if len(targets) != len(first):
        raise DataError(
            "batch",
            got=f"{len(first)} inputs and {len(targets)} targets",
            allowed="as many targets as inputs",
            fix="check the loader's collate function",
        )
    parts = [inputs] if isinstance(inputs, Tensor) else list(getattr(inputs, "values", lambda: inputs)())
    if any(part.is_floating_point() and not bool(torch.isfinite(part).all()) for part in parts):
        raise DataError(
            "inputs", got="NaN or infinite values", allowed="finite numbers", fix="drop or impute those rows"
        )


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """Torch's, numpy's and Python's random states set inside from these non-negative numbers, restored outside."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    state = pyro.util.get_rng_state()
    with torch.random.fork_rng(devices=devices):
        pyro.set_rng_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))  # numpy takes 32 bits only
        try:
            yield
        finally:
            pyro.util.set_rng_state(state)


@contextmanager
def repeatable(loader: Any, *seeds: int) -> Iterator[None]:
    """``seeded``, for the generators of ``loader`` and of its sampler too."""
    samplers = getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    generators = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
    with seeded(*seeds):
        seed = int(torch.randint(2**62, ()))
        for generator in generators:
            if generator is not None:
                generator.manual_seed(seed)
        yield
