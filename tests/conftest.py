"""What every test gets: a known seed, an empty parameter store, and a check that nothing global was left changed."""

import os
import random
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib

import hypothesis
import numpy as np
import pyro
import pytest
import torch

# Deadlines read the clock, and a machine under load would fail them.
# The suite gives the same verdict twice; HYPOTHESIS_PROFILE=explore looks for new examples.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# The networks are tiny: a second thread gains nothing on an idle machine and takes minutes on a busy one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def known_start() -> Iterator[None]:
    """Seed every generator, and start and end with an empty parameter store: no test depends on the order."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries that still draw from the global generator)
    yield
    pyro.clear_param_store()


def global_state() -> dict[str, object]:
    """The process-wide switches that a library must leave as it found them."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "gradients enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "validation of torch distributions": torch.distributions.Distribution._validate_args,
        "pyro settings": pyro.settings.get(),
        "numpy floating-point errors": np.geterr(),
    }


@pytest.fixture(autouse=True, scope="module")
def global_state_is_left_alone() -> Iterator[None]:
    before = global_state()
    yield
    after = global_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"left changed by this module (before, after): {changed}"
