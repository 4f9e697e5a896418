"""What JSON gives as fields of frozen dataclasses: lists as tuples, and types as annotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin

__all__ = ["as_tuples", "conforms"]


def conforms(value: Any, hint: Any) -> bool:
    """Whether JSON data, lists as tuples, has the annotated type; a bool is no number, an int will do for a float."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return len(hints) == len(value) and all(map(conforms, value, hints))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(conforms(part, parts[1]) for part in value.values())
    if hint is Any:
        return True
    return isinstance(value, int | float if hint is float else hint) and not isinstance(value, bool)


def as_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same, its lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
