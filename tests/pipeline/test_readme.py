"""The README's example runs as printed, and its commands exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from pyrobc import cli
from pyrobc.export import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_prints_what_the_readme_says(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    example, printed = blocks("python")[0], blocks("text")[0].strip().splitlines()
    assert len(example.strip().splitlines()) <= 15
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured):
        exec(compile(example, "README.md", "exec"), {})
    got = captured.getvalue().strip().splitlines()
    assert len(got) == len(printed)
    for mine, theirs in zip(got, printed, strict=True):  # numbers may differ a little between processors, words may not
        assert re.sub(r"[\d.e+-]+", "#", mine) == re.sub(r"[\d.e+-]+", "#", theirs)
    ratio, promised = (float(re.search(r"(\d+)x fewer", "\n".join(lines))[1]) for lines in (got, printed))
    assert ratio == pytest.approx(promised, rel=0.25)
    assert {"model.pt2", "model.safetensors", "model.onnx", "model.rbc", "plan.json"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    for command in re.findall(r"`pyrobc ((?:un)?pack [^`]*)`", README):
        assert cli.main(command.split()) == 0, command
    assert (tmp_path / "x.rbc").stat().st_size < (tmp_path / "run" / "model.rbc").stat().st_size
    assert load("x.rbc")(torch.zeros(3, 64)).shape == (3, 10)


def test_its_commands_exist():
    commands = re.findall(r"^pyrobc ([a-z]+)|`pyrobc ([a-z]+)", README, flags=re.MULTILINE)
    assert {a or b for a, b in commands} >= {"demo", "compress", "pack", "unpack"}
    assert all((a or b) in cli.COMMANDS for a, b in commands)


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
