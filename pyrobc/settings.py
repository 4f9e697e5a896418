"""The settings of a fit: which make sense, and which must agree before a checkpoint is resumed."""

from __future__ import annotations

import math
from typing import Any

from pyrobc.dependency import first_tensor
from pyrobc.errors import FitError, suggest

__all__ = ["PATHS", "check_settings", "describe_batch", "describe_schedule"]

PATHS = ("fast", "traced", "moments")


def check_settings(
    *,
    epochs: int,
    seed: int = 0,
    lr: float = 1e-3,
    temperature: float = 1.0,
    warmup_epochs: int = 0,
    clip_norm: float | None = None,
    batch_size: int = 128,
    patience: int | None = None,
    validation: Any = None,
    path: Any = None,
    autocast: bool = False,
) -> None:
    """Raise a ``FitError`` for the first setting of ``fit`` that makes no sense."""
    is_whole = isinstance(epochs, int) and isinstance(warmup_epochs, int) and isinstance(batch_size, int)
    is_path = path is None or callable(path) or path in PATHS
    rules = (
        ("epochs", epochs, is_whole and epochs >= 1, "1 or more", "pass epochs=60, for instance"),
        ("seed", seed, isinstance(seed, int) and seed >= 0, "a whole number from 0", "pass seed=0, for instance"),
        ("lr", lr, 0 <= lr < math.inf, "0 or more", "pass lr=1e-3, for instance"),
        ("temperature", temperature, 0 < temperature < math.inf, "a positive weight of the KL", "1.0 is the ELBO"),
        ("warmup_epochs", warmup_epochs, is_whole and warmup_epochs >= 0, "a whole number from 0", "0 is no warm-up"),
        ("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "a positive number or None", "pass clip_norm=10"),
        ("batch_size", batch_size, is_whole and batch_size >= 1, "a whole number from 1", "pass batch_size=128"),
        ("patience", patience, patience is None or patience >= 1, "1 or more epochs, or None", "pass patience=10"),
        ("path", path, is_path, ", ".join(PATHS), suggest(str(path), PATHS)),
    )
    for name, value, is_fine, allowed, fix in rules:
        if not is_fine:
            raise FitError(name, got=repr(value), allowed=allowed, fix=fix)
    if autocast and path in ("traced", "moments"):
        raise FitError(
            "autocast", got=f"path={path!r}", allowed="path='fast', which keeps divergences out of it",
            fix="leave autocast out",
        )  # fmt: skip
    if patience is not None and validation is None:
        raise FitError(
            "early stopping",
            got=f"patience={patience} without validation data",
            allowed="patience together with validation",
            fix="pass validation=loader",
        )


def describe_schedule(schedule: Any) -> list[str]:
    """Kind and constants of a schedule: what must agree for a resumed run to follow the same one."""
    state = {} if schedule is None else schedule.state_dict()
    plain = {k: v for k, v in state.items() if isinstance(v, int | float | str) and not k.startswith("_")}
    return [type(schedule).__name__, *(f"{key}={value}" for key, value in sorted(plain.items()))]


def describe_batch(batch: Any) -> list[Any]:
    """Shape and sums of a batch: a cheap sign that the data are the same."""
    first, targets = first_tensor(batch[0]), batch[1]
    return [list(first.shape), float(first.double().sum()), list(targets.shape), float(targets.double().sum())]
