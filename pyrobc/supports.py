r"""A prior on which weights are there at all, learned from where they are: weights near others cost less to keep.

More than half of a sparse file says where its weights are, and its coder predicts a weight from those around it.  A
prior under which all weights of a tensor are there alike prices one amid others and one alone the same.  This one does
not.  With :math:`z_i` telling whether a weight is there, the posterior log odds of "zero" (``pyrobc.weights``) become

.. math::
    L_i = \Delta F_i - \lambda\, \ln\frac{P(z_i = 1 \mid z_{-i})}{P(z_i = 0 \mid z_{-i})}, \qquad
    \ln\frac{P(z_i = 1 \mid z_{-i})}{P(z_i = 0 \mid z_{-i})} = w \cdot x(z_{-i}) \quad\text{nats},

an autologistic model (Besag 1974) for each tensor, its :math:`w` fitted to the mask as it is by the pseudo-likelihood
:math:`\prod_i P(z_i \mid z_{-i})` (Besag 1975), with a little ridge.  :math:`\lambda = 1` is the prior itself; less
tempers it: :math:`\Delta F` supposes that the other weights stay as they are, and a prior of full weight then keeps
small weights amid others where one alone does the work.  Where what is needed lies in patches, both mask and error
shrink; where it lies anywhere, a cheaper mask costs accuracy.

For an entry at row r and column c of a tensor taken as a matrix, with :math:`\ell(n, m; s) = \ln\frac{n + s
p}{m - n + s(1 - p)} - \ln\frac{p}{1 - p}` telling how much denser than all (p) are m entries of which n are there,
shrunk by s more of them, the features are

* 1; :math:`\ell` of the other entries of the row and of the column, :math:`s = 3/\min(p, \tfrac12)`;
* where columns lie on planes (``codec.geometry``: pixels, kernels, maps): :math:`\ell` of the neighbourhood in the row,
  entries at distance d up to 5 counting :math:`e^{-d/2}`, :math:`s = 1`; how many of the four nearest entries are there
  beyond what p expects; and of the four diagonal ones.

They are those of the file's coder (``codec.sparse``), which looks at what is decoded already; these look on all sides.

References:
    Besag (1974), Spatial interaction and the statistical analysis of lattice systems.
    Besag (1975), Statistical analysis of non-lattice data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrobc.codec import find_geometries
from pyrobc.codec.geometry import REACH, Geometry
from pyrobc.errors import OutputError
from pyrobc.folding import find_normals
from pyrobc.posterior import Posterior

__all__ = ["find_planes", "price_supports", "score_support"]

_RIDGE, _NEWTON_STEPS, _LIMIT = 1e-2, 8, 12.0
_CHUNK = 2**20  # entries whose features are there at once


def find_planes(posterior: Posterior) -> dict[str, Geometry]:
    """Where the columns of each tensor lie, by parameter, as its file will hold them; nothing where none can."""
    try:
        return find_geometries(posterior.to_module().cpu().float())
    except OutputError:  # rows and columns still tell where weights are
        return {}


@torch.no_grad()
def price_supports(posterior: Posterior, planes: Mapping[str, Geometry], weight: float = 1.0) -> dict[str, Tensor]:
    """Prior log odds of "zero" given all other weights, times ``weight``, nats, float64, by parameter.

    Args:
        posterior: with Normal weights, some of them deleted.
        planes: from ``find_planes``, for a network of the same sizes.
        weight: lambda.
    """
    found = {}
    for name, factor in find_normals(posterior).items():
        rows = factor.kept.flatten(1) if factor.kept.dim() > 1 else factor.kept[None]
        found[name] = -weight * score_support(rows, planes.get(name)).reshape(factor.kept.shape)
    return found


def score_support(mask: Tensor, geometry: Geometry | None = None) -> Tensor:
    """Log odds that each entry is there given all others, under the model fitted to ``mask`` itself; nats, float64.

    Args:
        mask: booleans, ``(rows, columns)``.
        geometry: of the columns; None if they lie nowhere.
    """
    share = float(mask.double().mean())
    if not 0.0 < share < 1.0:
        return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)  # nothing to learn from
    features = _Features(mask, share, geometry)
    w = torch.zeros(features.count, dtype=torch.float64, device=mask.device)
    w[0] = math.log(share / (1 - share))
    for _ in range(_NEWTON_STEPS):
        slope, curvature = -_RIDGE * w, _RIDGE * torch.eye(len(w), dtype=w.dtype, device=w.device)
        for x, is_there in features.chunks():
            p = (x @ w).sigmoid()
            slope += x.T @ (is_there - p)
            curvature += (x * (p * (1 - p))[:, None]).T @ x
        step = torch.linalg.solve(curvature, slope)
        w = w + step.clamp(-1.0, 1.0)  # a full step overshoots from where all odds are alike
        if float(step.abs().max()) < 1e-6:
            break
    odds = torch.cat([x @ w for x, _ in features.chunks()])
    return odds.clamp(-_LIMIT, _LIMIT).reshape(mask.shape)


class _Features:
    """The features of all entries, some rows at a time."""

    def __init__(self, mask: Tensor, share: float, geometry: Geometry | None) -> None:
        self.mask, self.share = mask, share
        self.columns = mask.sum(0, dtype=torch.float64)
        self.plane = None
        if geometry is not None and geometry.size > 1 and geometry.width > 0:
            self.plane = _Plane(geometry, mask.device)
        self.count = 3 if self.plane is None else 6
        self._all = list(self._compute()) if mask.numel() <= _CHUNK else None

    def chunks(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Features, ``(entries, features)``, and whether the entries are there."""
        return self._compute() if self._all is None else self._all

    def _compute(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.mask.split(max(1, _CHUNK // self.mask.shape[1])):
            is_there = rows.double()
            strength = 3.0 / min(self.share, 0.5)
            others = is_there.sum(1, keepdim=True) - is_there
            above = self.columns - is_there
            parts = [
                torch.ones_like(is_there),
                self.compare(others, is_there.shape[1] - 1.0, strength),
                self.compare(above, len(self.mask) - 1.0, strength),
            ]
            if self.plane is not None:
                near, *nearest = self.plane.count(is_there)
                parts.append(self.compare(*near, 1.0))
                parts += [there - self.share * possible for there, possible in nearest]
            yield torch.stack([part.flatten() for part in parts], 1), is_there.flatten()

    def compare(self, there: Tensor, possible: Tensor | float, strength: float) -> Tensor:
        """How much denser than all, in log odds."""
        p, q = strength * self.share, strength * (1 - self.share)
        return ((there + p) / (possible - there + q)).log() - math.log(self.share / (1 - self.share))


class _Plane:
    """Sums over neighbours on the planes that a row's columns lie on."""

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        positions = torch.from_numpy(geometry.positions).to(device)
        block, point = positions // geometry.size, positions % geometry.size
        self.width, self.height = geometry.width, -(-geometry.size // geometry.width)
        self.blocks = int(block.max()) + 1
        self.cells = block * (self.height * self.width) + point
        axis = torch.arange(-REACH, REACH + 1, dtype=torch.float64, device=device)
        square = axis[:, None].square() + axis.square()
        distance = square.sqrt()
        kernel = torch.where((distance > 0) & (distance <= REACH), (-distance / 2).exp(), 0.0)
        nearest, diagonal = ((square == s).double() for s in (1.0, 2.0))  # whole numbers: roots differ by processor
        self.kernels = torch.stack([kernel, nearest, diagonal])[:, None]
        self.possible = self.sum_up(torch.ones(1, len(positions), dtype=torch.float64, device=device))

    def sum_up(self, rows: Tensor) -> Tensor:
        """Under each kernel, ``(kernels, rows, columns)``."""
        canvas = rows.new_zeros(len(rows), self.blocks * self.height * self.width)
        canvas[:, self.cells] = rows
        sums = F.conv2d(canvas.view(-1, 1, self.height, self.width), self.kernels, padding=REACH)
        return sums.view(len(rows), self.blocks, 3, -1).transpose(1, 2).flatten(2)[..., self.cells].transpose(0, 1)

    def count(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is there and what could be, kernel by kernel."""
        return list(zip(self.sum_up(rows), self.possible, strict=True))
