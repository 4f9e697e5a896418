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

from pyrobc.calling import call_network, describe_inputs, evaluating, first_tensor, tensors_of
from pyrobc.errors import DataError, FitError
from pyrobc.kinds import is_whole

__all__ = [
    "TensorLoader",
    "as_loader",
    "check_batch",
    "check_rows",
    "count_batches",
    "count_rows",
    "first_batch",
    "move",
    "no_rows",
    "repeatable",
    "seeded",
    "split_batch",
]


class TensorLoader:
    """Minibatches sliced from tensors that are already in memory; shuffles with torch's current random state.

    A single row that is left over joins the batch before it: batch normalisation cannot be trained on one.
    """

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
        return len(self._sizes())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = len(self.inputs)
        order = torch.randperm(rows) if self.shuffle else torch.arange(rows)
        for index in order.split(self._sizes()):
            yield self.inputs[index], self.targets[index]

    def _sizes(self) -> list[int]:
        whole, rest = divmod(len(self.inputs), self.batch_size)
        sizes = [self.batch_size] * whole
        if rest == 1 and whole:
            sizes[-1] += 1
        elif rest:
            sizes.append(rest)
        return sizes


def as_loader(data: Any, *, batch_size: int = 128, shuffle: bool = True) -> Iterable[Any]:
    """A loader from a loader, or from a pair of tensors, arrays or data frames ``(inputs, targets)``.

    Raises:
        DataError: neither, or batches that can be had only once.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        inputs, targets = (_as_tensor(part) for part in data)
        return TensorLoader(inputs, targets, batch_size, shuffle)
    if isinstance(data, Iterable) and not isinstance(data, Tensor | np.ndarray | Mapping | str):
        if not isinstance(data, Iterator):
            return data
        raise DataError(
            "data", got=f"{type(data).__name__}, which yields its batches once", allowed="what every epoch can read",
            fix="pass a DataLoader, a pair of arrays, or list(batches)",
        )  # fmt: skip
    raise DataError(
        "data",
        got=type(data).__name__,
        allowed="a loader that yields (inputs, targets), or a pair of arrays",
        fix="pass (inputs, targets), or torch.utils.data.DataLoader(dataset, batch_size=128, shuffle=True)",
    )


def first_batch(loader: Iterable[Any]) -> tuple[Any, Tensor]:
    """Inputs and targets of the first batch."""
    for batch in loader:
        return split_batch(batch)
    raise no_rows()


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch; what else it holds is left out.

    Raises:
        DataError: it is no pair of tensors.
    """
    if isinstance(batch, tuple | list) and len(batch) >= 2 and tensors_of(batch[0]) and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    kinds = ", ".join(type(part).__name__ for part in batch) if isinstance(batch, tuple | list) else ""
    raise DataError(
        "data",
        got=f"batches of type {type(batch).__name__}{f' ({kinds})' if kinds else ''}",
        allowed="pairs (inputs, targets) of tensors; inputs may be a tuple or a dict of tensors",
        fix="check the dataset and the loader's collate function",
    )


def _as_tensor(part: Any) -> Tensor:
    """A tensor of an array or a data frame."""
    if isinstance(part, Tensor):
        return part
    array = np.asarray(part)
    if array.dtype.kind not in "biuf":
        raise DataError(
            "data", got=f"an array of {array.dtype}", allowed="numbers", fix="encode names and dates as numbers first"
        )
    return torch.as_tensor(array)


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
        raise no_rows()
    return rows


def no_rows(subject: str = "data") -> DataError:
    """The refusal of empty data."""
    return DataError(subject, got="no rows", allowed="at least one row", fix="check the path and the split")


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
    anchor = next(iter(net.parameters()))
    with torch.no_grad(), evaluating(net), repeatable(loader, 0):
        for batch in loader:
            inputs, targets = (move(part, anchor) for part in split_batch(batch))
            check_batch(inputs, targets, example_inputs)
            check_targets(targets, first_tensor(call_network(net, inputs)))


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
    if wrong := [seed for seed in seeds if not is_whole(seed)]:
        raise FitError("seed", got=repr(wrong[0]), allowed="a whole number from 0", fix="pass seed=0, for instance")
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
