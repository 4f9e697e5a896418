"""The answer of a change of prior."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["Reduction", "explain_undefined"]


class Reduction:
    """What a change of prior is worth.

    Args:
        delta_f: log evidence gained, nats, float64, batch shape; NaN where undefined.  Larger says prune.
        posterior: the posterior under the reduced prior, or a function that makes it when it is first asked for; None
            where no closed form gives one.
        mcse: Monte Carlo standard error of ``delta_f`` in nats; zero for closed forms.
        khat: Pareto shape of the importance weights; None for closed forms.
        reason: why entries are undefined, in words; empty when all are defined.
    """

    def __init__(
        self,
        delta_f: Tensor,
        posterior: Distribution | Callable[[], Distribution] | None = None,
        mcse: Tensor | None = None,
        khat: Tensor | None = None,
        reason: str = "",
    ) -> None:
        self.delta_f = delta_f
        self.mcse = torch.zeros((), dtype=torch.float64, device=delta_f.device) if mcse is None else mcse
        self.khat = khat
        self.reason = reason
        self._posterior = posterior

    @property
    def posterior(self) -> Distribution | None:
        """The posterior under the reduced prior, if it has a closed form."""
        if self._posterior is not None and not isinstance(self._posterior, Distribution):
            self._posterior = self._posterior()
        return self._posterior

    @property
    def is_defined(self) -> Tensor:
        """Where ``delta_f`` is a number, as a boolean tensor of the batch shape."""
        return ~torch.isnan(self.delta_f)

    def map(
        self,
        change: Callable[[Tensor], Tensor],
        posterior: Callable[[Distribution], Distribution] | None = None,
        mcse: Callable[[Tensor], Tensor] | None = None,
        khat: Callable[[Tensor], Tensor] | None = None,
    ) -> Reduction:
        """The same answer, reshaped: each part changed by its function (``change`` where none is given)."""
        wrapped: Callable[[], Distribution] | Distribution | None = self._posterior
        if posterior is not None and wrapped is not None:
            wrap = posterior

            def make() -> Distribution:
                assert self.posterior is not None
                return wrap(self.posterior)

            wrapped = make
        new_khat = None if self.khat is None else (khat or change)(self.khat)
        return Reduction(change(self.delta_f), wrapped, (mcse or change)(self.mcse), new_khat, self.reason)

    def __repr__(self) -> str:
        khat = "" if self.khat is None else f", khat={self.khat}"
        why = f", reason={self.reason!r}" if self.reason else ""
        return f"Reduction(delta_f={self.delta_f}, mcse={self.mcse}{khat}{why})"


def explain_undefined(delta_f: Tensor, why: str) -> str:
    """``why`` if any entry is undefined, else nothing."""
    # The minimum is NaN as soon as one entry is, and needs no mask of the size of delta_f.
    return why if delta_f.numel() and bool(torch.isnan(delta_f.detach().min())) else ""
