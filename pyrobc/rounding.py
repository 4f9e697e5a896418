"""Widths that hardware likes: each block keeps a multiple of so many channels, or all that it has.

Matrix units work on tiles, so that 25 channels often take the time of 32.  A group that was to leave comes back, the
least certain one first, until its block's channels are a multiple; nothing more is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import numpy as np
from numpy.typing import NDArray

from pyrobc.errors import ConfigError
from pyrobc.groups import Block, GroupSpec

__all__ = ["round_up"]


def round_up(
    spec: GroupSpec,
    log_odds: Mapping[str, NDArray[np.float64]],
    outcomes: Mapping[str, list[tuple[str, str]]],
    multiple: int,
) -> int:
    """Turn outcomes from prune to keep; return how many.

    Args:
        spec: the groups.
        log_odds: of being negligible; those with the lowest come back first.
        outcomes: outcome and reason of each group, by block; edited.
        multiple: of channels of a layer; of groups, where a group is a channel.

    Raises:
        ConfigError: ``multiple`` is not a positive number.
    """
    if multiple < 1:
        raise ConfigError("round_to", got=repr(multiple), allowed="1 or more", fix="leave it out, or pass 8")
    total = 0
    for block in spec.blocks:
        rows = outcomes[block.name]
        step = multiple // gcd(multiple, _channels_per_group(block))
        pruned = [i for i in np.argsort(log_odds[block.name], kind="stable").tolist() if rows[i][0] == "prune"]
        for i in pruned[: -(block.size - len(pruned)) % step]:
            rows[i] = ("keep", f"came back to make channels a multiple of {multiple} (was: {rows[i][1]})")
            total += 1
    return total


def _channels_per_group(block: Block) -> int:
    makers = [m for m in block.members if m.role == "produce"] or list(block.members)
    return max(1, *(len(m.indices) // block.size for m in makers))
