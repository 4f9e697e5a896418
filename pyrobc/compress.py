"""The façade: lift, fit, score, check, decide, cut, re-adapt, and measure, in one call.

Of several processes (``pyrobc.distributed``) each does all of it on its share of every batch; plans are those of the
first, which alone measures at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from pyrobc.batches import as_loader, check_batch, check_rows, count_rows, first_batch, move
from pyrobc.calling import first_tensor
from pyrobc.compare import compare
from pyrobc.decide import decide
from pyrobc.decision_settings import check_decision
from pyrobc.diagnose import Diagnosis, diagnose
from pyrobc.distributed import find_team
from pyrobc.evidence import Evidence, evidence
from pyrobc.family import Family, make_family
from pyrobc.fit import anneal, fit
from pyrobc.kinds import check_kind
from pyrobc.lift import lift
from pyrobc.likelihoods import Likelihood, make_likelihood
from pyrobc.negligible import DEFAULT_EPSILON
from pyrobc.plan import Plan
from pyrobc.posterior import Posterior
from pyrobc.pruning import PruneEachEpoch
from pyrobc.rules import PosteriorOdds, Rule, make_rule
from pyrobc.scores import PriorOdds, Score, score
from pyrobc.sensitivity import Sensitivity, measure_sensitivity
from pyrobc.settings import check_settings
from pyrobc.surgery import apply
from pyrobc.thinning import KeepWeights, check_thinning, record_thinning, thin

__all__ = ["Result", "compress"]


@dataclass
class Result:
    """What ``compress`` returns.

    Attributes:
        net: the compact network, an ordinary module; with ``keep_weights`` many of its numbers are zero.
        plan: what was removed, and why; belongs to the network that was given.
        posterior: the posterior of the compact network.
        score: scores of the first round, over all groups that the first fit left.
        evidence: nested candidates of the first round.
        history: numbers of every epoch, re-adaptation included.
        dense: the network it is compared with.
        table: measured rows, dense and compact.
        diagnosis: what else compression changed, on test rows of class labels.
        sensitivity: groups that the first round would keep at other ``epsilon``.
        example_inputs: a batch of one.
    """

    net: nn.Module
    plan: Plan
    posterior: Posterior
    score: Score
    evidence: Evidence
    history: list[dict[str, float]]
    example_inputs: Any
    dense: nn.Module
    table: list[dict[str, Any]] = field(default_factory=list)
    diagnosis: Diagnosis | None = None
    sensitivity: Sensitivity | None = None


def compress(
    net: nn.Module,
    data: Any,
    *,
    family: Family | str = "log_uniform",
    family_args: Mapping[str, Any] | None = None,
    likelihood: Likelihood | str = "categorical",
    example_inputs: Any = None,
    validation: Any = None,
    test: Any = None,
    dense: nn.Module | None = None,
    epochs: int = 60,
    readapt_epochs: int | None = None,
    rounds: int = 1,
    lr: float = 3e-3,
    batch_size: int = 128,
    seed: int = 0,
    temperature: float = 1.0,
    warmup_epochs: int = 0,
    clip_norm: float | None = None,
    autocast: bool = False,
    patience: int | None = None,
    reduction: str | None = None,
    epsilon: float = DEFAULT_EPSILON,
    prior_odds: PriorOdds = "implied",
    max_worse: float = 2.0,
    budget: int | None = None,
    rule: Rule | str | Mapping[str, Any] | None = None,
    round_to: int = 1,
    prune_each_epoch: bool = False,
    keep_weights: KeepWeights = None,
    coarseness: float | None = None,
    support_weight: float = 0.0,
    num_draws: int = 200,
    evidence_rows: int = 1000,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Compress ``net``: fit it with a sparsity prior, remove what the posterior can do without, re-adapt, repeat.

    Args:
        net: the network, trained or not; it is not changed.
        data: training data, a loader or a pair of arrays; decisions use its rows (never ``test``).
        family: sparsity method, an instance or a name.
        family_args: its settings, with a name.
        likelihood: ``categorical``, ``normal`` or ``bernoulli``.
        example_inputs: a batch as the network sees it; the first row of ``data`` if None.
        validation: held-out data for early stopping with ``patience``.
        test: rows for the table, read once at the end.
        dense: the network to compare with in the table; ``net`` itself if None.
        epochs: epochs of the first fit.
        readapt_epochs: epochs after each cut; a quarter of ``epochs`` if None, 0 for none.
        rounds: cuts at most, each on the re-adapted network; it stops early when nothing more leaves.
        lr: learning rate of Adam, annealed to zero over each fit (cosine).
        batch_size: for arrays; of all processes together.
        seed: of all randomness.
        temperature: weight of the KL; 1 is the ELBO.
        warmup_epochs: epochs of growing KL weight.
        clip_norm: largest gradient norm.
        autocast: whether fits compute the network's products in bfloat16.
        patience: epochs without a better validation loss before stopping.
        reduction: reduced prior, or a baseline of the family; its default reduction if None.
        epsilon: largest negligible share of a layer's input.
        prior_odds: ``implied``, ``learned``, a probability, or ``none`` for the bare Bayes factor.
        max_worse: standard errors by which the reduced ELPD may fall short.
        budget: largest number of parameters, zeros included.
        rule: one of ``pyrobc.rules`` or several composed, or its name and settings (``make_rule``), in place of the
            default one, which ``prior_odds``, ``max_worse`` and ``budget`` describe.
        round_to: channels that each block keeps a multiple of, 8 for most hardware.
        prune_each_epoch: whether groups leave after every epoch of the first fit already, by the score alone; the rest
            of the fit then costs what the smaller network costs.
        keep_weights: weights and biases that stay inside what the groups keep: a number, a share of the parameters of
            ``net`` between 0 and 1, ``"odds"`` for all that posterior odds keep, or None to delete none.
        coarseness: step of the grids that the numbers then move to, in posterior standard deviations, about 1 (fine) to
            4 (coarse); None for no grids.
        support_weight: of a prior that learns where weights are and lets those amid others stay, between 0 and 1:
            masks become cheaper, at some cost in accuracy where what is needed lies anywhere; 0 leaves it out.
        num_draws: posterior draws for the evidence.
        evidence_rows: training rows it looks at; its cost is draws times rows times the networks on the path.
        device: where to compute.
        dtype: floating-point type.
        output: directory for checkpoints; an interrupted call resumes from it.
        progress: show progress bars.
    """
    check_settings(
        epochs=epochs, seed=seed, lr=lr, temperature=temperature, warmup_epochs=warmup_epochs, clip_norm=clip_norm,
        batch_size=batch_size, patience=patience, validation=validation, autocast=autocast, device=device, dtype=dtype,
    )  # fmt: skip
    check_kind(net, nn.Module, "network", "a torch.nn.Module", "pass the network itself, not its class or name")
    chosen = make_family(family, **dict(family_args or {}))
    by = None if rule is None else make_rule(rule)
    check_decision(
        chosen, by, reduction=reduction, epsilon=epsilon, prior_odds=prior_odds, max_worse=max_worse, budget=budget,
        round_to=round_to, num_draws=num_draws, evidence_rows=evidence_rows, readapt_epochs=readapt_epochs,
        rounds=rounds, prune_each_epoch=prune_each_epoch, keep_weights=keep_weights,
    )  # fmt: skip
    check_thinning(chosen, keep_weights, coarseness, support_weight, readapt_epochs)
    law, team = make_likelihood(likelihood), find_team()
    progress = progress and team.is_first
    loader = as_loader(data, batch_size=batch_size)
    count_rows(loader)
    anchor = next(iter(net.parameters()))
    first_inputs, first_targets = first_batch(as_loader(data, batch_size=batch_size, shuffle=False))
    example = move(_first_row(first_inputs) if example_inputs is None else example_inputs, anchor)
    check_batch(first_inputs, first_targets, example)
    model = lift(net, chosen, law, example)
    for rows in (validation, test):
        if rows is not None:
            check_rows(rows, net, law.check, example)
    settings: dict[str, Any] = {
        "seed": seed, "lr": lr, "temperature": temperature, "clip_norm": clip_norm, "device": device,
        "dtype": dtype, "autocast": autocast, "progress": progress, "validation": validation, "patience": patience,
    }  # fmt: skip
    pruning = PruneEachEpoch(reduction, prior_odds, epsilon) if prune_each_epoch else None
    posterior = fit(
        model,
        loader,
        epochs=epochs,
        schedule=anneal(epochs),
        warmup_epochs=warmup_epochs,
        checkpoint=_checkpoint(output, 0),
        prune=pruning,
        **settings,
    )
    readapt = epochs // 4 if readapt_epochs is None else readapt_epochs
    history = list(posterior.history)
    steps: list[tuple[Score, Evidence]] = []
    plan = pruning.plan if pruning else None
    compact = posterior.to_module()
    for cut in range(1, rounds + 1):
        scored = score(posterior, reduction, epsilon=epsilon, seed=seed)
        checked = evidence(
            posterior,
            scored,
            loader,
            prior_odds=prior_odds if by is None else None,
            num_draws=num_draws,
            max_rows=evidence_rows,
            seed=seed,
            progress=progress,
        )
        step = decide(scored, checked, by, prior_odds=prior_odds, max_worse=max_worse, budget=budget, round_to=round_to)
        step = team.agree(step)
        if not steps:
            sensitivity = measure_sensitivity(posterior, scored, checked, by or PosteriorOdds(prior_odds), seed=seed)
        steps.append((scored, checked))
        plan = step if plan is None else plan.then(step)
        compact = apply(step, posterior, example_inputs=move(example, posterior.model.anchor))
        if step.parameters[0] == step.parameters[1]:
            break
        posterior = posterior.restricted({name: np.asarray(groups) for name, groups in step.kept().items()})
        if readapt:
            posterior = fit(
                posterior.model,
                loader,
                epochs=readapt,
                schedule=anneal(readapt),
                guide=posterior.guide,
                checkpoint=_checkpoint(output, cut),
                **settings,
            )
            history += posterior.history
            compact = posterior.to_module()
    if keep_weights is not None or coarseness is not None:
        posterior = thin(
            posterior, loader, keep_weights=keep_weights, coarseness=coarseness, support_weight=support_weight,
            dense_parameters=cast(Plan, plan).parameters[0], epochs=max(1, readapt),
            folder=None if output is None else Path(output) / "checkpoints" / "weights", settings=settings,
        )  # fmt: skip
        history += posterior.history
        asked = {"keep_weights": keep_weights, "coarseness": coarseness, "support_weight": support_weight}
        plan = team.agree(record_thinning(cast(Plan, plan), model.spec, posterior, asked))
        compact = posterior.to_module()
    result = Result(compact, cast(Plan, plan), posterior, *steps[0], history, example, dense=dense or net)
    result.sensitivity = sensitivity
    if test is not None and team.is_first:
        result.table = compare({"dense": result.dense, "compact": compact}, test, likelihood)
        result.table[0]["is_as_given"] = dense is None
        if law.name == "categorical" and first_tensor(first_inputs).is_floating_point():
            result.diagnosis = diagnose(result.dense, compact, test)
    return result


def _checkpoint(output: str | Path | None, number: int) -> Path | None:
    return None if output is None else Path(output) / "checkpoints" / f"fit_{number}.pt"


def _first_row(inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return inputs[:1]
    if isinstance(inputs, Mapping):
        return {key: value[:1] for key, value in inputs.items()}
    return tuple(value[:1] for value in inputs)
