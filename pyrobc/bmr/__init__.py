"""Bayesian model reduction: price simpler models through a change of prior, without refitting."""

# The modules of closed forms register them on import.
from pyrobc.bmr import gamma, interval, log_normal, matrix_normal, normal, point, simplex, truncated  # noqa: F401
from pyrobc.bmr.averaging import ModelAverage, average_models, compute_inclusion, weigh_models
from pyrobc.bmr.deletions import Deletions
from pyrobc.bmr.iterate import IteratedReduction, reduce_iteratively
from pyrobc.bmr.multivariate_normal import delete
from pyrobc.bmr.registry import Reduction, reduce, register_reduction, registered_triples
from pyrobc.bmr.score import score
from pyrobc.bmr.search import Search, search_best_first, search_exhaustively, search_greedily, search_in_stages
from pyrobc.bmr.sparsity import (
    HorseshoeFit,
    LearnedInclusion,
    fit_horseshoe,
    learn_inclusion,
    learn_log_odds,
    optimise_reduced,
)
from pyrobc.bmr.table import ScoreTable

__all__ = [
    "Deletions",
    "HorseshoeFit",
    "IteratedReduction",
    "LearnedInclusion",
    "ModelAverage",
    "Reduction",
    "ScoreTable",
    "Search",
    "average_models",
    "compute_inclusion",
    "delete",
    "fit_horseshoe",
    "learn_inclusion",
    "learn_log_odds",
    "optimise_reduced",
    "reduce",
    "reduce_iteratively",
    "register_reduction",
    "registered_triples",
    "score",
    "search_best_first",
    "search_exhaustively",
    "search_greedily",
    "search_in_stages",
    "weigh_models",
]
