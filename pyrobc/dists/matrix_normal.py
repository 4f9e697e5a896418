r"""The matrix normal: a Normal matrix whose covariance is a Kronecker product of one over rows and one over columns.

.. math::
    X \sim MN(M, U, V) \iff \operatorname{vec}(X) \sim N(\operatorname{vec} M, U \otimes V), \qquad
    X = M + L_U E L_V^\top,\; E_{ij} \sim N(0, 1)

with vec by rows, :math:`U = L_U L_U^\top` (rows, rows) and :math:`V = L_V L_V^\top` (columns, columns).

References:
    Dawid, Some matrix-variate distribution theory (1981).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyrobc.dists.cholesky import log_det, whiten

__all__ = ["MatrixNormal"]


class MatrixNormal(TorchDistribution):
    """Normal matrix with row and column covariance.

    Args:
        loc: mean (..., rows, columns).
        row_scale_tril: Cholesky factor of the row covariance (..., rows, rows).
        column_scale_tril: Cholesky factor of the column covariance (..., columns, columns).

    Example:
        >>> import torch
        >>> law = MatrixNormal(torch.zeros(2, 3), torch.eye(2), 2 * torch.eye(3))
        >>> round(float(law.log_prob(torch.zeros(2, 3))), 4)
        -9.6725
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "row_scale_tril": constraints.lower_cholesky,
        "column_scale_tril": constraints.lower_cholesky,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        row_scale_tril: Tensor,
        column_scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        parts = (loc.shape, row_scale_tril.shape, column_scale_tril.shape)
        batch_shape = torch.broadcast_shapes(*(shape[:-2] for shape in parts))
        self.loc = loc.expand(*batch_shape, *loc.shape[-2:])
        self.row_scale_tril, self.column_scale_tril = row_scale_tril, column_scale_tril
        super().__init__(batch_shape, loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MatrixNormal:
        """The same law with a larger batch shape."""
        new: MatrixNormal = self._get_checked_instance(MatrixNormal, _instance)
        shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(*shape, *self.event_shape)
        new.row_scale_tril, new.column_scale_tril = self.row_scale_tril, self.column_scale_tril
        super(MatrixNormal, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the matrix ``value``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        rows, columns = self.event_shape
        white = whiten(self.column_scale_tril, whiten(self.row_scale_tril, value - self.loc).mT)
        volume = columns * log_det(self.row_scale_tril) + rows * log_det(self.column_scale_tril)
        return -0.5 * white.square().sum((-2, -1)) - volume - 0.5 * rows * columns * math.log(2.0 * math.pi)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the matrix."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.row_scale_tril @ noise @ self.column_scale_tril.mT

    @property
    def mean(self) -> Tensor:
        """Mean matrix."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each entry."""
        rows, columns = self.row_scale_tril.square().sum(-1), self.column_scale_tril.square().sum(-1)
        return (rows[..., :, None] * columns[..., None, :]).expand(self.loc.shape)
