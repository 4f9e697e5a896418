"""Rules by name, as a run file and the command line give them.

=============================================  ==========================================
in YAML                                        the rule
=============================================  ==========================================
``predictive``                                 ``Predictive()``
``{false_prune_rate: {level: 0.05}}``          ``FalsePruneRate(level=0.05)``
``{all: [posterior_odds, highest_density]}``   ``PosteriorOdds() & HighestDensity()``
``{any: [posterior_odds, {budget: ...}]}``     ``PosteriorOdds() | Budget(...)``
=============================================  ==========================================

``all`` and ``any`` nest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import reduce
from operator import and_, or_
from typing import Any

from pyrobc.errors import ConfigError, suggest
from pyrobc.rules.budget import Budget
from pyrobc.rules.false_prune import FalsePruneRate
from pyrobc.rules.interval import HighestDensity
from pyrobc.rules.odds import BeyondCut, PosteriorOdds
from pyrobc.rules.predictive import Predictive
from pyrobc.rules.rule import Rule

__all__ = ["RULES", "make_rule"]

RULES: dict[str, type[Rule]] = {
    "beyond_cut": BeyondCut,
    "budget": Budget,
    "false_prune_rate": FalsePruneRate,
    "highest_density": HighestDensity,
    "posterior_odds": PosteriorOdds,
    "predictive": Predictive,
}
_SIGNS = {"all": and_, "any": or_}
_FORM = "a name, {name: {setting: value}}, or {all: [rules]} and {any: [rules]}"


def make_rule(given: Rule | str | Mapping[str, Any]) -> Rule:
    """A rule from its name, from ``{name: settings}``, or from ``{"all": [...]}`` and ``{"any": [...]}`` of those.

    Raises:
        ConfigError: an unknown name or setting, a value that makes no sense, or another form.

    Example:
        >>> make_rule({"all": ["posterior_odds", {"false_prune_rate": {"level": 0.01}}]})
        PosteriorOdds(prior_odds='implied', z=2.0) & FalsePruneRate(level=0.01, prior_odds='implied', z=2.0)
    """
    if isinstance(given, Rule):
        return given
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, Mapping) or len(given) != 1:
        got = f"{len(given)} keys, {', '.join(map(str, given))}" if isinstance(given, Mapping) else repr(given)
        raise ConfigError("rule", got=got, allowed=_FORM, fix="put several rules in a list under all or any")
    name, settings = next(iter(given.items()))
    if name in _SIGNS:
        if not isinstance(settings, list | tuple) or not settings:
            raise ConfigError(
                f"rule {name}", got=repr(settings), allowed="a list of rules",
                fix=f"write {{{name}: [posterior_odds, predictive]}}, for instance",
            )  # fmt: skip
        return reduce(_SIGNS[name], map(make_rule, settings))
    if name not in RULES:
        choices = [*RULES, *_SIGNS]
        raise ConfigError("rule", got=repr(name), allowed=", ".join(choices), fix=suggest(str(name), choices))
    kind = RULES[name]
    allowed = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(settings or {}, Mapping):
        example = f"{{{name}: {{{allowed[0]}: {settings}}}}}" if allowed else name
        raise ConfigError(f"rule {name}", got=repr(settings), allowed="settings by name", fix=f"write {example}")
    for key in settings or {}:
        if key not in allowed:
            raise ConfigError(
                f"rule {name}", got=f"the setting {key!r}", allowed=", ".join(allowed) or "no settings",
                fix=suggest(str(key), allowed) if allowed else "leave it out",
            )  # fmt: skip
    try:
        return kind(**(settings or {}))
    except TypeError as error:  # a text where a number belongs
        raise ConfigError(f"rule {name}", got=f"{settings!r} ({error})", allowed="numbers", fix="correct it") from error
