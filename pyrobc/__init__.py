"""Bayesian compression of neural networks in Pyro, driven by Bayesian model reduction.

    import pyrobc as bc

    result = bc.compress(net, (x, y), test=(x_test, y_test))
    bc.save(result.net, result.plan, "run/")

Everything is imported on first use, so ``import pyrobc`` is quick.  Several public functions share their name with the
module that holds them (``lift``, ``fit``, ``evidence``, ``decide``, ``compress``); the attribute is the function,
whatever was imported first, and ``from pyrobc.lift import ...`` reaches the module.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pyrobc._version import __version__

if TYPE_CHECKING:
    from pyrobc import bits as bits
    from pyrobc import bmr as bmr
    from pyrobc import codec as codec
    from pyrobc import dists as dists
    from pyrobc import errors as errors
    from pyrobc import families as families
    from pyrobc import guides as guides
    from pyrobc import models as models
    from pyrobc import rules as rules
    from pyrobc.compare import compare as compare
    from pyrobc.compress import Result as Result
    from pyrobc.compress import compress as compress
    from pyrobc.decide import decide as decide
    from pyrobc.density import TargetDensity as TargetDensity
    from pyrobc.diagnose import Diagnosis as Diagnosis
    from pyrobc.diagnose import diagnose as diagnose
    from pyrobc.evidence import Evidence as Evidence
    from pyrobc.evidence import evidence as evidence
    from pyrobc.evidence_file import read_evidence as read_evidence
    from pyrobc.export import load as load
    from pyrobc.export import save as save
    from pyrobc.family import Family as Family
    from pyrobc.fit import fit as fit
    from pyrobc.folding import fold_scales as fold_scales
    from pyrobc.gridding import move_to_grid as move_to_grid
    from pyrobc.levels import add_levels as add_levels
    from pyrobc.lift import lift as lift
    from pyrobc.likelihoods import Bernoulli as Bernoulli
    from pyrobc.likelihoods import Categorical as Categorical
    from pyrobc.likelihoods import Normal as Normal
    from pyrobc.moment_loss import MomentLoss as MomentLoss
    from pyrobc.plan import Plan as Plan
    from pyrobc.plan import read_plan as read_plan
    from pyrobc.posterior import Posterior as Posterior
    from pyrobc.predictive import keep_covariance as keep_covariance
    from pyrobc.predictive import propagate as propagate
    from pyrobc.pruning import PruneEachEpoch as PruneEachEpoch
    from pyrobc.pruning import prune_in_steps as prune_in_steps
    from pyrobc.report import compression_table as compression_table
    from pyrobc.report import report_run as report_run
    from pyrobc.report import write_report as write_report
    from pyrobc.rewinding import rewind as rewind
    from pyrobc.scores import Score as Score
    from pyrobc.scores import score as score
    from pyrobc.sparsify import sparsify as sparsify
    from pyrobc.surgery import apply as apply
    from pyrobc.weights import prune_weights as prune_weights
    from pyrobc.weights import score_weights as score_weights

_PUBLIC = {
    "Bernoulli": "likelihoods", "Categorical": "likelihoods", "Diagnosis": "diagnose", "Evidence": "evidence",
    "Family": "family", "MomentLoss": "moment_loss", "Normal": "likelihoods", "Plan": "plan",
    "Posterior": "posterior", "PruneEachEpoch": "pruning", "Result": "compress", "Score": "scores",
    "TargetDensity": "density", "add_levels": "levels", "apply": "surgery", "compare": "compare",
    "compress": "compress", "compression_table": "report", "decide": "decide", "diagnose": "diagnose",
    "evidence": "evidence", "fit": "fit", "fold_scales": "folding", "keep_covariance": "predictive", "lift": "lift",
    "load": "export", "move_to_grid": "gridding", "propagate": "predictive", "prune_in_steps": "pruning",
    "prune_weights": "weights", "read_evidence": "evidence_file", "read_plan": "plan",
    "report_run": "report", "rewind": "rewinding", "save": "export", "score": "scores", "score_weights": "weights",
    "sparsify": "sparsify", "write_report": "report",
}  # fmt: skip
_PACKAGES = ("bits", "bmr", "codec", "dists", "errors", "families", "guides", "models", "rules")

__all__ = ["__version__", *_PUBLIC, *_PACKAGES]  # noqa: PLE0604  (checked by a test)

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and not Path(__file__).with_name("models").is_dir():
    __path__.append(str(_root))  # a checkout that lost its links: models and guides lie beside this package


class _Facade(ModuleType):
    """Keeps a public function under its name when the module of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"pyrobc.{_PUBLIC[name]}"), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"pyrobc.{name}")
    else:
        from pyrobc.errors import suggest

        raise AttributeError(f"pyrobc has no attribute {name!r}; {suggest(name, __all__)}")
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Facade
