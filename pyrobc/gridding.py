r"""A posterior whose means lie on grids as coarse as its own uncertainty, trained as the coded file will hold them.

**Steps.** Rounding to a step :math:`\Delta` moves a mean by an error of variance :math:`\Delta^2/12`, and so the
posterior by :math:`\tfrac1{24}\sum_i \Delta^2/s_i^2` nats, while each weight's code shortens by one bit as the step
doubles (Gish and Pierce 1968).  With one multiplier of the rate for all tensors the cheapest steps have the same
:math:`\Delta^2\,\overline{1/s^2}`:

.. math:: \Delta_l = \kappa\,\Big(\frac1{n_l}\sum_{i\text{ kept}} s_i^{-2}\Big)^{-1/2},

``coarseness`` :math:`\kappa` posterior standard deviations, the harmonic mean being ruled by the weights that are known
best: the posterior says how many bits each tensor deserves, and one number trades bytes for accuracy.

**Training.** A mean is :math:`\Delta\,\mathrm{sign}(\theta)\lfloor|\theta|/\Delta + \tfrac12 - \delta\rfloor`:
thresholds lie a little further out than half way, as smaller integers have shorter codes (Sullivan 1996).  The noise of
the posterior stays, gradients pass the rounding unchanged to :math:`\theta` (straight through; Bengio, Leonard and
Courville 2013) and exactly to :math:`\Delta`, which goes on learning, slowly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyrobc.errors import ConfigError
from pyrobc.folding import check_folded, find_normals
from pyrobc.meanfield import Factor, MeanFieldGuide, NormalFactor
from pyrobc.posterior import Posterior

__all__ = ["GridFactor", "move_to_grid", "read_steps"]

_STEP_LR = 0.06
"""Learning rate of a step, in units of that of a weight: it sums the gradients of hundreds."""
_DEAD_ZONE = 0.2
"""How much further out than half way thresholds lie, in steps."""


class GridFactor(NormalFactor):
    """Normals whose means are multiples of a learned step.

    Args:
        start: the Normals to move; deleted entries stay deleted.
        step: distance of neighbouring means.
    """

    unsliced = ("log_step",)

    def __init__(self, start: NormalFactor, step: float) -> None:
        super().__init__(start.loc, 0.0, start.max_scale)
        self.log_scale = nn.Parameter(start.log_scale.detach().clone())
        self.log_step = nn.Parameter(start.loc.new_tensor(math.log(step)))
        self.lr_scale = start.lr_scale
        self.keep_(start.kept)

    @property
    def step(self) -> Tensor:
        """The step as a file holds it."""
        return _to_half(self.log_step.exp())

    def mean(self) -> Tensor:
        """On the grid; the gradient reaches the latent means as if they were not rounded."""
        step, loc = self.step, self.loc.detach()
        integers = (loc.abs() / step.detach() + (0.5 - _DEAD_ZONE)).floor() * loc.sign()
        return integers * step + (self.loc - loc)

    def parameters_by_rate(self) -> dict[float, list[nn.Parameter]]:
        """The step learns slowly."""
        return {self.lr_scale: [self.loc, self.log_scale], self.lr_scale * _STEP_LR: [self.log_step]}


@torch.no_grad()
def move_to_grid(posterior: Posterior, coarseness: float, bias_coarseness: float | None = None) -> Posterior:
    """Put the means of weights and biases on grids; the network is then ready to be fitted again.

    Args:
        posterior: folded; not changed.
        coarseness: step in posterior standard deviations, about 1 (fine) to 4 (coarse).
        bias_coarseness: that of biases; the same if None.
    """
    biases = coarseness if bias_coarseness is None else bias_coarseness
    if not (0 < coarseness < math.inf and 0 < biases < math.inf):
        raise ConfigError(
            "coarseness of the grid", got=f"{coarseness} and {bias_coarseness}", allowed="positive numbers",
            fix="pass 2.0, and less for a finer grid",
        )  # fmt: skip
    check_folded(posterior)
    moved = posterior.copy()
    factors: dict[str, Factor] = dict(moved.guide.by_site())
    for name, factor in find_normals(moved).items():
        is_bias = moved.model.spec.parameters[name].kind == "bias"
        factors[name] = GridFactor(factor, (biases if is_bias else coarseness) * _typical_width(factor))
    moved.guide = MeanFieldGuide(factors)
    return moved


@torch.no_grad()
def read_steps(posterior: Posterior) -> dict[str, float]:
    """The step of every tensor on a grid, for ``codec.pack``."""
    return {n: float(f.step) for n, f in posterior.guide.by_site().items() if isinstance(f, GridFactor)}


def _typical_width(factor: NormalFactor) -> float:
    """Harmonic root mean square of the standard deviations of what is kept; one where nothing is."""
    if not bool(factor.kept.any()):
        return 1.0
    return float((-2 * factor.log_scale.double()[factor.kept]).exp().mean() ** -0.5)


def _to_half(value: Tensor) -> Tensor:
    """The nearest positive float16, which costs two bytes in a file; its gradient is that of the number itself."""
    fixed = value.detach().clamp(2.0**-24, torch.finfo(torch.float16).max)
    return value + (fixed.half().to(value) - value.detach())
