"""What kind of thing an argument is, asked before it is used."""

from __future__ import annotations

import inspect
import math
from numbers import Integral, Real
from typing import Any

from pyrobc.errors import ConfigError, FamilyError

__all__ = ["check_kind", "check_setting", "is_positive", "is_real", "is_whole"]


def check_kind(value: object, kind: type | tuple[type, ...], subject: str, allowed: str, fix: str) -> None:
    """Raise a ``ConfigError`` unless ``value`` is of that kind."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__}"
        raise ConfigError(subject, got=got, allowed=allowed, fix=fix)


def is_whole(value: object, least: int = 0) -> bool:
    """Whether it is a whole number, no less than ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_real(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: object) -> bool:
    """Whether it is a finite number above zero."""
    return is_real(value) and value > 0  # type: ignore[operator]


def check_setting(subject: str, parameter: inspect.Parameter, value: Any) -> None:
    """Refuse a value of another kind than the annotation says, and numbers of draws and rates below zero.

    Raises:
        FamilyError: the setting, what was got, what is allowed.
    """
    key, kinds = parameter.name, str(parameter.annotation).split(" | ")
    if "None" in kinds and value is None:
        return
    if "float" in kinds:
        is_fine, allowed = is_real(value) and not (key.endswith("_lr") and value < 0), "a number"
        allowed += " from 0" if key.endswith("_lr") else ""
    elif "int" in kinds:
        is_fine, allowed = is_whole(value), "a whole number from 0"
    elif "bool" in kinds:
        is_fine, allowed = isinstance(value, bool), "True or False"
    else:
        is_fine, allowed = not isinstance(parameter.default, str) or isinstance(value, str), "a name, as text"
    if not is_fine:
        raise FamilyError(
            subject, got=repr(value), allowed=allowed,
            fix=f"pass {key}={parameter.default!r}, the default, or leave it out",
        )  # fmt: skip
