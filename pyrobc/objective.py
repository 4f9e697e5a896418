r"""The training objective, by roads of which a test holds two equal.

.. math::
    -\mathrm{ELBO}_T = -\frac{N}{B}\sum_{n\in\text{batch}} E_q\ln p(y_n|x_n,\theta) + T \sum_s c_s KL(q_s\|p_s)
    \quad\text{(nats)}

over sites s, with the family's ``kl_weights`` :math:`c_s`: ones, but where a publication weighs otherwise.

The *traced* road is Pyro's ``TraceMeanField_ELBO`` on the lifted model: one global draw a step.  The *fast* road asks
the family for a local draw (noise per example, Normal weights integrated per pre-activation) and adds the same analytic
KLs: the same expectation with less variance and without tracing.  (Where Normal weights are read at several positions
of one example, as by a convolution, local draws leave out correlations between positions.)  A third, which draws no
weights, is in ``pyrobc.moment_loss``; it shares the KLs (``analytic_loss``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from pyrobc.family import Effective
from pyrobc.lift import LiftedModel
from pyrobc.meanfield import MeanFieldGuide

__all__ = ["Loss", "LossFactory", "analytic_loss", "fast_loss", "split_laws", "traced_loss"]

Loss = Callable[[Any, Tensor, float], Tensor]
LossFactory = Callable[[LiftedModel, MeanFieldGuide, int], Loss]
LogLikelihood = Callable[[LiftedModel, Effective, Any, Tensor, Mapping[str, Tensor]], Tensor]
"""``(model, effective, inputs, targets, values of the likelihood's sites) -> nats per row``."""


def fast_loss(model: LiftedModel, guide: MeanFieldGuide, num_data: int) -> Loss:
    """``loss(inputs, targets, temperature)`` in nats, by local draws and analytic KLs."""

    def draw(
        model: LiftedModel, effective: Effective, inputs: Any, targets: Tensor, values: Mapping[str, Tensor]
    ) -> Tensor:
        return model.likelihood.distribution(model.run(effective, inputs).to(model.anchor.dtype), values).log_prob(
            targets
        )

    return analytic_loss(model, guide, num_data, draw)


def analytic_loss(model: LiftedModel, guide: MeanFieldGuide, num_data: int, log_likelihood: LogLikelihood) -> Loss:
    """``loss(inputs, targets, temperature)`` in nats, by analytic KLs and what ``log_likelihood`` says of a batch."""
    priors, weights = model.priors(), model.family.kl_weights(model.spec, num_data)

    def loss(inputs: Any, targets: Tensor, temperature: float) -> Tensor:
        with _in_full(targets.device.type):
            own, extra = split_laws(model, guide.distributions())
            effective = model.family.draw_local(own, model.spec, len(targets))
            scales = {name: law.rsample() for name, law in extra.items()}
            own_kl, extra_kl = model.family.kl(own, priors), _likelihood_kl(extra, priors)
            kls = [value * weights[n] if n in weights else value for n, value in (own_kl | extra_kl).items()]
            kl = torch.stack(kls).sum()
        fit = log_likelihood(model, effective, inputs, targets, scales).sum()
        return temperature * kl - fit * (num_data / len(targets))

    return loss


def _in_full(device: str) -> AbstractContextManager[object]:
    """Draws and divergences keep the parameters' precision where products are autocast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def traced_loss(model: LiftedModel, guide: MeanFieldGuide, num_data: int) -> Loss:
    """The same loss from Pyro's ELBO module, sites traced one by one."""
    model.num_data = num_data
    weights = model.family.kl_weights(model.spec, num_data)
    tempered_model, tempered_guide = _Tempered(model, weights), _Tempered(guide, weights)
    elbo = TraceMeanField_ELBO()(tempered_model, tempered_guide)

    def loss(inputs: Any, targets: Tensor, temperature: float) -> Tensor:
        tempered_model.temperature = tempered_guide.temperature = temperature
        value: Tensor = elbo(inputs, targets)
        return value

    return loss


def split_laws(
    model: LiftedModel, laws: Mapping[str, Distribution]
) -> tuple[dict[str, Distribution], dict[str, Distribution]]:
    """Sites of the family, and sites of the likelihood."""
    extra = model.likelihood.priors(model.anchor)
    return {n: law for n, law in laws.items() if n not in extra}, {n: laws[n] for n in extra}


def _likelihood_kl(laws: Mapping[str, Distribution], priors: Mapping[str, Distribution]) -> dict[str, Tensor]:
    return {name: kl_divergence(law, priors[name]).sum() for name, law in laws.items()}


class _TemperSites(Messenger):
    """Scale the log density of latent sites, each by its weight too, and of nothing that is observed."""

    def __init__(self, temperature: float, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.temperature, self.weights = temperature, weights

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not pyro.poutine.util.site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.temperature * self.weights.get(msg["name"], 1.0)


class _Tempered(nn.Module):
    """A model or guide whose latent sites count ``temperature`` times, besides their own weights."""

    def __init__(self, program: nn.Module, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.program, self.weights = program, weights
        self.temperature = 1.0

    def forward(self, *args: Any) -> Any:
        """Run the program under the messenger."""
        if self.temperature == 1.0 and not self.weights:
            return self.program(*args)
        with _TemperSites(self.temperature, self.weights):
            return self.program(*args)
