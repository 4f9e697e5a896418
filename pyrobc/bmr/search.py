"""Search over which groups to delete, every candidate priced from one fit by :class:`pyrobc.bmr.deletions.Deletions`.

All prices are log evidence gained over deleting nothing, in nats; larger says prune.

References:
    Friston, Litvak, Oswal, Razi, Stephan, van Wijk, Ziegler and Zeidman, *Bayesian model reduction and empirical Bayes
    for group (DCM) studies* (2016), for the two-stage scheme.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobc.bmr.deletions import Deletions
from pyrobc.errors import ReductionError

__all__ = ["Search", "search_best_first", "search_exhaustively", "search_greedily", "search_in_stages"]

_MAX_EXHAUSTIVE = 20  # 2^20 models take a few hundred MiB


@dataclass(frozen=True)
class Search:
    """Candidates and their prices.

    Attributes:
        deleted: which groups each candidate deletes, boolean, shape (models, groups).
        delta_f: log evidence gained over deleting nothing, nats, shape (models,); NaN where undefined.
        names: the groups, in column order.
    """

    deleted: Tensor
    delta_f: Tensor
    names: tuple[str, ...]

    @property
    def best(self) -> Tensor:
        """Groups deleted by the best candidate, shape (groups,)."""
        return self.deleted[_rank(self.delta_f)[0]]

    def top(self, count: int) -> Search:
        """The ``count`` best candidates, best first; undefined ones come last."""
        order = _rank(self.delta_f)[:count]
        return Search(self.deleted[order], self.delta_f[order], self.names)


def _rank(delta_f: Tensor) -> Tensor:
    """Indices from best to worst.  A price that is not finite never wins."""
    return torch.where(delta_f.isfinite(), delta_f, -torch.inf).argsort(descending=True, stable=True)


def search_exhaustively(deletions: Deletions) -> Search:
    """Price all subsets of the groups in one batched call; row ``i`` deletes the groups of the set bits of ``i``."""
    if len(deletions.groups) > _MAX_EXHAUSTIVE:
        raise ReductionError(
            "exhaustive search",
            got=f"{len(deletions.groups)} groups, 2^{len(deletions.groups)} models",
            allowed=f"at most {_MAX_EXHAUSTIVE} groups",
            fix="use search_in_stages, search_greedily or search_best_first",
        )
    return Search(*deletions.score_all(), deletions.names)


def search_greedily(deletions: Deletions, *, stop_early: bool = True) -> Search:
    """Delete the best group again and again; one row per step, starting with nothing deleted.

    Args:
        deletions: the prices.
        stop_early: stop when no further deletion gains evidence; otherwise go on to the empty model.
    """
    state, left = deletions.state, list(range(len(deletions.groups)))
    path, scores = [torch.zeros(len(left), dtype=torch.bool)], [torch.zeros((), dtype=torch.float64)]
    while left:
        candidates = deletions.score_next(state, left)
        winner = int(_rank(candidates)[0])
        score = candidates[winner]
        if not score.isfinite() or (stop_early and score <= scores[-1]):
            break
        column = left.pop(winner)
        state = state.eliminate(deletions.groups[column])
        path.append(path[-1].clone())
        path[-1][column] = True
        scores.append(score)
    return Search(torch.stack(path), torch.stack(scores), deletions.names)


def search_best_first(deletions: Deletions, *, max_expansions: int = 64) -> Search:
    """Expand the best model seen so far by toggling each group, keeping all that were priced.

    Unlike the greedy path it may restore a group, and it goes on past local optima until ``max_expansions`` models are
    expanded or all are seen.
    """
    num_groups = len(deletions.groups)
    flips = torch.eye(num_groups, dtype=torch.bool)
    start = torch.zeros(1, num_groups, dtype=torch.bool)
    seen: dict[bytes, float] = {start.numpy().tobytes(): 0.0}
    queue: list[tuple[float, bytes]] = [(0.0, start.numpy().tobytes())]
    for _ in range(max_expansions):
        if not queue:
            break
        _, key = heapq.heappop(queue)
        parent = torch.frombuffer(bytearray(key), dtype=torch.bool)
        children = [child for child in parent ^ flips if child.numpy().tobytes() not in seen]
        if not children:
            continue
        for child, score in zip(children, deletions.score(torch.stack(children)).tolist(), strict=True):
            key = child.numpy().tobytes()
            seen[key] = score
            if abs(score) < float("inf"):  # False for NaN as well: an undefined price is never expanded
                heapq.heappush(queue, (-score, key))
    deleted = torch.stack([torch.frombuffer(bytearray(key), dtype=torch.bool) for key in seen])
    return Search(deleted, torch.tensor(list(seen.values()), dtype=torch.float64), deletions.names)


def search_in_stages(deletions: Deletions, *, width: int = 8) -> Search:
    """The two-stage scheme of SPM (Friston et al. 2016): joint deletion of many, then all subsets of the few best.

    In each round the remaining groups are ranked by their single deletion, given what is already deleted, and the best
    ``max(remaining / 4, width)`` are tried.  If there are more than ``width`` and deleting all of them together gains
    evidence, they go; otherwise all ``2^width`` subsets of the best ``width`` are priced and the best is taken.
    Rounds repeat until nothing more is deleted.  Every candidate that was priced is returned, once.
    """
    state, current = deletions.state, torch.zeros(len(deletions.groups), dtype=torch.bool)
    deleted, scores = [current[None]], [torch.zeros(1, dtype=torch.float64)]
    score = torch.zeros((), dtype=torch.float64)
    while not current.all():
        left = (~current).nonzero()[:, 0].tolist()
        ranked = [left[i] for i in _rank(deletions.score_next(state, left)).tolist()]
        best = ranked[: max(len(left) // 4, width)]
        if len(best) > width:
            joint = current.clone()
            joint[best] = True
            gained = deletions.score(joint[None])
            deleted.append(joint[None])
            scores.append(gained)
            if gained[0].isfinite() and gained[0] > score:
                state = state.eliminate(torch.cat([deletions.groups[c] for c in best]))
                current, score = joint, gained[0]
                continue
        family, prices = deletions.score_all(state, best[:width])
        deleted.append(family[1:] | current)  # row 0 is the current model, priced before
        scores.append(prices[1:])
        winner = int(_rank(prices)[0])
        if winner == 0:
            break
        state = state.eliminate(torch.cat([deletions.groups[c] for c in family[winner].nonzero()[:, 0].tolist()]))
        current, score = family[winner] | current, prices[winner]
    models, row = torch.cat(deleted).unique(dim=0, return_inverse=True)  # rounds meet the same subsets again
    delta_f = torch.cat(scores).new_empty(len(models))
    delta_f[row] = torch.cat(scores)
    return Search(models, delta_f, deletions.names)
