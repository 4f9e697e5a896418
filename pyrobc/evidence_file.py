"""Evidence read back from the netCDF file that ``save`` wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import xarray as xr

from pyrobc.candidates import Candidate
from pyrobc.errors import OutputError
from pyrobc.evidence import Evidence

__all__ = ["read_evidence"]


def read_evidence(path: str | Path) -> Evidence:
    """What ``evidence`` returned, from ``posterior.nc`` or the directory that holds it.

    Raises:
        OutputError: the file is missing, damaged, or of another release.
    """
    file = Path(path) / "posterior.nc" if Path(path).is_dir() else Path(path)
    try:
        with xr.open_datatree(file, engine="h5netcdf") as lazy:
            tree = lazy.load()
        columns = {field.name: tree["candidates"][field.name].to_numpy() for field in dataclasses.fields(Candidate)}
        candidates = tuple(
            Candidate(**dict(zip(columns, (value.item() for value in row), strict=True)))
            for row in zip(*columns.values(), strict=True)
        )
        rank, facts = tree["bmr"]["rank"].to_numpy(), tree.attrs
        khat, good_k, gain, error = (float(facts[k]) for k in ("posterior_khat", "good_k", "gain", "gain_se"))
        return Evidence(tree, candidates, np.argsort(rank), khat, good_k, str(facts["method"]), gain, error)
    except (OSError, KeyError, ValueError, TypeError) as failure:
        raise OutputError(
            f"evidence {file}", got=f"{type(failure).__name__}: {' '.join(str(failure).split())}",
            allowed="a file that save(..., evidence=...) of this release wrote",
            fix="write it again, or leave the evidence out",
        ) from failure  # fmt: skip
