r"""What a rule is, and how two of them make one.

A rule looks at scores, and at evidence where it needs some, and answers prune, keep or abstain for every group, with
the reason in words and numbers.  Abstaining keeps the group and is counted.  With keep < abstain < prune,

.. math:: (a \,\&\, b)_g = \min(a_g, b_g), \qquad (a \,|\, b)_g = \max(a_g, b_g):

``a & b`` prunes where both prune and keeps where either keeps; ``a | b`` prunes where either prunes and keeps where
both keep; otherwise both abstain.  This is Kleene's three-valued logic of "is negligible", with abstain for unknown, so
that the order of rules and brackets changes no outcome.  The reason names both.

References:
    Kleene (1952), Introduction to metamathematics, section 64: strong three-valued connectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrobc.errors import ConfigError, DataError
from pyrobc.groups import Ints
from pyrobc.kinds import check_kind
from pyrobc.outcomes import Outcomes
from pyrobc.scores import Score

__all__ = ["NestedEvidence", "Odds", "OnScore", "Rule", "Verdict", "check_setting", "demand_evidence", "is_prior_odds"]

Odds = Mapping[str, NDArray[np.float64]]
"""Log odds of being negligible, or distances above a cut, by block."""

_RANK = {"keep": 0, "abstain": 1, "prune": 2}


class NestedEvidence(Protocol):
    """What decisions read of the evidence."""

    @property
    def candidates(self) -> Sequence[Any]:
        """The nested path, the full network among it."""

    @property
    def order(self) -> Ints:
        """Groups from first to leave to last."""

    @property
    def method(self) -> str:
        """How the predictive density was estimated."""

    @property
    def posterior_khat(self) -> float:
        """k-hat of the guide against the posterior."""

    @property
    def good_k(self) -> float:
        """Its limit."""

    @property
    def gain(self) -> float:
        """ELPD of the full network minus that of a predictor that does not read the inputs, nats."""

    @property
    def gain_se(self) -> float:
        """Its standard error."""

    def hdi(self, probability: float) -> NDArray[np.float64]:
        """Highest-density interval of every multiplier, ``[groups, 2]``, in the order of ``spec.labels()``."""


@dataclass(frozen=True)
class Verdict:
    """What a rule says.

    Attributes:
        outcomes: prune, keep or abstain with the reason, for every group of every block.
        log_odds: what ranks the groups, least needed highest.
        notes: what a reader should know.
        checked: the evidence that was used.
    """

    outcomes: Outcomes
    log_odds: Odds
    notes: tuple[str, ...] = ()
    checked: Mapping[str, Any] = field(default_factory=dict)


class Rule(ABC):
    """One way to decide.  Its ``repr`` goes into the plan."""

    name: ClassVar[str] = ""

    @abstractmethod
    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        """An outcome and its reason for every group."""

    def check(self, label: str, is_baseline: bool) -> None:  # noqa: B027  (most rules take any score)
        """Raise a ``ReductionError`` where a score of this kind says nothing to the rule."""

    def parts(self) -> tuple[Rule, ...]:
        """The rules that it is made of."""
        return (self,)

    def title(self) -> str:
        """Which rule spoke, for the reasons of a composed one; empty where the reason says so itself."""
        return self.name

    def on(self, score: Score) -> Rule:
        """This rule on a score of its own (another epsilon, a baseline) wherever it is used."""
        return OnScore(self, score)

    def __and__(self, other: Rule) -> Rule:
        return _Composed(self, _check_rule(other), "&", min)

    def __or__(self, other: Rule) -> Rule:
        return _Composed(self, _check_rule(other), "|", max)


@dataclass(frozen=True)
class _Composed(Rule):
    first: Rule
    second: Rule
    sign: str
    choose: Callable[..., str]

    def check(self, label: str, is_baseline: bool) -> None:
        for rule in (self.first, self.second):
            rule.check(label, is_baseline)

    def parts(self) -> tuple[Rule, ...]:
        return self.first.parts() + self.second.parts()

    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        one, two = (rule.judge(score, evidence) for rule in (self.first, self.second))
        outcomes = {
            block: [
                (self.choose(a[0], b[0], key=_RANK.__getitem__), f"{self._say(0, a)} {self.sign} {self._say(1, b)}")
                for a, b in zip(rows, two.outcomes[block], strict=True)
            ]
            for block, rows in one.outcomes.items()
        }
        notes = tuple(dict.fromkeys((*one.notes, *two.notes)))
        return Verdict(outcomes, one.log_odds, notes, {**two.checked, **one.checked})

    def _say(self, which: int, row: tuple[str, str]) -> str:
        title = (self.first, self.second)[which].title()
        return f"{title}: {row[0]} ({row[1]})" if title else f"({row[1]})"

    def __repr__(self) -> str:
        parts = [f"({rule!r})" if isinstance(rule, _Composed) else repr(rule) for rule in (self.first, self.second)]
        return f" {self.sign} ".join(parts)


@dataclass(frozen=True)
class OnScore(Rule):
    """A rule on a score of its own, whatever it is handed."""

    rule: Rule
    score: Score

    def check(self, label: str, is_baseline: bool) -> None:
        """It judges its own score."""
        self.rule.check(self.score.label, self.score.cuts is not None)

    def title(self) -> str:
        """Both names."""
        return f"{self.rule.title()} on {self.score.label}"

    def judge(self, score: Score, evidence: NestedEvidence | None = None) -> Verdict:
        """What is handed in tells only which groups there are."""
        if score.spec.labels() != self.score.spec.labels():
            raise ConfigError(
                f"rule {self!r}", got="groups of another network", allowed="a score of the network decided on",
                fix="score the same posterior",
            )  # fmt: skip
        return self.rule.judge(self.score, evidence)

    def __repr__(self) -> str:
        return f"{self.rule!r}.on({self.score.label}, epsilon={self.score.epsilon:g})"


def check_setting(rule: str, name: str, value: Any, is_fine: bool, allowed: str) -> None:
    """Raise a ``ConfigError`` unless a setting of a rule makes sense."""
    if not is_fine:
        raise ConfigError(f"{name} of {rule}", got=repr(value), allowed=allowed, fix="leave it out for the default")


def is_prior_odds(value: Any) -> bool:
    """Whether ``Score.log_odds`` takes it."""
    if isinstance(value, str):
        return value in ("implied", "learned", "none")
    return isinstance(value, int | float) and 0 < value < 1


def demand_evidence(rule: Rule, evidence: NestedEvidence | None) -> NestedEvidence:
    """The evidence, or a ``DataError`` for want of it."""
    if evidence is None:
        raise DataError(
            f"rule {rule!r}", got="no evidence", allowed="evidence on rows that decisions may use",
            fix="pass evidence(posterior, score, loader)",
        )  # fmt: skip
    return evidence


def _check_rule(other: object) -> Rule:
    check_kind(other, Rule, "rule", "a rule of pyrobc.rules", "build it first, for instance PosteriorOdds()")
    assert isinstance(other, Rule)
    return other
