"""What is installed: the wheel holds what lies on disk, under one top-level package, at versions that fit together."""

import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pyrobc._version import __version__


@pytest.fixture(scope="module")
def project(checkout: Path) -> dict[str, Any]:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist.

    The build runs on a copy, so that nothing stale in the checkout can enter it and nothing is left behind in it.
    """
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / name, source)
    for name in ("pyrobc", "models", "guides"):
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*~")
        shutil.copytree(checkout / name, source / name, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_packages_are_the_folders_on_disk(project: dict[str, Any], modules: dict[str, Path]) -> None:
    folders = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules.items()}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_every_package_has_an_init(project: dict[str, Any], modules: dict[str, Path]) -> None:
    missing = [p for p in project["tool"]["setuptools"]["packages"] if modules.get(p, Path()).name != "__init__.py"]
    assert not missing


@pytest.mark.parametrize("name", ["models", "guides"])
def test_link_is_relative(checkout: Path, name: str) -> None:
    link = checkout / "pyrobc" / name
    if not link.is_symlink():
        pytest.skip("this checkout was unpacked without links")
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", ["models", "guides"])
def test_folder_refuses_its_bare_name(checkout: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=rf"write pyrobc\.{name}"):
        importlib.import_module(name)


def test_wheel_holds_what_lies_on_disk(wheel: Path, files: dict[str, Path]) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == set(files)
    assert "pyrobc/py.typed" in names


def test_wheel_has_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        info = f"pyrobc-{__version__}.dist-info"
        assert tops == {"pyrobc", info}
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["pyrobc"]


def test_wheel_has_the_command_and_the_licence(wheel: Path, checkout: Path) -> None:
    info = f"pyrobc-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert dict(entries["console_scripts"]) == {"pyrobc": "pyrobc.cli:main"}
        assert archive.read(f"{info}/licenses/LICENSE") == (checkout / "LICENSE").read_bytes()


def test_sdist_holds_the_real_folders(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = set(archive.getnames())
    root = f"pyrobc-{__version__}"
    assert {f"{root}/models/__init__.py", f"{root}/guides/__init__.py"} <= names
    assert not any(name.startswith((f"{root}/pyrobc/models", f"{root}/pyrobc/guides")) for name in names)


def test_wheel_is_importable_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import pyrobc, pyrobc.models, pyrobc.guides\n"
        "print(*(m.__file__ for m in (pyrobc, pyrobc.models, pyrobc.guides)), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(line).is_relative_to(tmp_path) for line in done.stdout.split()] == [True] * 3


def test_constraints_pin_every_requirement(project: dict[str, Any], checkout: Path) -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (checkout / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert re.fullmatch(r"==[^*+]+", str(pin.specifier)), f"{line}: not one exact public version"
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    extras = project["project"]["optional-dependencies"]
    lines = project["project"]["dependencies"] + [
        line for name, more in extras.items() if name != "all" for line in more
    ]
    for python in ("3.11", "3.12", "3.13"):
        for requirement in map(Requirement, lines):
            if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
                continue
            versions = [
                str(pin.specifier).removeprefix("==")
                for pin in pins.get(canonicalize_name(requirement.name), [])
                if pin.marker is None or pin.marker.evaluate({"python_version": python})
            ]
            assert len(versions) == 1, f"{requirement} on Python {python}: pinned to {versions}"
            assert requirement.specifier.contains(versions[0]), f"{requirement}: pinned to {versions[0]}"


def test_version_is_told_the_same_everywhere(checkout: Path) -> None:
    citation = (checkout / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(__version__)}$", citation, re.MULTILINE)
    assert f"## [{__version__}]" in (checkout / "CHANGELOG.md").read_text(encoding="utf-8")
