"""The labelled table that scoring returns: one row per reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrobc.bmr.registry import Reduction

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["ScoreTable"]


@dataclass(frozen=True)
class ScoreTable:
    """Prices of reduced priors: one row per element of each site, or one row for all sites together.

    Rows run over the sites in the order asked for, and over the batch elements of each in row-major order.

    Attributes:
        reductions: what :func:`pyrobc.bmr.reduce` returned for each site (reduced posterior included), by site name;
            the names of a joint reduction are joined by " + ".
        reduced: name of each reduced prior, by the same keys.
    """

    reductions: dict[str, Reduction]
    reduced: dict[str, str]

    def __len__(self) -> int:
        return sum(reduction.delta_f.numel() for reduction in self.reductions.values())

    def _join(self, values: list[Tensor]) -> Tensor:
        pairs = zip(values, self.reductions.values(), strict=True)
        return torch.cat([value.double().expand(r.delta_f.shape).reshape(-1) for value, r in pairs])

    @property
    def delta_f(self) -> Tensor:
        """Log evidence gained, nats, shape (rows,); NaN where undefined.  Larger says prune."""
        return self._join([r.delta_f for r in self.reductions.values()])

    @property
    def mcse(self) -> Tensor:
        """Monte Carlo standard error of ``delta_f``, nats, shape (rows,); zero for closed forms."""
        return self._join([r.mcse for r in self.reductions.values()])

    @property
    def khat(self) -> Tensor:
        """Pareto shape of the importance weights, shape (rows,); NaN for closed forms."""
        nan = torch.tensor(torch.nan, dtype=torch.float64)
        return self._join([nan if r.khat is None else r.khat for r in self.reductions.values()])

    @property
    def site(self) -> list[str]:
        """Site of each row."""
        return [name for name, r in self.reductions.items() for _ in range(r.delta_f.numel())]

    @property
    def index(self) -> list[tuple[int, ...]]:
        """Batch index of each row within its site; () for a site without batch dimensions."""
        return [index for r in self.reductions.values() for index in np.ndindex(*r.delta_f.shape)]

    @property
    def reason(self) -> list[str]:
        """Why a row is undefined, in words; empty where it is defined."""
        return [
            "" if is_defined else r.reason or "undefined"
            for r in self.reductions.values()
            for is_defined in r.is_defined.reshape(-1).tolist()
        ]

    def _columns(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "index": self.index,
            "reduced": [self.reduced[name] for name in self.site],
            "delta_f": self.delta_f.detach().cpu().numpy(),
            "mcse": self.mcse.detach().cpu().numpy(),
            "khat": self.khat.detach().cpu().numpy(),
            "reason": self.reason,
        }

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self._columns())

    def to_xarray(self) -> xarray.Dataset:
        """The rows as an xarray Dataset over dimension ``row``; site, index and reduced prior are coordinates."""
        import xarray

        columns = self._columns()
        columns["index"] = [",".join(map(str, index)) for index in columns["index"]]
        coords = {name: ("row", np.array(columns.pop(name), dtype=str)) for name in ("site", "index", "reduced")}
        columns["reason"] = np.array(columns["reason"], dtype=str)
        data = {name: ("row", values) for name, values in columns.items()}
        return xarray.Dataset(data, coords, attrs={"unit": "nats", "direction": "larger says prune"})
