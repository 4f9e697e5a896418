"""The settings of a fit: which make sense, and which must agree before a checkpoint is resumed."""

from __future__ import annotations

from typing import Any

import torch

from pyrobc.batches import move
from pyrobc.calling import first_tensor, tensors_of
from pyrobc.errors import ConfigError, FitError, suggest
from pyrobc.kinds import is_positive, is_real, is_whole
from pyrobc.lift import LiftedModel
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.watching import run_mean

__all__ = ["PATHS", "check_device", "check_settings", "describe_batch", "describe_schedule", "describe_start"]

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
    device: Any = None,
    dtype: Any = None,
) -> None:
    """Raise a ``FitError`` for the first setting of ``fit`` that makes no sense."""
    check_device(device)
    is_path = path is None or callable(path) or path in PATHS
    # fmt: off
    rules = (
        ("epochs", epochs, is_whole(epochs, 1), "1 or more", "pass epochs=60, for instance"),
        ("seed", seed, is_whole(seed) and seed < 2**63, "a whole number from 0 to 2^63 - 1", "pass seed=0"),
        ("lr", lr, is_real(lr) and lr >= 0, "0 or more", "pass lr=1e-3, for instance"),
        ("temperature", temperature, is_positive(temperature), "a positive weight of the KL", "1.0 is the ELBO"),
        ("warmup_epochs", warmup_epochs, is_whole(warmup_epochs), "a whole number from 0", "0 is no warm-up"),
        ("clip_norm", clip_norm, clip_norm is None or is_positive(clip_norm), "a positive number or None",
         "pass clip_norm=10"),
        ("batch_size", batch_size, is_whole(batch_size, 1), "a whole number from 1", "pass batch_size=128"),
        ("patience", patience, patience is None or is_whole(patience, 1), "1 or more epochs, or None",
         "pass patience=10"),
        ("dtype", dtype, dtype in (None, torch.float32, torch.float64), "torch.float32 or torch.float64",
         "autocast=True computes products in half precision"),
        ("path", path, is_path, ", ".join(PATHS), suggest(str(path), PATHS)),
    )
    # fmt: on
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


def check_device(device: Any) -> None:
    """Raise a ``ConfigError`` unless tensors can be made on ``device``."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            "device", got=f"{device!r}: {str(error).splitlines()[0]}",
            allowed="cpu, cuda" if torch.cuda.is_available() else "cpu", fix="see pyrobc doctor",
        ) from error  # fmt: skip


def describe_start(model: LiftedModel, guide: MeanFieldGuide) -> list[str]:
    """Norms of where a fit starts, and of what its mean says to the example: a sign that the network is the same."""
    tensors = [*guide.parameters(), *model.net.buffers()]
    outputs = tensors_of(run_mean(model, guide, move(model.example_inputs, model.anchor)))
    return [f"{float(tensor.detach().double().norm()):.4g}" for tensor in (*tensors, *outputs)]


def describe_schedule(schedule: Any) -> list[str]:
    """Kind and constants of a schedule: what must agree for a resumed run to follow the same one."""
    state = {} if schedule is None else schedule.state_dict()
    plain = {k: v for k, v in state.items() if isinstance(v, int | float | str) and not k.startswith("_")}
    return [type(schedule).__name__, *(f"{key}={value}" for key, value in sorted(plain.items()))]


def describe_batch(batch: Any) -> list[Any]:
    """Shape and sums of a batch: a cheap sign that the data are the same."""
    first, targets = first_tensor(batch[0]), batch[1]
    return [list(first.shape), float(first.double().sum()), list(targets.shape), float(targets.double().sum())]
