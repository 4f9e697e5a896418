"""The importance ratio of the evidence against the densities of the sites themselves."""

import numpy as np
import pytest
import torch
from pyro.distributions import Delta
from torch import nn

from pyrobc.coverage import log_ratio
from pyrobc.family import families
from pyrobc.lift import lift
from pyrobc.posterior import Posterior


@pytest.mark.parametrize("likelihood", ["categorical", "normal", "bernoulli"])
@pytest.mark.parametrize("family", list(families()))
def test_log_ratio_is_that_of_the_sites(family, likelihood):
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model = lift(net, family, likelihood, torch.randn(2, 4))
    posterior = Posterior(model, model.new_guide(), num_data=10)
    draws = [posterior.draw(seed) for seed in range(4)]
    priors, laws = model.priors(), posterior.laws()
    with torch.no_grad():
        points = {name for name, law in laws.items() if isinstance(law, Delta)}
        from_peaks = sum(  # a point has no entropy: its log prior counts from its peak
            float(priors[name].log_prob(laws[name].v) - priors[name].log_prob(priors[name].base_dist.mode))
            if not priors[name].base_dist.event_shape
            else 0.0
            for name in points
        )
        expected = [
            sum(
                float(priors[name].log_prob(values[name]) - law.log_prob(values[name]))
                for name, law in laws.items()
                if name not in points
            )
            + from_peaks
            for values in draws
        ]
    np.testing.assert_allclose(log_ratio(posterior, draws, model.spec.everything()), expected, rtol=1e-4)
