"""Rewind a network that has been cut: what is left goes back to where an earlier, larger fit had it.

The groups and single weights that a later fit has removed stay removed; the rest takes the laws of the earlier one, and
is then fitted again.  Keep the earlier posterior with ``posterior.copy()`` after an epoch or two of fitting, or take
what ``lift(...).new_guide()`` starts from.  (Its counterpart, folding gates into the weights that stay, is
``fold_scales`` and ``to_module``.)

Published for masks on single weights (Cho, Joshi and Hegde 2021): weights go back to those of an early checkpoint, one
epoch for MNIST, ten for larger sets.  That a whole posterior goes back is this package's reading.

References:
    Cho, Joshi, Hegde (2021), ESPN: extremely sparse pruned networks.
"""

from __future__ import annotations

import numpy as np
import torch

from pyrobc.errors import GroupError
from pyrobc.groups import GroupSpec, Ints
from pyrobc.meanfield import NormalFactor
from pyrobc.posterior import Posterior

__all__ = ["rewind"]


@torch.no_grad()
def rewind(posterior: Posterior, early: Posterior) -> Posterior:
    """``early`` without the groups and the weights that ``posterior`` no longer has; neither is changed.

    Args:
        posterior: of a network that has been cut, or has lost weights.
        early: of the same network before.

    Raises:
        GroupError: the cut network is not part of the early one, or has lost weights that are points there.
    """
    left, whole = _origins(posterior.model.spec), _origins(early.model.spec)
    is_part = left.keys() == whole.keys() and all(np.isin(left[name], whole[name]).all() for name in left)
    if not is_part:
        raise _refuse("a network that is not part of the early one", "a cut of the early network")
    back = early.restricted({name: np.searchsorted(whole[name], groups) for name, groups in left.items()})
    if dict(back.model.spec.tensors) != dict(posterior.model.spec.tensors):
        raise _refuse("tensors of other shapes", "a cut of the early network")
    sites = back.guide.by_site()
    for name, factor in posterior.guide.by_site().items():
        if isinstance(factor, NormalFactor) and not factor.is_whole:
            target = sites.get(name)
            if not isinstance(target, NormalFactor):
                raise _refuse(f"deleted weights of {name!r}, which are points there", "an early fit of Normal weights")
            target.keep_(factor.kept)
    return back


def _origins(spec: GroupSpec) -> dict[str, Ints]:
    """Numbers of the groups in the network that was lifted."""
    return {b.name: np.arange(b.size) if b.origin is None else b.origin for b in spec.blocks}


def _refuse(got: str, allowed: str) -> GroupError:
    return GroupError("network to rewind", got=got, allowed=allowed, fix="pass a copy of the posterior before the cut")
