"""What every command needs of the terminal: a parser that raises, and a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

__all__ = ["make_parser", "print_table"]


def make_parser(name: str, description: str) -> ArgumentParser:
    """A parser for ``pyrobc name``; ``config.parse`` turns what it raises into one line."""
    return ArgumentParser(prog=f"pyrobc {name}", description=description, exit_on_error=False, allow_abbrev=False)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On a terminal with rich (extra ``cli``) a drawn table, elsewhere aligned text."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(*header)
            for column in table.columns[1:]:
                column.justify = "right"
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
