r"""One number per group, with its unit, its error and where it came from.

The default score is the log Bayes factor of a reduced prior on the group's multiplier (``bmr.reduce``).  A published
score that is no change of prior (``Family.baselines``) has no odds: it is compared with a cut per block (``gap``).

What a decision needs besides is kept with a log Bayes factor: for a reduction to an event :math:`I` (a ROPE),

.. math::
    \Delta F = \ln Q(I) - \ln P(I), \qquad \Delta F_c = \ln\frac{1-Q(I)}{1-P(I)},
    \qquad \text{implied prior log odds} = \ln\frac{P(I)}{1-P(I)},

so that posterior log odds are :math:`L = \Delta F - \Delta F_c + \ln\frac{\pi}{1-\pi}`, which for the implied
:math:`\pi = P(I)` is :math:`\ln\frac{Q(I)}{1-Q(I)}`.  A point reduction excludes nothing:
:math:`\Delta F_c = 0`, and it implies no odds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrobc._version import __version__
from pyrobc.baselines import Cut, list_baselines, measure_baseline, place_cuts
from pyrobc.bmr import learn_inclusion, reduce
from pyrobc.calling import first_tensor
from pyrobc.dists import interval_log_mass
from pyrobc.errors import ReductionError, suggest
from pyrobc.family import GroupScale, ReducedPrior
from pyrobc.groups import GroupSpec
from pyrobc.kinds import check_kind
from pyrobc.negligible import DEFAULT_EPSILON
from pyrobc.posterior import Posterior

__all__ = ["Score", "score"]

Floats = NDArray[np.float64]
_SMALLEST_LOG_MASS = -700.0
PriorOdds = Literal["implied", "learned", "none"] | float


@dataclass(frozen=True)
class Score:
    """Log Bayes factors of all groups, by block, in nats; larger says prune.  Or a baseline's numbers in their unit.

    Attributes:
        label: the reduction, or the baseline.
        delta_f: log evidence gained by the reduction, NaN where undefined; of a baseline, its own number.
        complement: log evidence gained by excluding what the reduction keeps (zero for a point).
        implied: prior log odds of the reduction under the full prior; NaN for a point.
        mcse: Monte Carlo standard error of ``delta_f``.
        threshold: multiplier below which the group is negligible.
        mean_scale: posterior mean of the multiplier.
        reasons: why entries are undefined, by block.
        epsilon: largest share of the next layer's input that is negligible.
        spec: the groups scored.
        provenance: where the posterior came from, for plans.
        unit: of ``delta_f``.
        cuts: of a baseline, the number by block above which a group is pruned, NaN where there is none; else None.
    """

    label: str
    delta_f: Mapping[str, Floats]
    complement: Mapping[str, Floats]
    implied: Mapping[str, Floats]
    mcse: Mapping[str, Floats]
    threshold: Mapping[str, Floats]
    mean_scale: Mapping[str, Floats]
    reasons: Mapping[str, str]
    epsilon: float
    spec: GroupSpec
    provenance: Mapping[str, Any]
    unit: str = "nats"
    direction: str = "larger prunes"
    cuts: Mapping[str, float] | None = None

    @property
    def default_odds(self) -> PriorOdds:
        """Prior odds where none are asked for: ``implied``, or ``learned`` where the reduction has no prior mass."""
        return "learned" if all(np.isnan(value).all() for value in self.implied.values()) else "implied"

    def log_odds(self, prior_odds: PriorOdds = "implied") -> dict[str, Floats]:
        """Posterior log odds that each group is negligible; of a baseline, how far it lies above its cut.

        Args:
            prior_odds: ``implied`` by the sparsity prior, ``learned`` per block (Beta-Bernoulli inclusion rate with a
                uniform prior, Markovic, Friston and Kiebel 2024), a fixed prior probability of the reduced model, or
                ``none``: the bare log Bayes factor against the full prior, as publications decide.  A baseline takes
                none of them.
        """
        if self.cuts is not None:
            if prior_odds != "implied":
                raise ReductionError(
                    f"prior odds for the baseline {self.label!r}", got=repr(prior_odds),
                    allowed="none: it is no log Bayes factor, and is compared with its cut", fix="leave prior_odds out",
                )  # fmt: skip
            return {b: values - self.cuts[b] for b, values in self.delta_f.items()}
        if prior_odds == "none":
            return dict(self.delta_f)
        evidence = {b: self.delta_f[b] - self.complement[b] for b in self.delta_f}
        if prior_odds == "implied":
            if any(np.isnan(self.implied[b]).all() for b in evidence):
                raise ReductionError(
                    f"prior odds for the reduction {self.label!r}",
                    got="'implied'",
                    allowed="'learned' or a probability: a point has no prior mass under the full prior",
                    fix="pass prior_odds='learned'",
                )
            return {b: value + self.implied[b] for b, value in evidence.items()}
        if prior_odds == "learned":
            return {b: value + _learn_log_odds(value) for b, value in evidence.items()}
        if isinstance(prior_odds, str) or not 0 < prior_odds < 1:
            raise ReductionError(
                "prior odds", got=repr(prior_odds), allowed="'implied', 'learned', 'none', or a probability",
                fix="pass 0.5",
            )  # fmt: skip
        return {b: value + np.log(prior_odds) - np.log1p(-prior_odds) for b, value in evidence.items()}

    def to_frame(self) -> Any:
        """A pandas table, one row per group."""
        import pandas as pd

        odds = self.log_odds() if not all(np.isnan(v).all() for v in self.implied.values()) else self.log_odds(0.5)
        names = ("delta_f", "log_odds") if self.cuts is None else (self.label, "above_cut")
        columns = {
            names[0]: self.delta_f,
            "mcse": self.mcse,
            names[1]: odds,
            "threshold": self.threshold,
            "mean_scale": self.mean_scale,
        }
        data = {key: np.concatenate([value[b.name] for b in self.spec.blocks]) for key, value in columns.items()}
        return pd.DataFrame(data, index=pd.Index(self.spec.labels(), name="group"))


def score(
    posterior: Posterior,
    reduction: str | None = None,
    *,
    epsilon: float = DEFAULT_EPSILON,
    cut: Cut = "gap",
    num_draws: int = 1000,
    seed: int = 0,
) -> Score:
    """Score every group's removal through a change of prior on its multiplier, or by a published baseline.

    Args:
        posterior: what ``fit`` returned.
        reduction: label of one of the family's reduced priors, or of a baseline; its default reduction if None.
        epsilon: largest share of the next layer's input that a negligible group may carry.
        cut: of a baseline: ``gap``, ``published``, a number, or numbers by block.
        num_draws: draws where no closed form exists.
        seed: their seed.
    """
    check_kind(posterior, Posterior, "posterior", "what bc.fit returns", "pass bc.fit(model, data)")
    family, spec = posterior.model.family, posterior.model.spec
    label = reduction or family.default_reduction
    choices, baselines = family.reduced(), list_baselines(family)
    if label in baselines and label not in choices:
        return _score_baseline(posterior, label, cut, epsilon)
    if label not in choices:
        known = [*choices, *baselines]
        raise ReductionError(
            f"reduction for family {family.name!r}",
            got=repr(label),
            allowed=", ".join(known) or "none: its groups are decided already",
            fix=suggest(label, known) if known else "use score_weights for single weights",
        )
    generator = torch.Generator().manual_seed(seed)
    thresholds = posterior.thresholds(epsilon)
    columns: dict[str, dict[str, Floats]] = {k: {} for k in ("delta_f", "complement", "implied", "mcse")}
    reasons: dict[str, str] = {}
    scales = posterior.presence()
    for block in spec.blocks:
        scale, threshold = scales[block.name], thresholds[block.name].double()
        reduced = choices[label].of(scale.prior, threshold)
        result = reduce(scale.posterior, scale.prior, reduced, num_draws=num_draws, generator=generator)
        complement, implied = _odds_parts(scale, choices[label], threshold)
        values = (result.delta_f, complement, implied, result.mcse)
        for key, value in zip(columns, values, strict=True):
            columns[key][block.name] = _to_array(value, block.size)
        reasons |= {block.name: result.reason} if result.reason else {}
    return Score(
        label=label,
        delta_f=columns["delta_f"],
        complement=columns["complement"],
        implied=columns["implied"],
        mcse=columns["mcse"],
        threshold={b: _to_array(t, len(t)) for b, t in thresholds.items()},
        mean_scale={b: _to_array(s.posterior.mean, spec.block(b).size) for b, s in scales.items()},
        reasons=reasons,
        epsilon=epsilon,
        spec=spec,
        provenance=_provenance(posterior),
    )


def _score_baseline(posterior: Posterior, label: str, cut: Cut, epsilon: float) -> Score:
    """A baseline's numbers and their cuts; no Monte Carlo error, no odds, no ROPE."""
    spec, scales, thresholds = posterior.model.spec, posterior.presence(), posterior.thresholds(epsilon)
    measured = measure_baseline(posterior, label)
    cuts = place_cuts(measured, label, cut)
    zero = {name: np.zeros_like(numbers) for name, numbers in measured.values.items()}
    return Score(
        label=label,
        delta_f=measured.values,
        complement=zero,
        implied=zero,
        mcse=zero,
        threshold={b: _to_array(t, len(t)) for b, t in thresholds.items()},
        mean_scale={b: _to_array(s.posterior.mean, spec.block(b).size) for b, s in scales.items()},
        reasons={name: place.reason for name, place in cuts.items() if place.reason},
        epsilon=epsilon,
        spec=spec,
        provenance=_provenance(posterior),
        unit=measured.unit,
        cuts={name: place.cut for name, place in cuts.items()},
    )


def _odds_parts(scale: GroupScale, reduction: ReducedPrior, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Log evidence of the complement of the reduction's event, and the event's prior log odds."""
    if reduction.event is None:
        return torch.zeros_like(threshold), torch.full_like(threshold, torch.nan)
    lower, upper = reduction.event(threshold)
    log_p = interval_log_mass(scale.prior, lower, upper)
    log_p_out, log_q_out = (_log_mass_outside(law, lower, upper) for law in (scale.prior, scale.posterior))
    return log_q_out - log_p_out, log_p - log_p_out


def _log_mass_outside(law: Any, lower: Tensor, upper: Tensor) -> Tensor:
    """Log mass outside an interval, not below that of the smallest number: surer than that says nothing more."""
    above = interval_log_mass(law, upper, torch.full_like(upper, torch.inf))
    outside = torch.logaddexp(interval_log_mass(law, torch.full_like(lower, -torch.inf), lower), above)
    return outside.clamp_min(_SMALLEST_LOG_MASS)


def _learn_log_odds(evidence: Floats) -> float:
    """Learned prior log odds of the reduced model, nats; zero where nothing is defined."""
    prices = torch.as_tensor(evidence)
    if not bool((~prices.isnan() & (prices < torch.inf)).any()):
        return 0.0
    return -float(learn_inclusion(prices, max_steps=100_000).log_odds)


def _to_array(value: Tensor, size: int) -> Floats:
    return value.detach().double().cpu().expand(size).numpy().copy()


def _provenance(posterior: Posterior) -> dict[str, Any]:
    model = posterior.model
    example = first_tensor(model.example_inputs)
    return {
        "family": model.family.name,
        "settings": model.family.settings(),
        "likelihood": model.likelihood.name,
        "seed": posterior.seed,
        "epochs": len(posterior.history),
        "num_data": posterior.num_data,
        "temperature": posterior.history[-1]["temperature"] if posterior.history else 1.0,
        "kl_weights": dict(model.family.kl_weights(model.spec, posterior.num_data)),
        "input_shape": list(example.shape[1:]),
        "versions": {"pyrobc": __version__} | {p: version(p) for p in ("torch", "pyro-ppl", "numpy")},
        "references": [r.bibtex() for r in model.family.references],
    }
