"""What is told of a network while it is fitted: numbers of an epoch, and the loss on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyrobc.batches import move, split_batch
from pyrobc.calling import evaluating
from pyrobc.dists import interval_log_mass
from pyrobc.lift import LiftedModel
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.negligible import DEFAULT_EPSILON, find_sizes, negligible_thresholds
from pyrobc.objective import split_laws
from pyrobc.posterior import measure_input_rms
from pyrobc.training import Training

__all__ = ["look_at", "run_mean", "validate"]


@torch.no_grad()
def look_at(run: Training, inputs: Any, targets: Tensor) -> dict[str, float]:
    """Error of the mean network on the last batch, and how many groups the posterior expects to matter."""
    model = run.model
    own, _ = split_laws(model, run.guide.distributions())
    mean = model.complete(model.family.mean(own, model.spec))
    scales = model.family.presence(own, model.family.prior(model.spec, model.anchor), model.spec)
    stay = float(sum(block.size for block in model.spec.blocks))
    if scales:  # folded families have none: every group that is there matters
        rms = measure_input_rms(model, mean, [(inputs, targets)])
        thresholds = negligible_thresholds(model.spec, mean, rms, DEFAULT_EPSILON, sizes=find_sizes(scales))
        stay = math.nan
        if not any(bool(threshold.isnan().any()) for threshold in thresholds.values()):
            stay = sum(
                float((1 - interval_log_mass(scales[b].posterior, -t, t).exp()).sum()) for b, t in thresholds.items()
            )
    with evaluating(model):
        error = model.likelihood.loss(model.run(mean, inputs), targets).mean()
    return {"error": float(error), "groups": stay}


@torch.no_grad()
def run_mean(model: LiftedModel, guide: MeanFieldGuide, inputs: Any) -> Any:
    """What the mean network says, in evaluation mode."""
    own, _ = split_laws(model, guide.distributions())
    with evaluating(model):
        return model.run(model.family.mean(own, model.spec), inputs)


@torch.no_grad()
def validate(run: Training, loader: Iterable[Any]) -> float:
    """Mean negative log likelihood of the mean network, nats per row."""
    own, extra = split_laws(run.model, run.guide.distributions())
    effective = run.model.family.mean(own, run.model.spec)
    values = {name: law.mean for name, law in extra.items()}
    total, rows = 0.0, 0
    with evaluating(run.model):
        for batch in loader:
            inputs, targets = (move(part, run.model.anchor) for part in split_batch(batch))
            outputs = run.model.run(effective, inputs)
            total -= float(run.model.likelihood.distribution(outputs, values).log_prob(targets).sum())
            rows += len(targets)
    return total / rows
