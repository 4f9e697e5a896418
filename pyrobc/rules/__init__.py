"""Decision rules: prune, keep or abstain for every group, each with its reason; ``&`` and ``|`` compose them.

plan = bc.decide(score, evidence, bc.rules.PosteriorOdds() & bc.rules.FalsePruneRate(0.05))

``make_rule`` reads the same from a run file, ``{all: [posterior_odds, {false_prune_rate: {level: 0.05}}]}``.
"""

from pyrobc.rules.budget import Budget
from pyrobc.rules.false_prune import FalsePruneRate
from pyrobc.rules.interval import HighestDensity
from pyrobc.rules.odds import BeyondCut, PosteriorOdds
from pyrobc.rules.predictive import Predictive
from pyrobc.rules.registry import make_rule
from pyrobc.rules.rule import OnScore, Rule, Verdict

__all__ = [
    "BeyondCut",
    "Budget",
    "FalsePruneRate",
    "HighestDensity",
    "OnScore",
    "PosteriorOdds",
    "Predictive",
    "Rule",
    "Verdict",
    "make_rule",
]
