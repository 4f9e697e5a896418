"""Every refusal of the package, in one hierarchy.

A message says, in this order: the subject, what was got, what is allowed, and the fix.  The command line prints it as
one line and exits with code 2; a library user catches ``PyrobcError`` or the narrower class.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FamilyError",
    "FitError",
    "GroupError",
    "MissingExtraError",
    "OutputError",
    "PlanError",
    "PyrobcError",
    "ReductionError",
    "SurgeryError",
    "suggest",
]


class PyrobcError(Exception):
    """Base class.  ``PyrobcError("family", got="'hrseshoe'", allowed="a, b", fix="did you mean 'horseshoe'?")``."""

    def __init__(self, subject: str, *, got: str, allowed: str, fix: str) -> None:
        self.subject, self.got, self.allowed, self.fix = subject, got, allowed, fix
        super().__init__(f"{subject}: got {got}; allowed: {allowed}; fix: {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.subject, self.got, self.allowed, self.fix))


def _rebuild(cls: type[PyrobcError], subject: str, got: str, allowed: str, fix: str) -> PyrobcError:
    return cls(subject, got=got, allowed=allowed, fix=fix)


class DataError(PyrobcError, ValueError):
    """The data cannot be used: empty, NaN, wrong shape, labels out of range."""


class FamilyError(PyrobcError, ValueError):
    """A family is unknown, registered twice, wrongly configured, or lacks what was asked of it."""


class GroupError(PyrobcError, ValueError):
    """The network has no prunable group, cannot be traced, or a group name does not exist."""


class FitError(PyrobcError, RuntimeError):
    """Training cannot go on: a loss that is not finite, a setting that makes no sense."""


class CheckpointError(PyrobcError, ValueError):
    """A checkpoint belongs to another network, family or version, or cannot be read."""


class ReductionError(PyrobcError, ValueError):
    """A change of prior cannot be scored: improper, other support, no closed form, shapes that do not broadcast."""


class BudgetError(PyrobcError, ValueError):
    """A budget or a rule cannot be met by this network."""


class PlanError(PyrobcError, ValueError):
    """A plan is corrupted or belongs to another network."""


class SurgeryError(PyrobcError, RuntimeError):
    """The cut network does not compute what the masked network computes."""


class OutputError(PyrobcError, OSError):
    """Results cannot be written or read back."""


class ConfigError(PyrobcError, ValueError):
    """A run file or a command-line option is wrong."""


class MissingExtraError(PyrobcError, ImportError):
    """An optional dependency is absent; the message holds the exact install line."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtraError:
        """The error for ``package``, which the extra ``extra`` installs and ``purpose`` needs."""
        return cls(
            purpose,
            got=f"no module {package!r}",
            allowed=f"an installation with the extra [{extra}]",
            fix=f'pip install "pyrobc[{extra}]"',
        )


def suggest(name: str, choices: Iterable[str]) -> str:
    """Say which of ``choices`` ``name`` probably meant: the text for the ``fix`` part of an error."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(map(repr, known)) or 'none'}"
