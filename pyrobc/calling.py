"""Calling a network whatever it takes and returns: a tensor, a tuple, a dict, nested or as an object of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["call_network", "describe_inputs", "evaluating", "first_tensor", "map_tensors", "tensors_of"]


def call_network(net: nn.Module, inputs: Any) -> Any:
    """Call with a tensor, a tuple of positional inputs or a dict of named ones."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Every part of the network in evaluation mode; each is put back into its own mode afterwards."""
    modes = {part: part.training for part in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training


def first_tensor(value: Any) -> Tensor:
    """The first tensor of a tensor, tuple, dict or model-output object."""
    return tensors_of(value)[0]


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of a tensor, tuple, dict or model-output object."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value
    return (
        [t for item in items for t in tensors_of(item)]
        if isinstance(items, Iterable) and not isinstance(items, str)
        else []
    )


def map_tensors(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs of the same form, each tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(value, change) for key, value in inputs.items()}
    return tuple(map_tensors(value, change) for value in inputs)


def describe_inputs(inputs: Any) -> str:
    """Shapes of a tensor, a tuple or a dict of tensors, for messages."""
    if isinstance(inputs, Tensor):
        return f"shape {tuple(inputs.shape)}"
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return ", ".join(f"{key}: {[tuple(t.shape) for t in tensors_of(value)]}" for key, value in items)
