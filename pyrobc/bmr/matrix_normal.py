r"""Matrix-normal posterior: change of prior along rows or along columns, without the Kronecker product.

Posterior :math:`MN(M, U, V)`, prior :math:`MN(M_0, U_0, V_0)`, reduced prior :math:`MN(M_r, U_r, V_0)`: the rows
change, the columns do not (or the other way round, by transposition).  In the posterior's own coordinates,
:math:`X = M_0 + L_U Z L_V^\top`, the change of precision stays a Kronecker product, and two eigenproblems
diagonalise it:

.. math::
    L_U^\top (U_r^{-1} - U_0^{-1}) L_U = R \operatorname{diag}(\lambda) R^\top, \quad
    L_V^\top V_0^{-1} L_V = S \operatorname{diag}(\mu) S^\top, \quad
    \tilde P = I + \lambda\mu^\top \\
    \Delta F = m\,(\ln|L_{U_0}| - \ln|L_{U_r}|) - \tfrac12 \sum_{ij} \ln(1 + \lambda_i\mu_j) - \tfrac12 Q

for m columns, and Q is the quadratic form of the vector case (``multivariate_normal``) with each product taken in this
basis.  The cost is cubic in rows and in columns, not in their product.  Where rows and columns both change, no common
basis exists and the matrix is scored as one vector.

The reduced posterior is a full covariance, given up to 1,024 entries and None beyond.

References:
    Louizos and Welling, Structured and Efficient Variational Deep Learning with Matrix Gaussian Posteriors (2016).
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyrobc.bmr.multivariate_normal import reduce_multivariate_normal
from pyrobc.bmr.registry import Reduction, register_reduction
from pyrobc.dists import MatrixNormal
from pyrobc.dists.cholesky import log_det, whiten
from pyrobc.errors import ReductionError

__all__ = ["reduce_matrix_normal"]

_VECTOR_LIMIT = 1024


@register_reduction(MatrixNormal, MatrixNormal, MatrixNormal)
def reduce_matrix_normal(q: MatrixNormal, p: MatrixNormal, reduced: MatrixNormal) -> Reduction:
    """Matrix normal to matrix normal; ``posterior`` is the law of the matrix read by rows."""
    if torch.equal(p.column_scale_tril, reduced.column_scale_tril):
        return _reduce_rows(q, p, reduced)
    if torch.equal(p.row_scale_tril, reduced.row_scale_tril):
        turned = _reduce_rows(_transpose(q), _transpose(p), _transpose(reduced))
        if turned.posterior is None:
            return turned
        return Reduction(turned.delta_f, _as_vector_posterior(turned, q), reason=turned.reason)
    if q.event_shape.numel() > _VECTOR_LIMIT:
        raise ReductionError(
            "reduction of MatrixNormal",
            got=f"{q.event_shape.numel()} entries and a reduced prior that changes rows and columns",
            allowed=f"a change of rows or of columns, or at most {_VECTOR_LIMIT} entries",
            fix="change one covariance at a time and add up: the chain rule holds",
        )
    return reduce_multivariate_normal(_as_vector(q), _as_vector(p), _as_vector(reduced))


def _transpose(law: MatrixNormal) -> MatrixNormal:
    return MatrixNormal(law.loc.mT, law.column_scale_tril, law.row_scale_tril, validate_args=False)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)


def _as_vector(law: MatrixNormal) -> MultivariateNormal:
    factor = _kron(law.row_scale_tril, law.column_scale_tril)
    return MultivariateNormal(law.loc.flatten(-2), scale_tril=factor, validate_args=False)


def _as_vector_posterior(turned: Reduction, q: MatrixNormal) -> MultivariateNormal:
    """Reorder the law of a transposed matrix."""
    assert isinstance(turned.posterior, MultivariateNormal)
    rows, columns = q.event_shape
    order = torch.arange(rows * columns).reshape(columns, rows).mT.flatten()
    covariance = turned.posterior.covariance_matrix[..., order, :][..., order]
    factor = torch.linalg.cholesky_ex(covariance)[0]
    return MultivariateNormal(turned.posterior.loc[..., order], scale_tril=factor, validate_args=False)


def _reduce_rows(q: MatrixNormal, p: MatrixNormal, reduced: MatrixNormal) -> Reduction:
    rows, columns = q.event_shape
    batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape, reduced.batch_shape)
    row = q.row_scale_tril.expand(*batch, rows, rows)
    column = q.column_scale_tril.expand(*batch, columns, columns)
    prior_row, reduced_row = (law.row_scale_tril.expand(*batch, rows, rows) for law in (p, reduced))
    prior_column = p.column_scale_tril.expand(*batch, columns, columns)

    from_reduced, from_prior = whiten(reduced_row, row), whiten(prior_row, row)
    from_columns = whiten(prior_column, column)
    gain, row_basis = torch.linalg.eigh(from_reduced.mT @ from_reduced - from_prior.mT @ from_prior)
    weight, column_basis = torch.linalg.eigh(from_columns.mT @ from_columns)
    growth = 1.0 + gain[..., :, None] * weight[..., None, :]
    is_defined = (growth > 0).flatten(-2).all(-1)
    growth = torch.where(is_defined[..., None, None], growth, torch.ones_like(growth))

    def turn(matrix: Tensor) -> Tensor:
        turned: Tensor = row_basis.mT @ matrix @ column_basis
        return turned

    shift, moved = reduced.loc - p.loc, q.loc - p.loc
    z = turn(whiten(column, whiten(row, moved).mT).mT)
    white_shift = whiten(prior_column, shift.mT).mT
    pull = turn(from_reduced.mT @ whiten(reduced_row, white_shift) @ from_columns)
    push = turn(
        whiten(column, whiten(row, shift).mT).mT - from_prior.mT @ whiten(prior_row, white_shift) @ from_columns
    )
    energy = ((z * ((growth - 1.0) * z - 2.0 * pull) + pull * push) / growth).sum((-2, -1))
    delta_f = (
        columns * (log_det(prior_row) - log_det(reduced_row)) - 0.5 * torch.log(growth).sum((-2, -1)) - 0.5 * energy
    )
    delta_f = torch.where(is_defined, delta_f, math.nan)
    reason = "" if bool(is_defined.all()) else "the reduced posterior has no positive definite precision"
    if rows * columns > _VECTOR_LIMIT:
        return Reduction(delta_f, reason=reason)
    row, column = row @ row_basis, column @ column_basis
    loc = p.loc + row @ ((z + pull) / growth) @ column.mT
    root = _kron(row, column) * growth.rsqrt().flatten(-2)[..., None, :]
    factor = torch.linalg.cholesky_ex(root @ root.mT)[0]
    return Reduction(
        delta_f, MultivariateNormal(loc.flatten(-2), scale_tril=factor, validate_args=False), reason=reason
    )
