r"""A compression recipe without a posterior: prune by magnitude and input, fine-tune, learn a grid; the competitor.

It ends where Bayesian compression ends, at a plain compact network for ``pyrobc.codec.encode(order_units(net))``, and
is put together from what is known to work:

1. *Dense*: Adam with dropped inputs, an L1 penalty (Han et al. 2015) and a group lasso on what each unit feeds (Wen et
   al. 2016).
2. *Trunk*: pruning along the cubic schedule of Zhu and Gupta (2017).  A weight's score is :math:`|w|` times the root
   mean square of its input (Sun et al. 2023), a bias's its magnitude, ranked over all layers.  A unit without inputs is
   a constant, which moves into its readers' biases; it goes, as do units and pixels without readers, and the layers are
   cut to what is left, with Adam's moments.
3. *Fine-tuning*: a side branch at each level, at a falling rate, with L1 and without dropout; the trunk goes on from
   the weights before it.
4. *Grid* (Han et al. 2016; Esser et al. 2020): straight-through training on multiples of one step for each tensor.
   Steps start as the squared gradients demand (Choi et al. 2017): proportional to their inverse root mean square over
   the tensor, so that a step costs about the same loss everywhere; and are learned slowly.  A *dead zone*
   around zero and L1 delete weights while it lasts; at ``frozen_from`` of the epochs the zeros are made final and units
   that died are cut, so that what is trained in the end is to the last bit what is returned.

The numbers in ``Settings`` were chosen on 5,000 validation images of MNIST's training images, LeNet-300-100, seed 0; no
test image was read.  What gained: longer pruning (20 epochs a level for 12); no dropout but L1 in fine-tuning; on the
grid L1, slower weights and slower steps; steps of a third to a half of the weights' size, not of 0.7 or more; steps by
gradients, not by the weights' root mean square alone.  What did not: scores by squared gradients, scores divided by the
price of a weight in the file, a trunk rate of 8e-3, more epochs on the grid at a rate of 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._sparse_network import SparseNetwork
from pyrobc.checkpoint import write_atomically
from pyrobc.codec import decode, encode, order_units

__all__ = ["LEVELS", "Settings", "run_recipe"]

LEVELS = (0.0225, 0.015, 0.0105, 0.0075, 0.0053, 0.0037)
"""Shares of all numbers that are kept, for LeNet-300-100."""
_PRUNINGS_APART = 50
_LAST_RATE = 2e-5
_SCORED_ROWS = 4000
_POOL = 3_000_000


@dataclass(frozen=True)
class Settings:
    """What was chosen on validation rows; rates are Adam's."""

    batch: int = 128
    drop: float = 0.2  # of inputs, in the dense network and the trunk
    l1: float = 2e-5
    group_lasso: float = 1e-4
    dense_epochs: int = 8
    dense_rate: float = 1e-3
    first_epochs: int = 40  # to the first level
    level_epochs: int = 20  # to each further one
    ramp: float = 0.75  # share of these epochs in which pruning goes on; then the rate falls
    trunk_rate: float = 4e-3
    tune_epochs: int = 16
    tune_rate: float = 2e-3
    tune_l1: float = 3e-5
    grid_epochs: int = 24
    grid_rate: float = 5e-4
    grid_l1: float = 3e-5
    step_rate: float = 5e-5
    grids: tuple[float, ...] = (0.5, 0.35)  # mean step over the root mean square of the weights; a network for each
    dead_zone: float = 0.2
    frozen_from: float = 0.6


def run_recipe(
    net: nn.Sequential, train: tuple[Tensor, Tensor], *, levels: Sequence[float] = LEVELS, seed: int,
    settings: Settings | None = None, folder: str | Path | None = None,
) -> Iterator[tuple[str, nn.Sequential]]:  # fmt: skip
    """Compress to each level in turn.

    Args:
        net: initialised linear and convolutional layers with ReLU, max pooling, flatten between; it is not changed.
        train: inputs in [0, 1] and classes.
        levels: shares of all weights and biases to keep, falling.
        seed: of batches and dropout; the weights come with ``net``.
        settings: others than the chosen ones.
        folder: where each finished level is kept as ``level_k.pt`` (0: dense) and read instead of made again; use one
            for each seed and settings.

    Yields:
        Name of the level and grid, and the compact network in the order of units that codes shorter.
    """
    s = settings or Settings()
    state, data = SparseNetwork(net), _Data(train, seed, s)
    dense_count = state.count()
    for number, level in enumerate([1.0, *levels]):
        path = None if folder is None else Path(folder) / f"level_{number}.pt"
        if path is not None and path.exists():
            stored = torch.load(path, weights_only=True)
            state.load(stored["trunk"])
            yield from ((name, decode(bytes(code.tolist()))) for name, code in stored["nets"].items())
            continue
        generator = torch.Generator().manual_seed(1000 * seed + number)
        nets = {}
        if number == 0:
            data.train(state, s.dense_epochs, generator, s.dense_rate, constant=1.0, l1=s.l1, lasso=s.group_lasso)
        else:
            epochs = s.first_epochs if number == 1 else s.level_epochs
            _thin(state, data, round(level * dense_count), epochs, s, generator)
            side = state.copy()
            data.train(side, s.tune_epochs, generator, s.tune_rate, l1=s.tune_l1, is_dropping=False)
            for factor in s.grids:
                nets[f"{level:.2%} step {factor:g}"] = order_units(_put_on_grid(side, data, factor, s, generator))
        if path is not None:
            codes = {k: torch.tensor(list(encode(n)[0]), dtype=torch.uint8) for k, n in nets.items()}
            checkpoint = {"trunk": state.state(), "nets": codes}
            write_atomically(path, lambda p, checkpoint=checkpoint: torch.save(checkpoint, p))
        yield from nets.items()


class _Data:
    """Training rows, cut to the pixels that are read, and the steps of Adam on them."""

    def __init__(self, train: tuple[Tensor, Tensor], seed: int, settings: Settings) -> None:
        (self.x, self.y), self.batch = train, settings.batch
        kept = torch.rand(_POOL + 2 * self.x[: self.batch].numel(), generator=torch.Generator().manual_seed(seed))
        self.pool = (kept >= settings.drop).float() / (1 - settings.drop)  # a slice is cheaper than new random numbers
        self.pixels: Tensor | None = None
        self.cut = self.x

    def select(self, pixels: Tensor | None) -> Tensor:
        """All rows as a network of these pixels reads them."""
        if pixels is not None and (self.pixels is None or not torch.equal(self.pixels, pixels)):
            self.pixels, self.cut = pixels, self.x.flatten(1)[:, pixels].contiguous()
        return self.cut

    def count_steps(self, epochs: int) -> int:
        """Steps in so many epochs."""
        return epochs * math.ceil(len(self.y) / self.batch)

    def train(
        self, state: SparseNetwork, epochs: int, generator: torch.Generator, rate: float, *, constant: float = 0.0,
        l1: float = 0.0, lasso: float = 0.0, is_dropping: bool = True,
        before: Callable[[int, float], None] = lambda k, f: None, after: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Train; the rate falls after the share ``constant`` of the steps; ``after`` takes over the gradients."""
        k, total = 0, self.count_steps(epochs)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.y), generator=generator).split(self.batch):
                before(k, k / total)
                x = self.select(state.pixels)[rows]
                if is_dropping:
                    start = int(torch.randint(_POOL, (), generator=generator))
                    x = x * self.pool[start : start + x.numel()].view_as(x)
                tensors = state.tensors
                for tensor in tensors:
                    tensor.grad = None
                F.cross_entropy(state.net(x), self.y[rows]).backward()
                falling = 1.0 if k < constant * total else (1 - k / total) / (1 - constant)
                for group in state.adam.param_groups:
                    group["lr"] = group.get("factor", 1.0) * max(rate * falling, _LAST_RATE)
                if after is None:
                    _add_penalties(tensors[::2], state.units, l1, lasso)
                    state.adam.step()
                    state.project()
                else:
                    after()
                    state.adam.step()
                k += 1


@torch.no_grad()
def _add_penalties(weights: list[Tensor], units: list[int], l1: float, lasso: float) -> None:
    for w, n in zip(weights, units, strict=False):
        assert w.grad is not None
        if l1:
            w.grad.add_(w.sign(), alpha=l1)
        if lasso:
            columns = w.view(len(w), n, -1)
            norms = (columns.square().sum((0, 2), keepdim=True) + 1e-12).sqrt()
            w.grad.view(columns.shape).add_(columns / norms, alpha=lasso)


def _thin(state: SparseNetwork, data: _Data, count: int, epochs: int, s: Settings, generator: torch.Generator) -> None:
    """The trunk to its next level."""
    start, ramp = state.count(), int(s.ramp * data.count_steps(epochs))
    every = max(1, min(_PRUNINGS_APART, ramp // 20))

    def prune(k: int, _: float) -> None:
        if k == ramp or (k < ramp and k % every == 0):
            scores = state.score(data.select(state.pixels)[:_SCORED_ROWS])
            state.prune(int(count + (start - count) * (1 - k / ramp) ** 3), scores)

    data.train(state, epochs, generator, s.trunk_rate, constant=s.ramp, l1=s.l1, lasso=s.group_lasso, before=prune)


@torch.no_grad()
def _find_steps(state: SparseNetwork, factor: float) -> Tensor:
    """A step for each tensor: ``factor`` times the weights' root mean square in the geometric mean over weights."""
    counts = torch.stack([m.sum() for m in state.masks]).clamp(min=1.0)
    squares = torch.stack([t.square().sum() for t in state.tensors]) / counts
    gradients = [m["exp_avg_sq"] for m in state.moments()]
    curvature = torch.stack([(g * m).sum() for g, m in zip(gradients, state.masks, strict=True)])
    steps = (curvature / counts + 1e-12).rsqrt()
    ratio = (squares[::2].sqrt() / steps[::2]).clamp(min=1e-12).log()
    return factor * steps * ((counts[::2] * ratio).sum() / counts[::2].sum()).exp()


def _put_on_grid(
    side: SparseNetwork, data: _Data, factor: float, s: Settings, generator: torch.Generator
) -> nn.Sequential:
    """The compact network on a grid; ``side`` stays as it is."""
    state = side.copy()
    sizes = [t.numel() for t in state.tensors]
    values = torch.cat([t.detach().flatten() for t in state.tensors])
    for tensor, part in zip(state.tensors, values.split(sizes), strict=True):
        tensor.data = part.view_as(tensor)  # what is written to ``values`` is in the network
    latents, integers = values.clone(), values.clone()
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    masks, steps, is_final = torch.cat([m.flatten() for m in state.masks]), _find_steps(side, factor), False
    groups = [{"params": [latents]}, {"params": [steps], "factor": s.step_rate / s.grid_rate}]
    state.adam = torch.optim.Adam(groups, fused=True)

    @torch.no_grad()
    def quantise() -> None:
        used = steps.half().float()[owner]  # the file holds steps of 16 bits in fewer bytes
        torch.div(latents.abs(), used, out=integers).add_(0.5 - s.dead_zone).floor_().clamp_(min=float(is_final))
        integers.mul_(latents.sign()).mul_(masks)
        torch.mul(integers, used, out=values)

    @torch.no_grad()
    def before(_: int, done: float) -> None:
        nonlocal is_final, masks
        quantise()
        if not is_final and done >= s.frozen_from:
            old = values.clone()
            state.masks = [(t != 0).to(t) for t in state.tensors]
            state.kill_units()
            masks, is_final = torch.cat([m.flatten() for m in state.masks]), True
            latents.add_(values - old).mul_(masks)
            quantise()

    @torch.no_grad()
    def after() -> None:
        gradient = torch.cat([t.grad.flatten() for t in state.tensors]).mul_(masks)
        steps.grad = torch.stack([part.sum() for part in (gradient * integers).split(sizes)])
        latents.grad = gradient.add_(latents.sign(), alpha=s.grid_l1)

    data.train(state, s.grid_epochs, generator, s.grid_rate, is_dropping=False, before=before, after=after)
    quantise()
    return state.export()
