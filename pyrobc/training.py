"""The state of a training run, and what a cut in the middle of it changes.

A cut slices every tensor of the optimiser that has the shape of a parameter as it slices the parameter, and puts the
new parameters where the old ones were: moments, step counts, learning rates and a schedule go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc.groups import GroupSpec, Ints, Kept
from pyrobc.lift import LiftedModel
from pyrobc.meanfield import MeanFieldGuide, slice_site

__all__ = ["Training"]


@dataclass
class Training:
    """Everything that changes while training; a checkpoint holds all of it but ``has_checked_data``.

    ``kept`` holds the groups that are left, in the numbering of the network at the start.
    """

    model: LiftedModel
    guide: MeanFieldGuide
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    has_checked_data: bool = False
    kept: dict[str, Ints] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = self.model.spec.everything()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "kept": {name: groups.tolist() for name, groups in self.kept.items()},
            "guide": self.guide.state_dict(),
            "buffers": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, from a network as large as at the start."""
        kept = {name: np.asarray(groups, dtype=np.int64) for name, groups in state["kept"].items()}
        if any(len(groups) < len(self.kept[name]) for name, groups in kept.items()):
            self.cut_(kept)
        self.guide.load_state_dict(state["guide"])
        self.model.load_state_dict(state["buffers"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]

    def cut_(self, kept: Kept) -> None:
        """Cut groups away; what the optimiser knows of the others carries over."""
        spec, guide = self.model.spec, self.guide.restricted(self.model.spec, kept)
        _slice_optimizer(self.optimizer, self.guide, guide, spec, kept)
        self.model, self.guide = self.model.restricted(kept), guide
        self.kept = {name: groups[kept[name]] for name, groups in self.kept.items()}
        self.best = {}  # losses of a larger network are no measure for this one

    def note_best(self, loss: float) -> None:
        """Remember this state if it is the best so far."""
        if loss < self.best.get("loss", math.inf):
            tensors = {f"guide/{k}": v.clone() for k, v in self.guide.state_dict().items()}
            tensors |= {f"model/{k}": v.clone() for k, v in self.model.state_dict().items()}
            self.best = {"loss": loss, "epoch": self.epoch, "tensors": tensors}

    def restore_best(self) -> None:
        """Go back to it."""
        tensors = self.best["tensors"]
        for prefix, module in (("guide/", self.guide), ("model/", self.model)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def _slice_optimizer(
    optimizer: torch.optim.Optimizer, old: MeanFieldGuide, new: MeanFieldGuide, spec: GroupSpec, kept: Kept
) -> None:
    """Put the parameters of ``new`` in the place of those of ``old``, with what is left of their state."""
    indices = spec.kept_indices(kept)
    twins: dict[nn.Parameter, tuple[nn.Parameter, str]] = {}  # with the site whose shape it has, if it has one's
    for site, factor in old.by_site().items():
        for name, parameter in factor.named_parameters(recurse=False):
            twins[parameter] = new.by_site()[site].get_parameter(name), "" if name in factor.unsliced else site
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            group["params"][i], site = twins[parameter]
            state = optimizer.state.pop(parameter, {})
            for key, value in state.items():
                if site and isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = slice_site(site, value, spec, kept, indices).clone()
            if state:
                optimizer.state[group["params"][i]] = state
