r"""Inside the groups that stay: the part of ``compress`` that works on single weights.

Scales are folded into weights (``pyrobc.folding``), weights are deleted in rounds (``pyrobc.sparsify``), and what is
left moves to grids as coarse as the posterior allows (``pyrobc.gridding``).  With ``E`` epochs of re-adapting there are
:math:`\min(12, E)` rounds that share ``E`` epochs, ``E`` more with the learning rate annealed to zero, and ``E`` more
on the grids.  Decisions on groups are not looked at again, but units that no weight reads or feeds leave too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pyrobc import codec
from pyrobc.errors import ConfigError, OutputError
from pyrobc.family import Family
from pyrobc.fit import anneal, fit
from pyrobc.folding import fold_scales
from pyrobc.gridding import move_to_grid, read_steps
from pyrobc.groups import GroupSpec
from pyrobc.outcomes import remove_groups
from pyrobc.plan import Plan
from pyrobc.posterior import Posterior
from pyrobc.sparsify import check_support_weight, sparsify
from pyrobc.weights import count_weights

__all__ = ["KeepWeights", "check_thinning", "record_thinning", "thin"]

KeepWeights = int | float | Literal["odds"] | None
"""Weights and biases to keep: a number, a share of the dense network's parameters, or what posterior odds keep."""

_ROUNDS = 12


def check_thinning(
    family: Family,
    keep_weights: KeepWeights,
    coarseness: float | None,
    support_weight: float,
    readapt_epochs: int | None,
) -> None:
    """Refuse, before the fit, settings that make no sense or that the family cannot follow.

    Raises:
        ConfigError: see the message.
    """
    check_support_weight(support_weight, keep_weights)
    if keep_weights is None and coarseness is None:
        return
    is_number = isinstance(keep_weights, int | float) and not isinstance(keep_weights, bool)
    is_count = is_number and (keep_weights >= 1 if isinstance(keep_weights, int) else 0 < keep_weights < 1)  # type: ignore[operator]
    if not (keep_weights is None or keep_weights == "odds" or is_count):
        raise ConfigError(
            "keep_weights", got=repr(keep_weights),
            allowed="a whole number from 1, a share of the dense parameters between 0 and 1, 'odds', or None",
            fix="pass 0.05, for instance",
        )  # fmt: skip
    if coarseness is not None and not 0 < coarseness < math.inf:
        raise ConfigError(
            "coarseness", got=repr(coarseness), allowed="a positive number of posterior standard deviations, or None",
            fix="pass 2.0, and less for a finer grid",
        )  # fmt: skip
    name = "keep_weights" if keep_weights is not None else "coarseness"
    if family.posterior_on != "weight":
        raise ConfigError(
            f"{name} with family {family.name!r}", got="weights that are points, without a posterior of their own",
            allowed="a family with Normal weights", fix="pass family='group_normal_jeffreys'",
        )  # fmt: skip
    if readapt_epochs == 0:
        raise ConfigError(
            f"{name} with readapt_epochs", got="0", allowed="1 or more: the network re-adapts to what is deleted",
            fix="leave readapt_epochs out for a quarter of epochs",
        )  # fmt: skip


def thin(
    posterior: Posterior,
    data: Any,
    *,
    keep_weights: KeepWeights,
    coarseness: float | None,
    support_weight: float,
    dense_parameters: int,
    epochs: int,
    folder: Path | None,
    settings: Mapping[str, Any],
) -> Posterior:
    """Fold, delete, settle, and move to grids; its ``history`` has all epochs of that.

    Args:
        posterior: of the network after the cuts of groups; not changed.
        data: training data.
        keep_weights: see ``KeepWeights``; None deletes none.
        coarseness: step of the grids in posterior standard deviations; None for no grids.
        support_weight: see ``sparsify``.
        dense_parameters: what a share of ``keep_weights`` is taken of.
        epochs: epochs of re-adapting.
        folder: directory for checkpoints.
        settings: of ``fit``; early stopping applies to the last fit only, as deletions cannot be undone.
    """
    history: list[dict[str, float]] = []
    fixed = {name: value for name, value in settings.items() if name not in ("validation", "patience")}
    posterior = fold_scales(posterior)
    if keep_weights is not None:
        rounds, keep = min(_ROUNDS, epochs), None
        if not isinstance(keep_weights, str):
            is_share = isinstance(keep_weights, float)
            keep = max(1, round(keep_weights * dense_parameters)) if is_share else int(keep_weights)
        posterior = sparsify(
            posterior, data, keep=keep, rounds=rounds, epochs=max(1, round(epochs / rounds)), settle_epochs=epochs,
            support_weight=support_weight, checkpoint=folder, **fixed,
        )  # fmt: skip
        history += posterior.history
    if coarseness is not None:
        posterior = move_to_grid(posterior, coarseness)
        posterior = fit(
            posterior.model, data, epochs=epochs, guide=posterior.guide, schedule=anneal(epochs),
            checkpoint=None if folder is None else folder / "grid.pt", **settings,
        )  # fmt: skip
        history += posterior.history
    posterior.history = history
    return posterior


@torch.no_grad()
def record_thinning(plan: Plan, spec: GroupSpec, posterior: Posterior, asked: Mapping[str, Any]) -> Plan:
    """``plan`` with what ``thin`` did: units that left, weights that are left, steps of the grids, bytes of the file.

    Args:
        plan: of the cuts of groups.
        spec: groups of the plan's network.
        posterior: what ``thin`` returned.
        asked: the arguments of ``thin`` by name.
    """
    left = {b.name: np.arange(b.size) if b.origin is None else b.origin for b in posterior.model.spec.blocks}
    plan = remove_groups(plan, spec, left, "every weight that read it, or fed it, was deleted")
    net, steps = posterior.to_module(), read_steps(posterior)
    kept, total = count_weights(posterior)
    weights: dict[str, Any] = {"kept": kept, "total": total}
    weights["nonzero"] = sum(int(p.count_nonzero()) for p in net.parameters() if p.requires_grad)
    try:
        weights["file_bytes"] = len(codec.encode(copy.deepcopy(net).cpu(), steps=steps)[0])
    except OutputError:  # an architecture that the format does not hold: ``save`` says so
        weights["file_bytes"] = None
    rule = {**plan.rule, **asked, "weights": weights, "steps": steps}
    notes = [*plan.notes]
    if steps:
        notes.append(
            "each tensor has a grid of its own (the rule's steps), which whole bits per number do not describe"
        )
    return replace(plan, rule=rule, notes=tuple(notes))
