"""Distributions that Pyro lacks, their log-space numerics and their Kullback-Leibler divergences."""

from pyrobc.dists.half_cauchy_product import HalfCauchyProduct
from pyrobc.dists.interval import interval_log_mass
from pyrobc.dists.log_normal_kl import kl_log_normal_gamma, kl_log_normal_inverse_gamma
from pyrobc.dists.matrix_normal import MatrixNormal
from pyrobc.dists.precision import in_double
from pyrobc.dists.pruned_normal import PrunedNormal
from pyrobc.dists.restricted import Restricted
from pyrobc.dists.scale_free import ScaleFree
from pyrobc.dists.soft_capped import SoftCapped
from pyrobc.dists.truncated_log_normal import TruncatedLogNormal
from pyrobc.dists.truncated_log_uniform import TruncatedLogUniform

__all__ = [
    "HalfCauchyProduct",
    "MatrixNormal",
    "PrunedNormal",
    "Restricted",
    "ScaleFree",
    "SoftCapped",
    "TruncatedLogNormal",
    "TruncatedLogUniform",
    "in_double",
    "interval_log_mass",
    "kl_log_normal_gamma",
    "kl_log_normal_inverse_gamma",
]
