"""What is installed, what is missing, and the line that mends it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["EXTRAS", "diagnose"]

CORE = (
    "pyrobc", "torch", "pyro-ppl", "torch-pruning", "arviz-base", "arviz-stats", "numpy", "scipy", "safetensors",
    "h5netcdf", "jsonargparse",
)  # fmt: skip
EXTRAS = {"plots": ("arviz", "matplotlib"), "onnx": ("onnx", "onnxscript", "onnxruntime"), "cli": ("rich",)}
"""Packages of each extra, as pyproject.toml names them."""


def diagnose() -> tuple[list[str], bool]:
    """Lines for the terminal, and whether everything that pyrobc itself needs is there."""
    core = {name: find_version(name) for name in CORE}
    lines = [f"python {platform.python_version()} ({sys.executable})", f"system {platform.platform()}"]
    lines += [f"{name} {number or 'MISSING'}" for name, number in core.items()]
    missing = [name for name, number in core.items() if number is None]
    if missing:
        lines.append("fix: pip install --force-reinstall pyrobc")
    else:
        lines += _describe_devices()
    lines += _describe_extras()
    lines += _describe_torchvision()
    return lines, not missing


def find_version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe_devices() -> list[str]:
    import torch

    from pyrobc.compare import describe_cpu
    from pyrobc.family import families

    lines = [f"families {', '.join(families())}"]
    lines += [f"cpu {describe_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"]
    if torch.cuda.is_available():
        lines += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPU only"
        lines.append(f"cuda none ({built})")
    return lines


def _describe_extras() -> list[str]:
    lines = []
    for extra, packages in EXTRAS.items():
        versions = {name: find_version(name) for name in packages}
        missing = [name for name, number in versions.items() if number is None]
        if missing:
            lines.append(f'[{extra}] missing {", ".join(missing)}; fix: pip install "pyrobc[{extra}]"')
        else:
            lines.append(f"[{extra}] {', '.join(f'{name} {number}' for name, number in versions.items())}")
    return lines


def _describe_torchvision(probe: Sequence[str] = (sys.executable, "-c", "import torchvision")) -> list[str]:
    """One built for another torch fails on import and takes other packages with it; it is tried in a process apart."""
    if find_spec("torchvision") is None:
        return ["torchvision not installed (not needed)"]
    done = subprocess.run(probe, capture_output=True, text=True)
    found = find_version("torchvision") or "of unknown version"
    if done.returncode == 0:
        return [f"torchvision {found}"]
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    torch_version = find_version("torch") or ""
    _, _, build = torch_version.partition("+")
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return [
        f"torchvision {found} does not fit torch {torch_version}: {last}",
        f"fix: pip install --force-reinstall --no-deps torchvision{index}, or pip uninstall torchvision",
    ]
