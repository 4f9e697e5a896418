"""Bayesian model reduction: price simpler models through a change of prior, without refitting."""

# The modules of closed forms register them on import.
from pyrobc.bmr import gamma, interval, log_normal, matrix_normal, normal, point, simplex, truncated  # noqa: F401
from pyrobc.bmr.multivariate_normal import delete
from pyrobc.bmr.registry import Reduction, reduce, register_reduction, registered_triples

__all__ = ["Reduction", "delete", "reduce", "register_reduction", "registered_triples"]
