"""Families, one per file: a prior, the guide that answers to it, its reduced priors; installed as ``pyrobc.guides``."""

if __name__ != "pyrobc.guides":
    raise ImportError(
        f"guides/: got `import {__name__}`; allowed: `import pyrobc.guides`, so that each family registers once; "
        "fix: write pyrobc.guides"
    )
