"""The answer of a change of prior."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["Reduction"]


@dataclass(frozen=True)
class Reduction:
    """What a change of prior is worth.

    Attributes:
        delta_f: log evidence gained, nats, float64, batch shape; NaN where undefined.  Larger says prune.
        posterior: the posterior under the reduced prior, where a closed form gives one.
        mcse: Monte Carlo standard error of ``delta_f`` in nats; zero for closed forms.
        khat: Pareto shape of the importance weights; None for closed forms.
        reason: why entries are undefined, in words; empty when all are defined.
    """

    delta_f: Tensor
    posterior: Distribution | None = None
    mcse: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    khat: Tensor | None = None
    reason: str = ""

    @property
    def is_defined(self) -> Tensor:
        """Where ``delta_f`` is a number, as a boolean tensor of the batch shape."""
        return ~torch.isnan(self.delta_f)
