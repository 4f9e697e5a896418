"""The README's example runs as printed, and its commands exist."""

import contextlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyrobc import cli
from pyrobc.demo import load_digits
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


def test_its_run_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, language in (("my_network.py", "python"), ("run.yaml", "yaml")):
        [text] = [block for block in blocks(language) if block.startswith(f"# {name}\n")]
        (tmp_path / name).write_text(text)
    for name, (x, y) in zip(("train", "validation", "test"), load_digits(), strict=True):
        np.savez(f"{name}.npz", x=x.numpy(), y=y.numpy())
    assert cli.main(["compress", "--config", "run.yaml", "--epochs", "2", "--warmup_epochs", "0"]) == 0
    assert {"report.html", "model.rbc", "plan.json"} <= {p.name for p in (tmp_path / "runs" / "mine").iterdir()}
    sys.modules.pop("my_network", None)


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
