"""Lower triangular factors of covariances: the two operations every Normal form here needs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_det", "whiten"]


def whiten(factor: Tensor, other: Tensor) -> Tensor:
    """``factor^-1 other`` for a lower triangular ``factor`` (..., n, n) and ``other`` (..., n, k), batched."""
    white: Tensor = torch.linalg.solve_triangular(factor, other, upper=False)
    return white


def log_det(factor: Tensor) -> Tensor:
    """Log determinant of a triangular ``factor`` (..., n, n) with positive diagonal: half that of the covariance."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
