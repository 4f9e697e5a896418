"""Distributions that Pyro lacks, their log-space numerics and their Kullback-Leibler divergences."""

from pyrobc.dists.binary_chain import BinaryChain, Rates, count_bits, fit_chain
from pyrobc.dists.chained_student_t import ChainedStudentT, SupportedNormal
from pyrobc.dists.gamma_pair import FactorisedPair, GammaPair
from pyrobc.dists.gamma_ratio_root import GammaRatioRoot
from pyrobc.dists.gated_normal import GatedNormal
from pyrobc.dists.half_cauchy_product import HalfCauchyProduct
from pyrobc.dists.interval import interval_log_mass
from pyrobc.dists.log_normal_kl import kl_log_normal_gamma, kl_log_normal_inverse_gamma
from pyrobc.dists.matrix_normal import MatrixNormal
from pyrobc.dists.precision import in_double
from pyrobc.dists.pruned_normal import PrunedNormal
from pyrobc.dists.restricted import Restricted
from pyrobc.dists.scale_free import ScaleFree
from pyrobc.dists.soft_capped import SoftCapped
from pyrobc.dists.spike_and_slab import SpikeAndSlab
from pyrobc.dists.switch import Switch
from pyrobc.dists.truncated_log_normal import TruncatedLogNormal
from pyrobc.dists.truncated_log_uniform import TruncatedLogUniform
from pyrobc.dists.uniform_scale_normal import UniformScaleNormal

__all__ = [
    "BinaryChain",
    "ChainedStudentT",
    "FactorisedPair",
    "GammaPair",
    "GammaRatioRoot",
    "GatedNormal",
    "HalfCauchyProduct",
    "MatrixNormal",
    "PrunedNormal",
    "Rates",
    "Restricted",
    "ScaleFree",
    "SoftCapped",
    "SpikeAndSlab",
    "SupportedNormal",
    "Switch",
    "TruncatedLogNormal",
    "TruncatedLogUniform",
    "UniformScaleNormal",
    "count_bits",
    "fit_chain",
    "in_double",
    "interval_log_mass",
    "kl_log_normal_gamma",
    "kl_log_normal_inverse_gamma",
]
