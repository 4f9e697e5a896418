"""``make`` on a fresh clone, with a stand-in for Python: the environment is made once, and a broken one is mended."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Makes a .venv whose python writes down how it was called, and fails on request as a killed install would.
STAND_IN = """#!/bin/sh
echo "base $*" >> calls
test "$2" = venv || exit 0
rm -rf .venv && mkdir -p .venv/bin
printf '#!/bin/sh\\n' > .venv/bin/pip
printf '#!/bin/sh\\necho "venv $*" >> calls\\ncase "$*" in *"$FAIL"*) exit 1;; esac\\n' > .venv/bin/python
chmod +x .venv/bin/pip .venv/bin/python
"""


class Clone:
    """A folder with the Makefile in it and the stand-in beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stamp = folder / ".venv" / ".installed"

    def make(self, *arguments: str, fail: str = "no such call") -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        environment |= {"FAIL": fail, "PYTHON": "./stand-in"}
        return subprocess.run(["make", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True)

    def take_calls(self) -> list[str]:
        log = self.folder / "calls"
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls


@pytest.fixture
def clone(checkout: Path, tmp_path: Path) -> Clone:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(checkout / name, tmp_path)
    (tmp_path / "stand-in").write_text(STAND_IN)
    (tmp_path / "stand-in").chmod(0o755)
    return Clone(tmp_path)


def test_setup_installs_torch_first_and_is_reused(clone: Clone) -> None:
    assert clone.make("setup", "TORCH_INDEX=https://torch.example").returncode == 0
    made, torch, rest = clone.take_calls()
    assert made == "base -m venv --clear .venv"
    assert torch.endswith("--index-url https://torch.example -c constraints.txt torch") and "--no-deps" in torch
    assert rest.endswith("-c constraints.txt -e .[all,dev]") and "torch.example" not in rest

    assert clone.make("setup").returncode == 0
    assert clone.take_calls() == []


def test_killed_install_is_finished_by_the_next_call(clone: Clone) -> None:
    assert clone.make("setup", fail=".[all,dev]").returncode != 0
    assert not clone.stamp.exists()
    clone.take_calls()

    assert clone.make("setup").returncode == 0
    assert clone.stamp.exists()
    assert [call.split()[0] for call in clone.take_calls()] == ["venv", "venv"]  # the environment itself was fine


def test_killed_reinstall_leaves_no_stamp(clone: Clone) -> None:
    assert clone.make("setup").returncode == 0
    later = clone.stamp.stat().st_mtime + 10
    os.utime(clone.folder / "constraints.txt", (later, later))
    assert clone.make("setup", fail="torch").returncode != 0
    assert not clone.stamp.exists()


def test_environment_without_pip_is_made_anew(clone: Clone) -> None:
    (clone.folder / ".venv").mkdir()
    assert clone.make("setup").returncode == 0
    assert clone.take_calls()[0] == "base -m venv --clear .venv"


def test_no_python_is_said_in_one_line(clone: Clone) -> None:
    done = clone.make("setup", "PYTHON=")
    assert done.returncode != 0
    assert "allowed: >= 3.11" in done.stderr.splitlines()[0]
    assert not (clone.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("demo", "pyrobc demo"),
        ("test", '-m "not slow"'),
        ("test-slow", "-m slow"),
        ("lint", ".venv/bin/mypy"),
        ("bench", "benchmarks --all"),
    ],
)
def test_target_prepares_the_environment_itself(clone: Clone, target: str, expected: str) -> None:
    plan = clone.make("--dry-run", target).stdout
    assert plan.index(".[all,dev]") < plan.index(expected)
