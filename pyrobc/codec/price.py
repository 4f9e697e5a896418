r"""What each weight costs in an ``.rbc`` file, for pruning by rate and distortion.

An entry that is not zero costs :math:`-\log_2 P(k \ne 0)` and its sign and size, one that is zero
:math:`-\log_2 P(k = 0)`, under the adaptive models at that point; if it were zero it would cost the latter.  What its
absence does to later predictions is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pyrobc.codec.coder import BitMeter
from pyrobc.codec.geometry import Geometry
from pyrobc.codec.nodes import NodeWriter
from pyrobc.codec.steps import find_steps
from pyrobc.codec.tensors import SPARSE, Form, code_sparse

__all__ = ["find_geometries", "price_bits", "price_entries"]

Prices = tuple[NDArray[np.float64], NDArray[np.float64]]


def price_entries(
    net: nn.Module, *, bits: int | Mapping[str, int] | None = None, steps: float | Mapping[str, float] | None = None
) -> dict[str, Prices]:
    """By name of the state dict, for each tensor that is coded with a mask, two arrays of the tensor's shape.

    Args:
        net: as for ``pack``; and so are the grids.
        bits: fractional bits.
        steps: steps.

    Returns:
        Bits that each entry costs as it is, mask, sign and size; and bits that it would cost if it were zero.
    """
    tensors, prices = net.state_dict(), {}
    for job in _write_headers(net, bits, steps).jobs:
        if not isinstance(job.form, Form) or job.form.kind != SPARSE:
            continue
        assert job.geometry is not None
        found: list[tuple[float, float]] = []
        code_sparse(BitMeter(), job.form, job.geometry, job.integers, len(job.integers), found)
        spent, chances = np.array(found).T
        shape = tuple(tensors[job.path].shape)
        prices[job.path] = spent.reshape(shape), -np.log2(1.0 - chances).reshape(shape)
    return prices


def find_geometries(net: nn.Module) -> dict[str, Geometry]:
    """By name of the state dict, where the columns of each tensor lie."""
    return {job.path: job.geometry for job in _write_headers(net, None, None).jobs if job.geometry is not None}


def price_bits(net: nn.Module) -> float:
    """Bits of the file, without its fixed ones."""
    writer = _write_headers(net, None, None)
    writer.put_numbers()
    return math.fsum(writer.ledger.values())


def _write_headers(
    net: nn.Module, bits: int | Mapping[str, int] | None, steps: float | Mapping[str, float] | None
) -> NodeWriter:
    writer = NodeWriter(find_steps(net, bits, steps))
    writer.put_node(net, "", 0)
    return writer
