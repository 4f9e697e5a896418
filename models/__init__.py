"""Networks and reference models that pyrobc compresses, one per file; installed as ``pyrobc.models``."""

if __name__ != "pyrobc.models":
    raise ImportError(
        f"models/: got `import {__name__}`; allowed: `import pyrobc.models`, so that each module is loaded once; "
        "fix: write pyrobc.models"
    )
