"""All subset evidences of the diabetes regression: Bayesian model reduction from one fit against exact refits.

Ten predictors give 1,024 models.  Both sides are timed in one run, alternating, on one thread; medians of the rounds.
Two refits are timed: the package's own (:func:`pyrobc.models.regression.fit_linear`, which returns the posterior), and
the leanest we can write (normal equations in NumPy, evidence only).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

from benchmarks._record import write_result
from pyrobc.bmr import Deletions, search_exhaustively
from pyrobc.models.regression import LinearRegression, fit_linear

ROUNDS = 7
NOISE = 0.7  # residual standard deviation, in units of the response's


def load() -> tuple[Tensor, Tensor]:
    """Standardised predictors (442, 10) and response (442,)."""
    data = load_diabetes()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    y = (data.target - data.target.mean()) / data.target.std()
    return torch.tensor(x), torch.tensor(y)


def reduce_all(model: LinearRegression, x: Tensor, y: Tensor) -> Tensor:
    """Log evidence of every subset, from one fit."""
    fit = model.fit_exactly(x, y)
    search = search_exhaustively(Deletions(fit.weights, model.prior(x.shape[1]), noise=fit.noise))
    return fit.log_evidence + search.delta_f


def refit_all(model: LinearRegression, x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """Log evidence of every subset, refitted; the empty one keeps a column of zeros, which changes nothing."""
    columns = [x[:, row] if row.any() else torch.zeros(len(y), 1, dtype=x.dtype) for row in kept]
    return torch.stack([model.fit_exactly(column, y).log_evidence for column in columns])


def refit_leanly(x: np.ndarray, y: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Log evidence of every subset by normal equations, unit prior variance, known noise."""
    evidences = []
    for row in kept:
        columns = x[:, row]
        factor = np.linalg.cholesky(np.eye(columns.shape[1]) + columns.T @ columns / NOISE**2)
        projected = np.linalg.solve(factor, columns.T @ y / NOISE**2)
        quadratic = y @ y / NOISE**2 - projected @ projected
        log_det = np.log(np.diag(factor)).sum()
        evidences.append(-0.5 * len(y) * math.log(2 * math.pi * NOISE**2) - log_det - 0.5 * quadratic)
    return np.array(evidences)


def time_once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    x, y = load()
    codes = torch.arange(1024)
    kept = torch.stack([(codes >> bit) & 1 == 0 for bit in range(10)], dim=1)
    known = LinearRegression(noise=NOISE)
    unknown = LinearRegression(noise=dist.Gamma(*torch.tensor([1.0, 0.5], dtype=torch.float64)))
    errors = [float((reduce_all(m, x, y) - refit_all(m, x, y, kept)).abs().max()) for m in (known, unknown)]
    lean = torch.tensor(refit_leanly(x.numpy(), y.numpy(), kept.numpy()))
    lean_error = float((reduce_all(known, x, y) - lean).abs().max())

    generator = np.random.default_rng(0)
    wide = torch.tensor(generator.normal(size=(300, 16)))
    response = wide[:, :4].sum(1) + torch.tensor(generator.normal(size=300))
    prior = dist.MultivariateNormal(torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64))
    sixteen = fit_linear(wide, response, prior, 1.0)
    calls: dict[str, Callable[[], object]] = {
        "reduce": lambda: reduce_all(known, x, y),
        "refit": lambda: refit_all(known, x, y, kept),
        "lean": lambda: refit_leanly(x.numpy(), y.numpy(), kept.numpy()),
        "sixteen": lambda: search_exhaustively(Deletions(sixteen.weights, prior)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds[name].append(time_once(call))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio, lean_ratio = median["refit"] / median["reduce"], median["lean"] / median["reduce"]
    rows = [
        {"what": "1,024 subsets, known noise, max abs error against refits", "value": errors[0], "unit": "nats"},
        {"what": "1,024 subsets, unknown noise, max abs error against refits", "value": errors[1], "unit": "nats"},
        {"what": "the same (known noise) against lean refits", "value": lean_error, "unit": "nats"},
        {"what": "1,024 subsets by reduction, the one fit included", "value": 1e3 * median["reduce"], "unit": "ms"},
        {"what": "1,024 exact refits", "value": 1e3 * median["refit"], "unit": "ms"},
        {"what": "exact refits / reduction", "value": ratio, "unit": "x"},
        {"what": "lean refits (evidence only) / reduction", "value": lean_ratio, "unit": "x"},
        {"what": "16 predictors, 65,536 models", "value": median["sixteen"], "unit": "s"},
    ]
    targets = ["<= 1e-9", "<= 1e-9", "<= 1e-9", "", "", ">= 100", "", "<= 2"]
    for row, target in zip(rows, targets, strict=True):
        sign, _, limit = target.partition(" ")
        is_met = {"": None, "<=": row["value"] <= float(limit or 0), ">=": row["value"] >= float(limit or 0)}[sign]
        row |= {"target": target or "none", "met": {None: "", True: "yes", False: "NO"}[is_met]}
    notes = (__doc__ or "").split("\n\n")[0] + " Medians of " + str(ROUNDS) + " alternating rounds, one thread."
    write_result("bmr_diabetes", rows, seeds=[0], notes=notes)


if __name__ == "__main__":
    main()
