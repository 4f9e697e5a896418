r"""Prices of deleting any set of groups from a jointly Normal posterior, from one fit.

Full prior :math:`N(m_0, C_0)`, posterior :math:`N(m, C)`, both of shape (elements,).  Fixing the elements ``I`` at
``c`` is worth the Savage-Dickey density ratio (Dickey 1971; Friston and Penny 2011)

.. math::
    \Delta F(I) = \ln N(c_I; m_I, C_{II}) - \ln N(c_I; m_{0I}, C_{0II})
      = \tfrac12 (\ln|C_{0II}| - \ln|C_{II}|) - \tfrac12 D(I),
    \qquad D(I) = d_I^\top C_{II}^{-1} d_I - d_{0I}^\top C_{0II}^{-1} d_{0I},

with :math:`d = c - m`, :math:`d_0 = c - m_0`.  Where the covariances are per unit of an unknown noise precision with
posterior :math:`\tau \sim \mathrm{Gamma}(a, b)` (Normal-Gamma), averaging over :math:`\tau` replaces the second term by
:math:`-a \ln(1 + D / 2b)`, undefined where :math:`b + D/2 \le 0`, and leaves
:math:`\tau \sim \mathrm{Gamma}(a, b + D/2)`.  The kept elements have the conditional prior and the conditional
posterior given :math:`\theta_I = c`.

Log-determinant and quadratic form are the pivots of Gaussian elimination on
:math:`\begin{pmatrix} C & d \\ d^\top & 0 \end{pmatrix}`: eliminating ``i`` from the Schur complement ``S`` adds
:math:`\ln S_{ii}` to the first and :math:`S_{i,d}^2 / S_{ii}` to the second, and what is left is the conditional law
given what is deleted.  All :math:`2^k` subsets are the leaves of a binary tree whose branches either drop a row (kept:
marginalise) or eliminate it (deleted: condition), which costs :math:`\sum_j 2^j (k-j)^2 \approx 6 \cdot 2^k`
operations.

All values are in nats and float64; larger says prune.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma

from pyrobc.bmr.joint import as_joint_normal
from pyrobc.errors import ReductionError

__all__ = ["Deletions"]

_CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class _State:
    """Prior and posterior (leading dimension 2) given what is deleted so far, and the pivots that led here."""

    covariance: Tensor  # (2, elements, elements)
    difference: Tensor  # (2, elements)
    log_det: Tensor  # (2,)
    quadratic: Tensor  # (2,)

    def price(self, members: Tensor, is_member: Tensor) -> tuple[Tensor, Tensor]:
        """Log-determinants and quadratic forms, each (2, candidates), of also deleting ``members``.

        ``members`` (candidates, size) are element indices, padded where ``is_member`` is False.
        """
        block = self.covariance[:, members[:, :, None], members[:, None, :]]
        used = is_member[:, :, None] & is_member[:, None, :]
        block = torch.where(used, block, torch.eye(members.shape[1], dtype=block.dtype))
        difference = torch.where(is_member, self.difference[:, members], 0.0)
        factor, failed = torch.linalg.cholesky_ex(block)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        solved = torch.linalg.solve_triangular(factor, difference[..., None], upper=False)
        log_det = torch.where(failed > 0, torch.nan, log_det)
        return self.log_det[:, None] + log_det, self.quadratic[:, None] + solved.square().sum((-2, -1))

    def eliminate(self, members: Tensor) -> _State:
        """Condition on ``members`` (size,) being deleted."""
        rows = self.covariance[:, members]
        log_det, quadratic = self.price(members[None], torch.ones_like(members[None], dtype=torch.bool))
        gain = torch.linalg.solve(rows[:, :, members], rows)  # (2, size, elements)
        return _State(
            self.covariance - rows.mT @ gain,
            self.difference - (self.difference[:, None, members] @ gain)[:, 0],
            log_det[:, 0],
            quadratic[:, 0],
        )


class Deletions:
    """Prices of deleting any set of groups from a jointly Normal posterior.

    Args:
        q: posterior, over one vector of elements (Normal, diagonal, low-rank or full covariance).
        p: the prior it answers to, likewise.
        groups: element indices of each group; default every element by itself.
        value: what a deleted element is fixed at, scalar or shape (elements,).
        noise: posterior of the noise precision, where both covariances are per unit of it.
        names: one per group.

    Raises:
        ReductionError: laws that are not jointly Normal, shapes that differ, groups that overlap.
    """

    def __init__(
        self,
        q: Distribution,
        p: Distribution,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        value: float | Tensor = 0.0,
        noise: Gamma | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        (self.loc, self.covariance), (prior_loc, prior_covariance) = as_joint_normal(q, "q"), as_joint_normal(p, "p")
        if self.loc.shape != prior_loc.shape:
            raise ReductionError(
                "deletions",
                got=f"posterior of {self.loc.numel()} elements, prior of {prior_loc.numel()}",
                allowed="the same elements in both",
                fix="pass the prior the posterior answers to",
            )
        num_elements = self.loc.numel()
        members = [[i] for i in range(num_elements)] if groups is None else [list(group) for group in groups]
        flat = [i for group in members for i in group]
        if (
            len(set(flat)) < len(flat)
            or any(not group for group in members)
            or not all(0 <= i < num_elements for i in flat)
        ):
            raise ReductionError(
                "groups",
                got=f"{len(members)} groups with {len(flat)} members",
                allowed=f"groups that are not empty and do not overlap, of elements 0 to {num_elements - 1}",
                fix="merge groups that share an element",
            )
        self.groups = [torch.tensor(group) for group in members]
        self.names = tuple(names) if names is not None else tuple(str(i) for i in range(len(members)))
        if len(self.names) != len(self.groups):
            raise ReductionError(
                "names of the groups",
                got=f"{len(self.names)} names",
                allowed=f"{len(self.groups)}, one per group",
                fix="pass one name per group",
            )
        self.value = torch.as_tensor(value, dtype=torch.float64).expand(num_elements)
        self.noise = noise
        self.state = _State(
            torch.stack([prior_covariance, self.covariance]),
            self.value - torch.stack([prior_loc, self.loc]),
            torch.zeros(2, dtype=torch.float64),
            torch.zeros(2, dtype=torch.float64),
        )

    def select_elements(self, deleted: Tensor) -> Tensor:
        """Elements, boolean (..., elements), of the groups marked in ``deleted``, boolean (..., groups)."""
        elements = torch.zeros(*deleted.shape[:-1], self.loc.numel(), dtype=torch.bool)
        for column, group in enumerate(self.groups):
            elements[..., group] = deleted[..., column, None]
        return elements

    def score(self, deleted: Tensor) -> Tensor:
        """ΔF in nats, shape (models,), of the candidates ``deleted``, boolean, shape (models, groups)."""
        if deleted.ndim != 2 or deleted.shape[1] != len(self.groups) or deleted.dtype != torch.bool:
            raise ReductionError(
                "candidates",
                got=f"{deleted.dtype} of shape {tuple(deleted.shape)}",
                allowed=f"boolean of shape (models, {len(self.groups)})",
                fix="mark the deleted groups of each model with True",
            )
        num_elements = self.loc.numel()
        scores = []
        for chunk in deleted.split(max(1, _CHUNK_BYTES // (32 * num_elements**2))):
            scores.append(self.convert(*self._price_masks(self.select_elements(chunk))))
        return torch.cat(scores)

    def condition(self, deleted: Tensor) -> tuple[Tensor, Tensor]:
        """Kept posterior of each candidate: means (models, elements) and covariances (models, elements, elements).

        Deleted elements sit at their value with zero covariance.  With unknown noise the precision is integrated out,
        which multiplies the covariance by its mean reciprocal, :math:`(b + D/2)/(a - 1)`.
        """
        elements = self.select_elements(deleted)
        both = elements[:, :, None] & elements[:, None, :]
        block = torch.where(both, self.covariance, torch.eye(self.loc.numel(), dtype=torch.float64))
        rows = torch.where(elements[:, :, None], self.covariance, 0.0)  # C_I. in place, zero rows elsewhere
        gain = torch.linalg.solve(block, rows)
        difference = torch.where(elements, self.value - self.loc, 0.0)
        locs = torch.where(elements, self.value, self.loc + (difference[:, None] @ gain)[:, 0])
        kept = ~elements[:, :, None] & ~elements[:, None, :]
        covariances = torch.where(kept, self.covariance - rows.mT @ gain, 0.0)
        if self.noise is not None:
            _, quadratic = self._price_masks(elements)
            rate = self.noise.rate.double() + 0.5 * (quadratic[1] - quadratic[0])
            covariances = covariances * (rate / (self.noise.concentration.double() - 1))[:, None, None]
        return locs, covariances

    def _price_masks(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        return self.state.price(torch.arange(self.loc.numel()).expand(elements.shape), elements)

    def convert(self, log_det: Tensor, quadratic: Tensor) -> Tensor:
        """ΔF in nats from log-determinants and quadratic forms, each (2, models): prior first, posterior second."""
        excess = quadratic[1] - quadratic[0]
        if self.noise is None:
            fit = -0.5 * excess
        else:
            shape, rate = self.noise.concentration.double(), self.noise.rate.double()
            ratio = excess / (2 * rate)
            fit = torch.where(ratio > -1, -shape * torch.log1p(ratio), torch.nan)
        return 0.5 * (log_det[0] - log_det[1]) + fit

    def score_all(self, state: _State | None = None, columns: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Every subset of the groups ``columns``: deleted (2^k, groups) and ΔF (2^k,), from ``state`` on."""
        state = self.state if state is None else state
        columns = range(len(self.groups)) if columns is None else columns
        groups = [self.groups[column] for column in columns]
        order = torch.cat(groups) if groups else torch.zeros(0, dtype=torch.long)
        top = torch.cat([state.covariance[:, order[:, None], order], state.difference[:, order, None]], dim=2)
        bottom = torch.cat([state.difference[:, order], torch.zeros(2, 1, dtype=torch.float64)], dim=1)
        schur = torch.cat([top, bottom[:, None]], dim=1)[:, None]  # (2, models, rest + 1, rest + 1)
        log_det = state.log_det[:, None]
        for group in groups:
            size = len(group)
            branch, added = schur, torch.zeros_like(log_det)
            for _ in range(size):
                pivot = branch[:, :, 0, 0]
                added = added + pivot.log()
                row = branch[:, :, 0, 1:]
                branch = branch[:, :, 1:, 1:] - row[..., :, None] * (row / pivot[..., None])[..., None, :]
            schur = torch.cat([schur[:, :, size:, size:], branch], dim=1)
            log_det = torch.cat([log_det, log_det + added], dim=1)
        quadratic = state.quadratic[:, None] - schur[:, :, 0, 0]
        deleted = torch.zeros(log_det.shape[1], len(self.groups), dtype=torch.bool)
        codes = torch.arange(log_det.shape[1])
        for bit, column in enumerate(columns):
            deleted[:, column] = (codes >> bit) & 1 > 0
        return deleted, self.convert(log_det, quadratic)

    def score_next(self, state: _State, columns: Sequence[int]) -> Tensor:
        """ΔF in nats, shape (len(columns),), of deleting one more group from ``state``."""
        members = torch.nn.utils.rnn.pad_sequence([self.groups[c] for c in columns], batch_first=True)
        sizes = torch.tensor([len(self.groups[c]) for c in columns])
        return self.convert(*state.price(members, torch.arange(members.shape[1]) < sizes[:, None]))
