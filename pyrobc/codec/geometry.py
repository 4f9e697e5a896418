r"""Where the columns of a weight matrix lie: in blocks, and in each block on a plane.

The row of a unit holds its weights from each *block* of inputs: one block that is the image, for a layer that selects
pixels; the kernel of each input channel, for a convolution; the map that each channel became, for a linear layer after
a flatten; a single weight, for a linear layer after another.  A column at position ``p`` lies in block ``p // size``,
at ``divmod(p % size, width)``.

Weights that are close on the plane are alike.  A *canvas* is a list with a cell for each point, with margins so wide
that a neighbour of any point is a cell: while a row is coded, each weight that is not zero adds a kernel to the cells
after it, :math:`k(d) = \mathrm{round}(32 e^{-|d|/2})` within 5 points, so that a cell holds what its neighbourhood
has.  Kernels are integers: sums do not depend on the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pyrobc.slicing import SelectLinear

__all__ = ["MAX_PLANE", "NEAR", "PLANES", "Geometry", "Plane", "find_geometry", "make_plane"]

Ints = NDArray[np.int64]
PLANES = ("image", "kernel", "map")
"""Kinds of weights whose columns lie on planes."""
MAX_PLANE = 2**14
"""Most cells of a canvas; wider layers have no planes."""
MAX_CLASSES = 16
"""Outputs up to which a linear layer is taken for the last one."""
REACH = 5
NEAR = ((0, 1), (1, 1), (1, 0), (1, -1), (0, 2), (2, 0), (2, 1), (2, -1), (1, 2), (1, -2))
"""Points whose weights are looked at one by one, as rows up and columns left."""


@dataclass(frozen=True)
class Geometry:
    """Columns of a matrix.

    Attributes:
        kind: one of ``priors.KINDS``.
        positions: of the columns, ascending.
        size: of a block; 0 if each column is a block of its own.
        width: of a plane.
        supply: for each block, how many weights the unit has that it comes from; None if unknown.
    """

    kind: str
    positions: Ints
    size: int = 0
    width: int = 0
    supply: Ints | None = None

    def flatten(self) -> Geometry:
        """Without planes."""
        return Geometry("flat", self.positions, self.size, 0, self.supply)


@dataclass(frozen=True)
class Plane:
    """The canvas: its size, the cell of each column, what to add around a cell, and what all cells before it add up to.

    ``kernel`` holds offsets and weights; ``near`` the offsets, negative, of ``NEAR``; ``full`` the sum of the kernel
    over the columns before each that there are.
    """

    num_cells: int
    cells: list[int]
    blocks: list[int]
    kernel: list[tuple[int, int]]
    near: list[int]
    full: list[int]


def find_geometry(module: nn.Module, count: int, index: Ints | None, width: int, supply: Ints | None) -> Geometry:
    """Where the ``count`` columns of a layer's weights lie.

    Args:
        module: the layer; anything but a linear or convolutional one has a vector.
        count: of columns.
        index: of a layer that selects.
        width: of the image that it selects from, 0 if it is none.
        supply: weights that are not zero, by unit of the last layer; None if there is none.
    """
    columns = np.arange(count)
    if isinstance(module, SelectLinear):
        if index is None or not width:
            return Geometry("flat", columns)
        return Geometry("image", index, int(index[-1]) + 1, width)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        size = math.prod(module.kernel_size)
        known = supply if supply is not None and len(supply) * size == count else None
        return Geometry("kernel" if size > 1 else "flat", columns, size, module.kernel_size[-1], known)
    if not isinstance(module, nn.Linear):
        return Geometry("vector", columns)
    flat = "out" if module.out_features <= MAX_CLASSES else "flat"
    if supply is None or count % len(supply):
        return Geometry(flat, columns)
    size = count // len(supply)
    width = math.isqrt(size)
    return Geometry("map" if size > 1 else flat, columns, size, width if width * width == size else 0, supply)


def make_plane(geometry: Geometry) -> Plane | None:
    """The canvas of a row, or None if the columns do not lie on planes."""
    size, width = geometry.size, geometry.width
    if size < 2 or width < 1:
        return None
    block, point = np.divmod(geometry.positions, size)
    y, x = np.divmod(point, width)
    stride, height = width + REACH, -(-size // width) + REACH
    cells = (block * height + y + 2) * stride + x + 2
    num_cells = (int(block[-1]) + 2) * height * stride + 3 * stride
    if num_cells > MAX_PLANE:
        return None
    offsets = [(dy, dx) for dy in range(REACH + 1) for dx in range(-REACH, REACH + 1) if (dy, dx) > (0, 0)]
    kernel = [(dy * stride + dx, weight) for dy, dx in offsets if (weight := _kernel(dy * dy + dx * dx))]
    full = np.zeros(num_cells, dtype=np.int64)
    for offset, weight in kernel:
        full[cells + offset] += weight
    near = [-dy * stride - dx for dy, dx in NEAR]
    return Plane(num_cells, cells.tolist(), block.tolist(), kernel, near, full[cells].tolist())


def _kernel(square: int) -> int:
    return round(32.0 * math.exp(-math.sqrt(square) / 2.0)) if square <= REACH * REACH else 0
