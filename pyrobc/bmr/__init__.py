"""Bayesian model reduction: price simpler models through a change of prior, without refitting."""

from pyrobc.bmr import interval, normal, point, truncated  # noqa: F401  (their closed forms register on import)
from pyrobc.bmr.multivariate_normal import delete
from pyrobc.bmr.registry import Reduction, reduce, register_reduction, registered_triples

__all__ = ["Reduction", "delete", "reduce", "register_reduction", "registered_triples"]
