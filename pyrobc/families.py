"""Family classes by their class names, for ``pyrobc.families.GroupHorseshoe()``; discovered, not listed."""

from __future__ import annotations

from typing import Any

from pyrobc.errors import suggest


def __getattr__(name: str) -> Any:
    from pyrobc.family import families

    classes = {family.__name__: family for family in families().values()}
    if name in classes:
        return classes[name]
    raise AttributeError(f"pyrobc.families: got {name!r}; allowed: {', '.join(classes)}; fix: {suggest(name, classes)}")


def __dir__() -> list[str]:
    from pyrobc.family import families

    return sorted(family.__name__ for family in families().values())
