"""Grids as callers give them, by tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from pyrobc.codec.nodes import GRIDDED
from pyrobc.codec.tensors import MAX_EXPONENT
from pyrobc.errors import OutputError, suggest

__all__ = ["find_steps"]

MAX_STEP_EXPONENT = 100


def find_steps(
    net: nn.Module, bits: int | Mapping[str, int] | None, steps: float | Mapping[str, float] | None
) -> dict[str, float]:
    """Step by tensor, float32; names given in both take the step."""
    return _find_steps(net, bits, is_step=False) | _find_steps(net, steps, is_step=True)


def _find_steps(net: nn.Module, grid: float | Mapping[str, float] | None, *, is_step: bool) -> dict[str, float]:
    """Step by tensor, float32."""
    if grid is None:
        return {}
    known = [name for name, tensor in net.state_dict().items() if tensor.is_floating_point()]
    if not isinstance(grid, Mapping):
        layers = [name for name, module in net.named_modules() if isinstance(module, GRIDDED)]
        grid = {n: grid for n in known if n.rpartition(".")[0] in layers}
    found = {}
    for name, value in grid.items():
        what = f"{'step' if is_step else 'bits'} of {name!r}"
        if name not in known:
            raise OutputError(what, got="no such tensor", allowed="names of the state dict", fix=suggest(name, known))
        with np.errstate(over="ignore", under="ignore"):
            step = float(np.float32(value if is_step else 2.0 ** -max(min(value, 999), -999)))
        if not 2.0**-MAX_EXPONENT <= step <= 2.0**MAX_STEP_EXPONENT:
            raise OutputError(
                what, got=repr(value), allowed=f"steps of 2^-{MAX_EXPONENT} to 2^{MAX_STEP_EXPONENT}",
                fix="choose widths with bits.choose_widths",
            )  # fmt: skip
        found[name] = step
    return found
