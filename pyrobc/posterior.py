"""A fitted network: the posterior of its sites, its seed, and what can be drawn or read from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrobc.batches import move, seeded
from pyrobc.calling import evaluating
from pyrobc.family import Effective, GroupScale, Laws
from pyrobc.groups import GroupSpec, Kept
from pyrobc.lift import LiftedModel
from pyrobc.lifted_layers import LiftedLayer
from pyrobc.meanfield import MeanFieldGuide, slice_site
from pyrobc.negligible import find_sizes, negligible_thresholds
from pyrobc.objective import split_laws

__all__ = ["Posterior", "measure_input_rms"]

_Answer = TypeVar("_Answer")


@dataclass
class Posterior:
    """The fitted guide of a lifted model.

    Attributes:
        model: the lifted model; its batch-norm statistics are those of the fit.
        guide: the law of every site.
        num_data: rows of the training data.
        seed: seed of the fit.
        history: one dict of numbers per epoch.
        input_rms: root mean square of every input channel of every layer on training data, by weight path.
    """

    model: LiftedModel
    guide: MeanFieldGuide
    num_data: int
    seed: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    input_rms: Mapping[str, Tensor] = field(default_factory=dict)

    def laws(self) -> dict[str, Distribution]:
        """The posterior law of every site."""
        return self.guide.distributions()

    def mean(self) -> Effective:
        """Posterior mean of gates and parameters."""
        with torch.no_grad():
            own, _ = split_laws(self.model, self.laws())
            return self.model.complete(self.model.family.mean(own, self.model.spec))

    def scales(self) -> dict[str, GroupScale]:
        """Posterior and prior law of every group's multiplier, in float64."""
        return self._ask(self.model.family.scales)

    def presence(self) -> dict[str, GroupScale]:
        """The same of what reductions act on: the multiplier, or whether the group is there."""
        return self._ask(self.model.family.presence)

    def weight_log_odds(self) -> dict[str, Tensor]:
        """Log odds that each weight is zero, by parameter, where the family knows; float64."""
        return self._ask(lambda laws, _, spec: self.model.family.weight_log_odds(laws, spec))

    def _ask(self, question: Callable[[Laws, Laws, GroupSpec], dict[str, _Answer]]) -> dict[str, _Answer]:
        with torch.no_grad():
            priors = self.model.family.prior(self.model.spec, self.model.anchor.double())
            return question(_PreciseLaws(self.model, self.guide), priors, self.model.spec)

    def thresholds(self, epsilon: float) -> dict[str, Tensor]:
        """Multiplier below which each group carries less than a share ``epsilon`` of what its readers receive."""
        scales = self.presence()
        priors = {name: scale.prior for name, scale in scales.items()}
        return negligible_thresholds(self.model.spec, self.mean(), self.input_rms, epsilon, priors, find_sizes(scales))

    def to_module(self) -> nn.Module:
        """A plain network at the posterior mean, gates folded into weights; nothing is pruned yet."""
        return self.model.to_module(self.mean())

    @torch.no_grad()
    def draw(self, seed: int) -> dict[str, Tensor]:
        """One joint draw of all sites."""
        with seeded(seed):
            return {name: law.sample() for name, law in self.laws().items()}

    @torch.no_grad()
    def predict(self, inputs: Any, values: Mapping[str, Tensor], kept: Kept) -> Distribution:
        """Law of every row's target for drawn sites, with removed groups' gates at zero."""
        spec = self.model.spec
        effective = self.model.family.combine(values, spec)
        gates = {
            b.name: effective.gates[b.name] * _kept_mask(kept[b.name], effective.gates[b.name]) for b in spec.blocks
        }
        with evaluating(self.model):
            outputs = self.model.run(replace(effective, gates=gates), move(inputs, self.model.anchor))
        return self.model.likelihood.distribution(outputs, values)

    @torch.no_grad()
    def log_likelihood(self, inputs: Any, targets: Tensor, values: Mapping[str, Tensor], kept: Kept) -> Tensor:
        """Log likelihood of every row in nats for drawn sites, with removed groups' gates at zero."""
        return self.predict(inputs, values, kept).log_prob(move(targets, self.model.anchor))

    @torch.no_grad()
    def predictions(self, inputs: Any, draws: Sequence[Mapping[str, Tensor]], kept: Kept) -> Iterator[Distribution]:
        """``predict`` for many draws, one after the other, on the cut network: the cost falls with its size."""
        spec = self.model.spec
        if spec.emptied(kept):  # a layer without channels can be masked, not cut
            yield from (self.predict(inputs, values, kept) for values in draws)
            return
        small = Posterior(self.model.restricted(kept), self.guide, self.num_data)
        everything, indices = small.model.spec.everything(), spec.kept_indices(kept)
        for values in draws:
            left = {site: slice_site(site, value, spec, kept, indices) for site, value in values.items()}
            yield small.predict(inputs, left, everything)

    def copy(self) -> Posterior:
        """One that can be fitted further without changing this one: its prior and batch-norm statistics are its own."""
        model, guide = copy.deepcopy(self.model), copy.deepcopy(self.guide)
        twin = Posterior(model, guide, self.num_data, self.seed, list(self.history))
        twin.input_rms = self.input_rms
        return twin

    def to(self, device: str | torch.device) -> Posterior:
        """A copy on another device."""
        twin = self.copy()
        twin.model, twin.guide = twin.model.to(device), twin.guide.to(device)
        twin.input_rms = {name: rms.to(device) for name, rms in self.input_rms.items()}
        return twin

    def restricted(self, kept: Kept) -> Posterior:
        """The posterior of the smaller network, with removed groups' factors sliced away, ready to be re-adapted."""
        guide = self.guide.restricted(self.model.spec, kept)
        small = Posterior(self.model.restricted(kept), guide, self.num_data, self.seed, list(self.history))
        indices = self.model.spec.kept_indices(kept)
        small.input_rms = {
            name: rms[torch.as_tensor(indices[name, 1])] if (name, 1) in indices else rms
            for name, rms in self.input_rms.items()
        }
        return small


@torch.no_grad()
def measure_input_rms(model: LiftedModel, mean: Effective, loader: Any, max_rows: int = 10_000) -> dict[str, Tensor]:
    """Root mean square of every input channel of every layer of the mean network, before its gate."""
    power: dict[str, Tensor] = {}
    rows = 0

    def hook(path: str) -> Any:
        def record(layer: LiftedLayer, args: tuple[Tensor, ...]) -> None:
            h = args[0] if layer.select is None else args[0].index_select(-1, layer.select)
            channel = 1 if layer.convolution is not None else h.dim() - 1
            axes = [a for a in range(h.dim()) if a != channel]
            weight = f"{path}.weight" if path else "weight"
            total = h.double().square().mean(axes) * h.shape[0]
            power[weight] = power.get(weight, torch.zeros_like(total)) + total

        return record

    handles = [m.register_forward_pre_hook(hook(p)) for p, m in model.net.named_modules() if isinstance(m, LiftedLayer)]
    try:
        with evaluating(model):
            for batch in loader:
                model.run(mean, move(batch[0], model.anchor))
                rows += len(batch[1])
                if rows >= max_rows:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / rows).sqrt() for name, total in power.items()}


def _kept_mask(kept: Any, like: Tensor) -> Tensor:
    mask = torch.zeros_like(like)
    mask[torch.as_tensor(kept, device=like.device)] = 1
    return mask


class _PreciseLaws(Mapping[str, Distribution]):
    """Laws of the family's sites in float64, each made when it is asked for: weights are many, and seldom asked for."""

    def __init__(self, model: LiftedModel, guide: MeanFieldGuide) -> None:
        others = model.likelihood.priors(model.anchor)
        self.factors = {site: factor for site, factor in guide.by_site().items() if site not in others}

    def __getitem__(self, site: str) -> Distribution:
        return copy.deepcopy(self.factors[site]).double().requires_grad_(False).distribution()

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)
