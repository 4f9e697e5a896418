"""The suite: ``python -m benchmarks`` lists it; names, or ``--all``, run it, each benchmark in a process of its own."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    """List or run."""
    known = {path.stem: path.read_text() for path in sorted(FOLDER.glob("[!_]*.py"))}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to run; see the list")
    parser.add_argument("--all", action="store_true", help="run every benchmark")
    parser.add_argument("--data", type=Path, help="folder with MNIST's IDX files, for those that need them (hours)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"benchmark: got {', '.join(unknown)}; allowed: {', '.join(known)}; fix: see python -m benchmarks")
    names = list(known) if arguments.all else arguments.names
    if not names:
        for name, text in known.items():
            note = "  (needs --data)" if needs_data(text) else ""
            print(f"{name:22} {(ast.get_docstring(ast.parse(text)) or '').splitlines()[0]}{note}")
        return
    failed = []
    for name in names:
        if needs_data(known[name]) and arguments.data is None:
            print(f"benchmarks.{name}: left out, it needs --data FOLDER", flush=True)
            continue
        print(f"benchmarks.{name}", flush=True)
        options = ["--data", str(arguments.data)] if needs_data(known[name]) else []
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], cwd=FOLDER.parent)
        failed += [name] if done.returncode else []
    if failed:
        sys.exit(f"benchmarks: failed: {', '.join(failed)}")


def needs_data(text: str) -> bool:
    """Whether a benchmark has an option for the folder of its data."""
    return 'add_argument("--data"' in text


if __name__ == "__main__":
    main()
