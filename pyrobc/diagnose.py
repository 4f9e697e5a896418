r"""What compression changed besides the error: one battery for the output of any compressor.

With class probabilities p of the network before and :math:`\hat p` of the one after, on the same rows:

* error (share of wrong labels), negative log likelihood :math:`-\ln p_y` (nats a row), Brier score
  :math:`\sum_k (p_k - 1[k=y])^2`, entropy :math:`-\sum_k p_k\ln p_k` (nats), and the expected calibration error: over
  fifteen equal bins of confidence, the mean of |accuracy - confidence| weighted by rows (Guo et al. 2017);
* agreement, the share of rows with the same label, and distance, the mean of :math:`\|\hat p - p\|_2`;
* under a shift D' of the inputs, the excess error
  :math:`[\ell(\hat c, D') - \ell(\hat c, D)] - [\ell(c, D') - \ell(c, D)]`: how much more the compact network suffers
  (Liebenwein et al. 2021); its standard error is that of the mean of the rows' differences;
* prune potential: of several networks after, the largest share of parameters removed whose error is at most
  :math:`\delta = 0.5\%` above that before, on the same shift; its mean and its minimum over shifts say what nominal
  accuracy hides.

References:
    Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks.
    Liebenwein, Baykal, Carter, Gifford, Rus (2021), Lost in pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyrobc.batches import as_loader, move
from pyrobc.calling import call_network, evaluating, first_tensor
from pyrobc.errors import ConfigError, DataError
from pyrobc.shifts import SHIFTS, Shift

__all__ = ["CalibrationBin", "Diagnosis", "Shifted", "diagnose"]

Floats = NDArray[np.float64]
BINS = 15
_SMALLEST = 1e-300  # probability: a zero would make a log likelihood infinite, and so one row rule all


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of similar confidence: their number, mean confidence and accuracy."""

    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Shifted:
    """One shift of the inputs: errors before and after, excess error and its standard error, prune potential."""

    label: str
    before: float
    after: float
    excess: float
    excess_se: float
    potential: float


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` returns.

    Attributes:
        before: error, nll, ece, brier and entropy of the network before.
        after: the same of the network after (of several, the smallest), with its agreement and distance.
        calibration: bins of confidence, before and after.
        shifts: one entry per shift; the first is none.
        removed: share of parameters, zeros not counted, that the network after lacks.
        left_out: shifts that do not fit the inputs.
        delta: rise of the error that prune potential allows.
    """

    before: dict[str, float]
    after: dict[str, float]
    calibration: tuple[tuple[CalibrationBin, ...], tuple[CalibrationBin, ...]]
    shifts: tuple[Shifted, ...]
    removed: float
    left_out: tuple[str, ...]
    delta: float

    @property
    def mean_potential(self) -> float:
        """Prune potential, mean over shifts, that without a shift left aside."""
        return float(np.mean([shift.potential for shift in self.shifts[1:] or self.shifts]))

    @property
    def min_potential(self) -> float:
        """Prune potential under the worst shift."""
        return min(shift.potential for shift in self.shifts)

    def to_frame(self) -> Any:
        """The shifts as a pandas table."""
        import pandas as pd

        return pd.DataFrame([vars(shift) for shift in self.shifts]).set_index("label")

    def to_markdown(self) -> str:
        """Both tables, for a terminal or a page."""
        lines = ["| measure | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {self.before[name]:.4g} | {self.after[name]:.4g} |" for name in self.before]
        lines += [f"| {name} | | {self.after[name]:.4g} |" for name in self.after if name not in self.before]
        lines += [
            "",
            "| inputs | error before | error after | excess error | prune potential |",
            "|---|---|---|---|---|",
        ]
        for s in self.shifts:
            excess = f"{s.excess:+.2%} \u00b1 {s.excess_se:.2%}"
            lines.append(f"| {s.label} | {s.before:.2%} | {s.after:.2%} | {excess} | {s.potential:.1%} |")
        lines += [
            "",
            f"Prune potential at {self.delta:.1%}: mean {self.mean_potential:.1%}, minimum {self.min_potential:.1%}.",
        ]
        return "\n".join(lines + ([f"Left out: {', '.join(self.left_out)}."] if self.left_out else []))


def diagnose(
    before: nn.Module,
    after: nn.Module | Sequence[nn.Module],
    data: Any,
    *,
    shifts: Sequence[Shift] = SHIFTS,
    delta: float = 0.005,
) -> Diagnosis:
    """Compare a network with what became of it, on rows of class labels and on shifted copies of them.

    Args:
        before: the network before.
        after: the network after, or several of different sizes, for the prune potential.
        data: rows, a loader or a pair of arrays; diagnosing decides nothing, so test rows are fit for it.
        shifts: changes of the inputs; those that do not fit (rotating what is no image) are left out by name.
        delta: rise of the error that prune potential allows.

    Raises:
        ConfigError: no network after, or networks of other outputs.
        DataError: targets are not class labels.
    """
    networks = [before, *([after] if isinstance(after, nn.Module) else after)]
    if len(networks) < 2:
        raise ConfigError("networks after", got="none", allowed="one or more", fix="pass the compact network")
    sizes = [sum(int((p != 0).sum()) for p in net.parameters()) for net in networks]
    removed = [1 - size / sizes[0] for size in sizes[1:]]
    last = int(np.argmax(removed)) + 1
    batches = list(as_loader(data, batch_size=1024, shuffle=False))
    probabilities = [_predict(net, batches, None) for net in networks]
    labels = _gather_labels(batches, probabilities)
    wrong = _find_wrong(probabilities, labels)
    first = first_tensor(batches[0][0])
    fitting = [shift for shift in shifts if shift.fits(first)]
    rows = [_compare_errors("none", wrong, wrong, removed, last, delta)]
    for shift in fitting:
        shifted = _find_wrong([_predict(net, batches, shift) for net in networks], labels)
        rows.append(_compare_errors(shift.label, shifted, wrong, removed, last, delta))
    p, q = probabilities[0], probabilities[last]
    return Diagnosis(
        before=_describe(p, labels),
        after=_describe(q, labels) | {
            "agreement": float((p.argmax(1) == q.argmax(1)).mean()),
            "distance": float(np.linalg.norm(p - q, axis=1).mean()),
        },
        calibration=(_bin_confidence(p, labels), _bin_confidence(q, labels)),
        shifts=tuple(rows),
        removed=removed[last - 1],
        left_out=tuple(shift.label for shift in shifts if shift not in fitting),
        delta=delta,
    )  # fmt: skip


@torch.no_grad()
def _predict(net: nn.Module, batches: Sequence[Any], change: Callable[[Tensor], Tensor] | None) -> Floats:
    """Class probabilities ``[rows, classes]``, float64; of a single logit, those of zero and one."""
    anchor, parts = next(iter(net.parameters())), []
    with evaluating(net):
        for batch in batches:
            inputs = batch[0] if change is None else _change(batch[0], change)
            outputs = first_tensor(call_network(net, move(inputs, anchor))).double()
            if outputs.dim() == 1 or outputs.shape[1] == 1:
                outputs = torch.stack([torch.zeros_like(outputs.flatten()), outputs.flatten()], 1)
            parts.append(outputs.softmax(1).cpu().numpy())
    return np.concatenate(parts)


def _change(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The first tensor of the inputs changed; the others are left."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        name = next(iter(inputs))
        return {**inputs, name: change(inputs[name])}
    return (change(inputs[0]), *inputs[1:])


def _gather_labels(batches: Sequence[Any], probabilities: Sequence[Floats]) -> NDArray[np.int64]:
    labels = torch.cat([torch.as_tensor(batch[1]).cpu() for batch in batches]).flatten()
    classes = {p.shape[1] for p in probabilities}
    if len(classes) > 1:
        raise ConfigError(
            "networks to compare", got=f"{sorted(classes)} classes", allowed="as many classes in all",
            fix="pass the network that was compressed, and what became of it",
        )  # fmt: skip
    whole = labels.round().long()
    if (
        len(whole) != len(probabilities[0])
        or bool((whole != labels).any())
        or not 0 <= int(whole.min()) <= int(whole.max()) < max(classes)
    ):
        raise DataError(
            "targets to diagnose", got="numbers that are no class labels of the network's outputs",
            allowed="one whole number a row, from 0 to the number of classes less one",
            fix="use pyrobc.compare for regressions",
        )  # fmt: skip
    return np.asarray(whole.numpy())


def _find_wrong(probabilities: Sequence[Floats], labels: NDArray[np.int64]) -> Floats:
    """One where the label is wrong: ``[networks, rows]``."""
    return np.stack([p.argmax(1) != labels for p in probabilities]).astype(np.float64)


def _compare_errors(
    label: str, shifted: Floats, plain: Floats, removed: Sequence[float], last: int, delta: float
) -> Shifted:
    errors = shifted.mean(1)
    excess = (shifted[last] - plain[last]) - (shifted[0] - plain[0])
    potential = max(
        (r for r, error in zip(removed, errors[1:], strict=True) if error - errors[0] <= delta), default=0.0
    )
    se = float(excess.std() / math.sqrt(len(excess)))
    return Shifted(label, float(errors[0]), float(errors[last]), float(excess.mean()), se, max(0.0, potential))


def _describe(p: Floats, labels: NDArray[np.int64]) -> dict[str, float]:
    log_p = np.log(np.maximum(p, _SMALLEST))
    hit = np.eye(p.shape[1])[labels]
    bins = _bin_confidence(p, labels)
    return {
        "error": float((p.argmax(1) != labels).mean()),
        "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
        "ece": sum(b.rows * abs(b.accuracy - b.confidence) for b in bins) / len(labels),
        "brier": float(((p - hit) ** 2).sum(1).mean()),
        "entropy": float(-(p * log_p).sum(1).mean()),
    }


def _bin_confidence(p: Floats, labels: NDArray[np.int64]) -> tuple[CalibrationBin, ...]:
    """Bins that hold rows, from the least confident on."""
    confidence, hit = p.max(1), p.argmax(1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return tuple(
        CalibrationBin(int((place == b).sum()), float(confidence[place == b].mean()), float(hit[place == b].mean()))
        for b in range(BINS)
        if (place == b).any()
    )
