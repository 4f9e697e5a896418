"""Training: one loop for every family, with checkpoints that resume to the same bits.

All randomness of an epoch comes from ``(seed, epoch)``, so resuming needs no saved random state and any loader that
draws from torch, numpy or Python (or has a generator of its own) repeats itself.  Nothing global is left changed.  Of
several processes each takes its share of every batch (``pyrobc.distributed``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrobc._version import __version__
from pyrobc.batches import (
    as_loader,
    check_batch,
    count_batches,
    count_rows,
    first_batch,
    move,
    no_rows,
    repeatable,
    split_batch,
)  # fmt: skip
from pyrobc.checkpoint import read_checkpoint, write_checkpoint
from pyrobc.distributed import Team, find_team
from pyrobc.errors import CheckpointError, ConfigError, FitError
from pyrobc.groups import Kept
from pyrobc.kinds import check_kind
from pyrobc.lift import LiftedModel
from pyrobc.meanfield import MeanFieldGuide
from pyrobc.moment_loss import MomentLoss
from pyrobc.objective import Loss, LossFactory, fast_loss, traced_loss
from pyrobc.posterior import Posterior, measure_input_rms
from pyrobc.settings import PATHS, check_settings, describe_batch, describe_schedule, describe_start
from pyrobc.training import Training
from pyrobc.watching import look_at, run_mean, validate

__all__ = ["anneal", "fit"]

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
ScheduleFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
Prune = Callable[[Posterior], Kept | None]
_PRUNING_ROWS = 2_000  # whose activations tell how much a group carries, after every epoch
_LOSSES: dict[str, LossFactory] = dict(zip(PATHS, (fast_loss, traced_loss, MomentLoss()), strict=True))


def fit(
    model: LiftedModel,
    data: Any,
    *,
    epochs: int,
    seed: int = 0,
    lr: float = 1e-3,
    optimizer: OptimizerFactory | None = None,
    schedule: ScheduleFactory | None = None,
    temperature: float = 1.0,
    warmup_epochs: int = 0,
    clip_norm: float | None = None,
    autocast: bool = False,
    batch_size: int = 128,
    validation: Any = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    path: Literal["fast", "traced", "moments"] | LossFactory | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    guide: MeanFieldGuide | None = None,
    progress: bool = True,
    prune: Prune | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[MeanFieldGuide, float], None] | None = None,
) -> Posterior:
    """Fit ``model`` by stochastic variational inference.

    Args:
        model: what ``lift`` returned; its batch-norm statistics are updated.
        data: a loader of ``(inputs, targets)``, or a pair of arrays.
        epochs: passes over the data in all, those before a resume included.
        seed: seed of all randomness.
        lr: learning rate of the default optimiser, Adam.
        optimizer: ``parameter_groups -> torch.optim.Optimizer``; ``lr`` is then not used.
        schedule: ``optimizer -> learning-rate scheduler``, stepped every epoch.
        temperature: weight of the KL; 1 is the ELBO.
        warmup_epochs: epochs over which the KL weight grows linearly to ``temperature``.
        clip_norm: largest gradient norm.
        autocast: whether the network's products and convolutions are in bfloat16; draws, divergences and everything
            after the fit keep their precision.
        batch_size: for arrays; a loader has its own.
        validation: held-out data for early stopping.
        patience: epochs without a better validation loss before stopping; the best state is restored.
        checkpoint: file written after every epoch and resumed from if it exists.
        path: ``fast`` (local draws), ``traced`` (Pyro's ELBO), ``moments`` or a ``MomentLoss``; None: the family's.
        device: where to train.
        dtype: ``torch.float32`` or ``torch.float64``.
        guide: start from this guide instead of a new one (re-adapting after a cut).
        progress: show a progress bar.
        prune: called after every epoch with the posterior so far; groups that are not among those it returns leave the
            network, the KL and the optimiser's state at once (None: all stay).  What its ``state_dict`` gives is kept
            in the checkpoint for its ``load_state_dict``, where it has them.
        on_epoch: called with the numbers of each epoch, after its checkpoint.
        on_step: called before each step with the guide, which it may change, and the fraction of the steps done.

    Raises:
        DataError, FitError, CheckpointError, OutputError: see the message.
    """
    check_kind(model, LiftedModel, "model", "what bc.lift returns", "pass bc.lift(net, family, likelihood, x[:1])")
    path = path or model.family.path
    check_settings(
        epochs=epochs, seed=seed, lr=lr, temperature=temperature, warmup_epochs=warmup_epochs, clip_norm=clip_norm,
        batch_size=batch_size, patience=patience, validation=validation, path=path, autocast=autocast, device=device,
        dtype=dtype,
    )  # fmt: skip
    model = model.to(device=device, dtype=dtype)
    guide = (guide or model.new_guide()).to(model.anchor)
    team, loader = find_team(), as_loader(data, batch_size=batch_size)
    team.check_loader(loader)
    team.align_(model, guide)
    if prune is not None and (isinstance(prune, type) or not callable(prune)):
        raise ConfigError(
            "prune", got=repr(prune), allowed="what is called with a posterior after every epoch, or None",
            fix="pass PruneEachEpoch()",
        )  # fmt: skip
    held_out = None if validation is None else as_loader(validation, batch_size=1024, shuffle=False)
    with repeatable(loader, seed):
        num_data = count_rows(loader)
    groups = guide.parameter_groups()
    chosen = optimizer(groups) if optimizer else torch.optim.Adam(groups, lr=lr, fused=True)
    for group in chosen.param_groups:
        group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
    run = Training(model, guide, chosen, schedule(chosen) if schedule else None)
    identity = {
        "version": __version__,
        "network": {n: list(s) for n, s in model.spec.tensors.items()},
        "family": repr(model.family),
        "likelihood": model.likelihood.name,
        "dtype": str(model.anchor.dtype),
        "seed": seed,
        "optimizer": [type(chosen).__name__, *(float(group["lr"]) for group in chosen.param_groups)],
        "schedule": describe_schedule(run.schedule),
        "temperature": [temperature, warmup_epochs],
        "clip_norm": clip_norm,
        "autocast": autocast or None,
        "path": getattr(path, "__qualname__", str(path)),
        "rows": [num_data, getattr(loader, "batch_size", None)],
        "deleted weights": guide.count_deleted() or None,
        "prune": getattr(prune, "__qualname__", None if prune is None else repr(prune)),
    }
    target = Path(checkpoint) if checkpoint else None
    if target is not None:
        identity["parameters and outputs before the fit"] = describe_start(model, guide)
        with repeatable(loader, seed):
            batch = first_batch(loader)
        check_batch(*batch, model.example_inputs)
        identity["data"] = describe_batch(batch)
    found = None if target is None else team.ask_first(lambda: target.exists() and read_checkpoint(target, identity))
    if found:
        run.load(found)
        if load := getattr(prune, "load_state_dict", None):
            load(found["prune"])
        if run.epoch > epochs:
            raise CheckpointError(
                f"checkpoint {target}",
                got=f"{run.epoch} epochs, more than the {epochs} asked for",
                allowed="a checkpoint of a run that is not longer",
                fix="ask for as many epochs, or remove the checkpoint to start again",
            )
    make_loss = path if callable(path) else _LOSSES[path]
    loss = make_loss(run.model, run.guide, num_data)
    bar = tqdm(total=epochs, initial=run.epoch, desc=f"fit {model.family.name}", unit="epoch",
               disable=not (progress and team.is_first))  # fmt: skip
    with pyro.get_param_store().scope(), bar:
        while run.epoch < epochs and not _is_stale(run, patience):
            weight = temperature * min(1.0, (run.epoch + 1) / (warmup_epochs + 1))
            numbers = _train_epoch(run, loss, loader, weight, clip_norm, autocast, seed, on_step, epochs, team)
            if held_out is not None:
                with repeatable(held_out, seed, run.epoch):
                    numbers["validation_loss"] = team.agree(validate(run, held_out))
                if weight == temperature:  # before the warm-up ends losses are not comparable
                    run.note_best(numbers["validation_loss"])
            _step_schedule(run.schedule, numbers)
            run.history.append(numbers)
            if prune is not None and _cut_groups(run, prune, loader, num_data, seed, team):
                loss = make_loss(run.model, run.guide, num_data)
            if target is not None and team.is_first:
                save = getattr(prune, "state_dict", dict)
                write_checkpoint(target, identity, run.state() | {"prune": save()})
            bar.update()
            bar.set_postfix(
                {
                    "ELBO": f"{numbers['elbo']:.4g}",
                    "error": f"{numbers['error']:.3f}",
                    "groups": f"{numbers['groups']:.0f}",
                }
            )
            if on_epoch is not None:
                on_epoch(numbers)
    if patience is not None and run.best:
        run.restore_best()
    return _measure(run, loader, num_data, seed)


def anneal(epochs: int) -> ScheduleFactory:
    """A learning rate that falls to zero along a cosine."""
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


def _train_epoch(
    run: Training,
    loss: Loss,
    loader: Iterable[Any],
    temperature: float,
    clip_norm: float | None,
    autocast: bool,
    seed: int,
    on_step: Callable[[MeanFieldGuide, float], None] | None,
    epochs: int,
    team: Team,
) -> dict[str, float]:
    model, is_first = run.model, not run.has_checked_data
    model.train()
    total, batches = 0.0, 0
    length = count_batches(loader)
    with repeatable(loader, seed, run.epoch):
        for batch in loader:
            inputs, targets = (move(part, model.anchor) for part in split_batch(batch))
            if is_first:
                check_batch(inputs, targets, model.example_inputs)
                model.likelihood.check(targets, run_mean(model, run.guide, inputs))
            if on_step is not None:
                on_step(run.guide, (run.epoch + min(1.0, batches / length)) / epochs)
            run.optimizer.zero_grad(set_to_none=True)
            own = team.share(inputs, targets)
            if len(own[1]):
                half = torch.autocast(targets.device.type, torch.bfloat16) if autocast else nullcontext()
                check = pyro.validation_enabled(is_first and batches == 0)
                with check, team.noise(seed, run.epoch, batches), half:
                    value = loss(*own, temperature)
                value.backward()
            else:  # fewer rows than processes
                value = model.anchor.new_zeros(())
            value = team.sum_(run.guide.parameters(), value, len(own[1]) / len(targets))
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(run.guide.parameters(), clip_norm)
            total += _finite(value, run.epoch, batches)
            run.optimizer.step()
            run.guide.project_()
            batches += 1
    if batches == 0:
        raise no_rows()
    team.average_norms_(model)
    look = team.agree(look_at(run, inputs, targets))
    is_finite = all(bool(torch.isfinite(p).all()) for p in run.guide.parameters())
    if not is_finite or not all(math.isfinite(number) for number in look.values()):
        raise _diverged("parameters that are not finite", run.epoch, batches)
    run.has_checked_data = True
    run.epoch += 1
    return {"epoch": float(run.epoch), "elbo": -total / batches, "temperature": temperature, **look}


def _measure(run: Training, loader: Any, num_data: int, seed: int, max_rows: int = 10_000) -> Posterior:
    """The posterior so far, with the size of activations on some rows."""
    posterior = Posterior(run.model, run.guide, num_data, seed, run.history)
    with repeatable(loader, seed):
        posterior.input_rms = measure_input_rms(run.model, posterior.mean(), loader, max_rows)
    return posterior


def _cut_groups(run: Training, prune: Prune, loader: Any, num_data: int, seed: int, team: Team) -> bool:
    """Cut what ``prune`` leaves out, and note the size of what is left; whether anything was cut."""
    kept = team.agree(prune(_measure(run, loader, num_data, seed, _PRUNING_ROWS)))
    is_smaller = kept is not None and any(len(kept[block.name]) < block.size for block in run.model.spec.blocks)
    if kept is not None and is_smaller:
        run.cut_(kept)
    spec = run.model.spec
    run.history[-1]["parameters"], run.history[-1]["macs"] = map(float, spec.forecast(spec.everything()))
    return is_smaller


def _is_stale(run: Training, patience: int | None) -> bool:
    return patience is not None and bool(run.best) and run.epoch - run.best["epoch"] >= patience


def _finite(value: Tensor, epoch: int, batch: int) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        raise _diverged(f"a loss of {number}", epoch, batch + 1)
    return number


def _diverged(what: str, epoch: int, batch: int) -> FitError:
    return FitError(
        "training",
        got=f"{what} at epoch {epoch + 1}, batch {batch}",
        allowed="finite losses and parameters",
        fix="lower lr, set clip_norm=10, or add warmup_epochs",
    )


def _step_schedule(schedule: torch.optim.lr_scheduler.LRScheduler | None, numbers: dict[str, float]) -> None:
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        schedule.step(numbers.get("validation_loss", -numbers["elbo"]))
    elif schedule is not None:
        schedule.step()
