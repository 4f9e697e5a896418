"""The checkout as it lies on disk, read without importing any of it."""

import os
from pathlib import Path

import pytest

# Folder on disk -> package it is installed as.
ROOTS = {"pyrobc": "pyrobc", "models": "pyrobc.models", "guides": "pyrobc.guides"}


@pytest.fixture(scope="session")
def checkout() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def files(checkout: Path) -> dict[str, Path]:
    """Path inside the wheel -> file on disk, for everything in the package folders; links are not followed."""
    found: dict[str, Path] = {}
    for root, package in ROOTS.items():
        for folder, subfolders, names in os.walk(checkout / root, followlinks=False):
            subfolders[:] = [s for s in subfolders if s != "__pycache__"]
            inside = Path(package.replace(".", "/")) / Path(folder).relative_to(checkout / root)
            for name in names:
                if not name.startswith(".") and not name.endswith((".pyc", "~")):
                    found[(inside / name).as_posix()] = Path(folder) / name
    return found


@pytest.fixture(scope="session")
def modules(files: dict[str, Path]) -> dict[str, Path]:
    """Module name -> source file; a package goes by its own name."""
    return {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for name, path in files.items()
        if name.endswith(".py")
    }
