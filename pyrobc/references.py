"""What to cite beside the family's own papers: the methods that a run used."""

from __future__ import annotations

from pyrobc.family import Reference
from pyrobc.plan import Plan

__all__ = ["list_references"]

_PYRO = Reference(
    "bingham2019pyro",
    "Bingham, Eli and Chen, Jonathan P. and Jankowiak, Martin and Obermeyer, Fritz and Pradhan, Neeraj and Karaletsos, "
    "Theofanis and Singh, Rohit and Szerlip, Paul and Horsfall, Paul and Goodman, Noah D.",
    "Pyro: Deep Universal Probabilistic Programming", 2019, "Journal of Machine Learning Research 20(28)",
)  # fmt: skip
_REDUCTION = Reference(
    "friston2018bmr", "Friston, Karl and Parr, Thomas and Zeidman, Peter", "Bayesian model reduction", 2018,
    "arXiv:1805.07092",
)  # fmt: skip
_EVIDENCE = (
    Reference(
        "vehtari2024psis",
        "Vehtari, Aki and Simpson, Daniel and Gelman, Andrew and Yao, Yuling and Gabry, Jonah",
        "Pareto Smoothed Importance Sampling", 2024, "Journal of Machine Learning Research 25(72)",
    ),
    Reference(
        "magnusson2019loo",
        "Magnusson, M{\\aa}ns and Andersen, Michael Riis and Jonasson, Johan and Vehtari, Aki",
        "Bayesian Leave-One-Out Cross-Validation for Large Data", 2019, "ICML",
    ),
    Reference(
        "kumar2019arviz", "Kumar, Ravin and Carroll, Colin and Hartikainen, Ari and Martin, Osvaldo",
        "ArviZ: a unified library for exploratory analysis of Bayesian models in Python", 2019,
        "Journal of Open Source Software 4(33)",
    ),
)  # fmt: skip
_RULES = {
    "Predictive(": Reference(
        "breiman1984cart", "Breiman, Leo and Friedman, Jerome H. and Olshen, Richard A. and Stone, Charles J.",
        "Classification and Regression Trees", 1984, "Wadsworth",
    ),
    "FalsePruneRate(": Reference(
        "newton2004fdr",
        "Newton, Michael A. and Noueiry, Amine and Sarkar, Deepayan and Ahlquist, Paul",
        "Detecting differential gene expression with a semiparametric hierarchical mixture method", 2004,
        "Biostatistics 5(2)",
    ),
    "HighestDensity(": Reference(
        "kruschke2018rope", "Kruschke, John K.",
        "Rejecting or accepting parameter values in Bayesian estimation", 2018,
        "Advances in Methods and Practices in Psychological Science 1(2)",
    ),
    "'learned'": Reference(
        "markovic2024bmr", "Markovi{\\'c}, Dimitrije and Friston, Karl and Kiebel, Stefan J.",
        "Bayesian sparsification of deep neural networks with Bayesian model reduction", 2024, "IEEE Access 12",
    ),
}  # fmt: skip
"""By what the rule of a plan says of itself."""

_DIAGNOSIS = (
    Reference(
        "guo2017calibration", "Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.",
        "On Calibration of Modern Neural Networks", 2017, "ICML",
    ),
    Reference(
        "liebenwein2021lost",
        "Liebenwein, Lucas and Baykal, Cenk and Carter, Brandon and Gifford, David and Rus, Daniela",
        "Lost in Pruning: The Effects of Pruning Neural Networks beyond Test Accuracy", 2021, "MLSys",
    ),
)  # fmt: skip


def list_references(plan: Plan, *, has_evidence: bool, has_diagnosis: bool) -> list[str]:
    """BibTeX of the family's papers, of the rule's, and of whatever else the report shows; each once."""
    rule = plan.describe_rule()
    used = [reference for words, reference in _RULES.items() if words in rule]
    if plan.baseline is None:
        used.insert(0, _REDUCTION)
    used += [*(_EVIDENCE if has_evidence else ()), *(_DIAGNOSIS if has_diagnosis else ()), _PYRO]
    return list(dict.fromkeys([*plan.provenance.get("references", []), *(r.bibtex() for r in used)]))
