"""Numbers that JSON has no words for: NaN and the infinities become ``{"float": "nan"}`` and come back as they were."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["decode_numbers", "encode_numbers"]


def encode_numbers(value: Any) -> Any:
    """What ``json.dumps`` writes as standard JSON: plain numbers, lists for tuples, texts for keys."""
    if isinstance(value, Mapping):
        return {str(key): encode_numbers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [encode_numbers(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, np.integer):
        return int(value)
    return value


def decode_numbers(value: Any) -> Any:
    """What ``json.loads`` gave, with the numbers of ``encode_numbers``; tuples stay lists."""
    if isinstance(value, dict):
        if set(value) == {"float"} and value["float"] in ("nan", "inf", "-inf"):
            return float(value["float"])
        return {key: decode_numbers(part) for key, part in value.items()}
    return [decode_numbers(part) for part in value] if isinstance(value, list) else value
