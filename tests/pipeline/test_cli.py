"""The command as users run it: exit codes, one line per refusal, interrupted runs that go on."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pyrobc import cli, doctor
from pyrobc._version import __version__
from pyrobc.cli import main
from pyrobc.export import load
from pyrobc.plan import read_plan

SETTINGS = {
    "model": "mlp", "model_args": {"in_features": 5, "hidden": [8, 4], "out_features": 2},
    "data": {"train": "train.npz", "test": "test.npz"}, "epochs": 8, "lr": 0.02, "batch_size": 50, "num_draws": 40,
    "output": "out",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, rows in (("train", 150), ("test", 60)):
        x = generator.normal(size=(rows, 5))
        np.savez(f"{name}.npz", x=x, y=(x[:, 0] > 0).astype(int))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return tmp_path


def refused(capsys, *arguments):
    """Run a command that must be refused, with exit code 2 and nothing on stdout; returns its one line on stderr."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("pyrobc: ") and output.err.count("\n") == 1
    return output.err


def test_compress_from_file_to_report(here, capfd):
    assert main(["compress", "--config", "run.yaml", "--seed", "3"]) == 0
    output = capfd.readouterr()
    assert "error on test rows" in output.out and "report: out/report.html" in output.out
    assert output.err == "", "no progress bar where there is no terminal"
    files = {path.name for path in (here / "out").iterdir()}
    assert files >= {
        "run.yaml",
        "model.safetensors",
        "model.pt2",
        "model.rbc",
        "plan.json",
        "posterior.nc",
        "report.html",
        "report.json",
    }
    assert "checkpoints" not in files, "a finished run leaves none to resume from by mistake"
    plan = read_plan(here / "out" / "plan.json")
    assert plan.provenance["seed"] == 3
    table = json.loads((here / "out" / "report.json").read_text())
    assert [row["name"] for row in table["table"]] == ["dense", "compact"]
    assert max(table["differences"].values()) <= 1e-5
    assert "pyrobc compress --config run.yaml --seed 3" in (here / "out" / "report.html").read_text()
    with np.load("test.npz") as data:
        assert load("out")(torch.tensor(data["x"]).float()).shape == (60, 2)

    again = yaml.safe_load((here / "out" / "run.yaml").read_text())
    assert again["seed"] == 3 and again["epochs"] == 8
    (here / "again").mkdir()
    mine = "# why I chose this seed\n" + (here / "out" / "run.yaml").read_text()
    (here / "again" / "run.yaml").write_text(mine)
    assert main(["compress", "--config", "again/run.yaml", "--output", "again"]) == 0
    assert read_plan("again/plan.json") == plan, "the settings that were written repeat the run"
    assert (here / "again" / "run.yaml").read_text() == mine, "a run file of the user's is not written over"
    assert yaml.safe_load((here / "again" / "settings.yaml").read_text())["output"] == "again"
    capfd.readouterr()

    assert main(["inspect", "out", "--diff", "again/plan.json"]) == 0
    assert capfd.readouterr().out == "the plans are the same\n"
    assert main(["inspect", "out/plan.json"]) == 0
    shown = capfd.readouterr().out
    assert "rule: " in shown and all(name in shown for name in plan.widths)
    assert main(["inspect", "out", "--group", "input[0]"]) == 0
    assert capfd.readouterr().out.startswith("input[0]: ")


def test_a_rule_and_rounded_widths_from_a_run_file(here, capfd):
    """In YAML, or as an option; the plan names both, and the widths are multiples or all that there was."""
    rule = {"all": ["posterior_odds", {"false_prune_rate": {"level": 0.1}}]}
    (here / "run.yaml").write_text(yaml.safe_dump({**SETTINGS, "rule": rule, "round_to": 4}))
    assert main(["compress", "--config", "run.yaml"]) == 0
    plan = read_plan("out/plan.json")
    assert plan.describe_rule() == (
        "PosteriorOdds(prior_odds='implied', z=2.0) & FalsePruneRate(level=0.1, prior_odds='implied', z=2.0), "
        "round_to=4 on rope with epsilon=0.01"
    )
    assert all(after % 4 == 0 or after == before for before, after in plan.widths.values())
    assert main(["compress", "--config", "out/run.yaml", "--output", "again"]) == 0
    assert read_plan("again/plan.json") == plan
    capfd.readouterr()
    assert main(["inspect", "out"]) == 0
    assert f"rule: {plan.describe_rule()}\n" in capfd.readouterr().out
    assert main(["compress", "--config", "run.yaml", "--rule", "{budget: {macs: 30}}", "--round_to", "1"]) == 0
    assert read_plan("out/plan.json").macs[1] <= 30


@pytest.fixture
def interrupted(here, monkeypatch, capsys):
    """A run stopped by SIGINT right after the checkpoint of its fourth epoch; what it said."""
    fit = importlib.import_module("pyrobc.fit")
    count, write = [0], fit.write_checkpoint

    def write_and_interrupt(*arguments):
        write(*arguments)
        count[0] += 1
        if count[0] == 4:
            signal.raise_signal(signal.SIGINT)

    # a shell starts what runs in the background with the signal ignored, and Python then keeps it so
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(fit, "write_checkpoint", write_and_interrupt)
            assert main(["compress", "--config", "run.yaml"]) == cli.INTERRUPTED == 130
    finally:
        signal.signal(signal.SIGINT, before)
    return capsys.readouterr().err


def test_interrupted_run_says_how_to_go_on_and_does(here, interrupted):
    """The same command resumes, and ends where an uninterrupted run ends."""
    assert interrupted.strip() == "pyrobc: interrupted; to resume: pyrobc compress --config run.yaml"
    assert {path.name for path in (here / "out").iterdir()} == {"checkpoints"}
    assert main(["compress", "--config", "run.yaml"]) == 0
    assert main(["compress", "--config", "run.yaml", "--output", "whole"]) == 0
    assert (here / "out/plan.json").read_bytes() == (here / "whole/plan.json").read_bytes()
    for a, b in zip(load("out").parameters(), load("whole").parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_of_another_run_is_refused(interrupted, capsys):
    assert "seed: got 0; allowed: 4" in refused(capsys, "compress", "--config", "run.yaml", "--seed", "4")


WRONG = {
    "comprss": "did you mean 'compress'",
    "--verbose": "allowed: demo, compress, inspect, report, pack, unpack, doctor",
    "demo --sead 1": "did you mean '--seed'",
    "demo --family hrseshoe": "did you mean 'group_horseshoe'",
    "demo --output run.yaml/x": "a directory that can be written",
    "inspect": "no plan",
    "inspect nosuch.json": "FileNotFoundError",
    "inspect run.yaml": "text that is not JSON",
    "inspect a b": "got 'b'",
    "compress": "no model",
    "compress --config nosuch.yaml": "File does not exist",
    "compress --config run.yaml --epoch 3": "did you mean '--epochs'",
    "compress --config run.yaml --epochs 0": "epochs: got 0",
    "compress --config run.yaml --seed -1": "seed: got -1",
    "demo --seed -1": "seed: got -1",
    "compress --config run.yaml --device mps": "device: got 'mps'",
    "compress --config run.yaml --family_args.num_draws many": "setting 'num_draws' of family 'log_uniform'",
    "compress --config run.yaml --family hrseshoe": "did you mean 'group_horseshoe'",
    "compress --config run.yaml --family_args.gatelr 1": "did you mean 'gate_lr'",
    "compress --config run.yaml --likelihood catgorical": "did you mean 'categorical'",
    "compress --config run.yaml --reduction spyke": "did you mean 'spike'",
    "compress --config run.yaml --reduction spike": "pass prior_odds='learned'",
    "compress --config run.yaml --rule odds": "did you mean 'posterior_odds'",
    'compress --config run.yaml --rule {"budget":{"parameter":9}}': "did you mean 'parameters'",
    "compress --config run.yaml --rule predictive --max_worse 1": "got Predictive.* beside max_worse",
    "compress --config run.yaml --rule predictive --prune_each_epoch true": "beside prune_each_epoch",
    "compress --config run.yaml --rule beyond_cut": "cut of the reduction 'rope'",
    "compress --config run.yaml --rule posterior_odds --reduction l2": "use BeyondCut",
    "compress --config run.yaml --round_to 0": "round_to: got 0",
    "compress --config run.yaml --round_to 8 --keep_weights 9": "round_to: got 8 beside keep_weights",
    "compress --config run.yaml --data.train nosuch.npz": "no such file",
    "compress --config run.yaml --model_args.out_features 1": "0 to 0, as the network has 1 outputs",
    "compress --config run.yaml --model_args.in_features 7": "fix: ",
    "compress --config run.yaml --budget 3": "with one group left in every layer",
    "compress --config run.yaml --output train.npz": "a directory that can be written",
    "doctor --all": "unknown|option",
}


@pytest.mark.parametrize("command", WRONG)
def test_refusals_are_one_line(here, capsys, command):
    assert re.search(WRONG[command], refused(capsys, *command.split()))


def test_refused_before_anything_is_written(here, capsys):
    refused(capsys, "compress", "--config", "run.yaml", "--data.train", "nosuch.npz")
    refused(capsys, "compress", "--config", "run.yaml", "--model", "nosuch")
    assert not (here / "out").exists()


def test_a_defect_is_not_hidden(monkeypatch):
    """Only refusals are one line; anything else keeps its traceback."""
    monkeypatch.setitem(cli.COMMANDS, "doctor", (cli.COMMANDS["doctor"][0], lambda *a: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyrobc {__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("usage", *cli.COMMANDS))
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
    for name in cli.COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"usage: pyrobc {name}" in capsys.readouterr().out


def test_help_and_refusals_import_nothing_heavy():
    """Instead of a clock: what takes the time is not there."""
    code = (
        "import sys, io, contextlib\nfrom pyrobc.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    codes = [main(a.split()) for a in ('--help', 'compress --help', 'comprss', 'pack --bit 1', 'unpack')]\n"
        "heavy = {'torch', 'pyro', 'numpy', 'scipy', 'arviz_base', 'matplotlib', 'sklearn'} & sys.modules.keys()\n"
        "print(codes, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[0, 0, 2, 2, 2] []", done.stderr


def test_module_and_pipe(compressed, tmp_path):
    """``python -m pyrobc`` works, and a reader that leaves early is no error."""
    (tmp_path / "plan.json").write_text(compressed.plan.to_json())
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pyrobc", "inspect", str(tmp_path)]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_drawn_table_where_rich_is_installed(compressed, tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    (tmp_path / "plan.json").write_text(compressed.plan.to_json())
    main(["inspect", str(tmp_path)])
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["inspect", str(tmp_path)])
    drawn = capsys.readouterr().out
    assert "\u2502" in drawn and "\u2502" not in plain
    monkeypatch.setitem(sys.modules, "rich.console", None)
    main(["inspect", str(tmp_path)])
    assert capsys.readouterr().out == plain


def test_doctor_says_what_is_there(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in shown
    assert "threads" in shown and "cuda" in shown and "torchvision" in shown


def test_doctor_names_the_install_line(capsys, monkeypatch):
    found = doctor.find_version
    monkeypatch.setattr(doctor, "find_version", lambda name: None if name == "onnxruntime" else found(name))
    assert main(["doctor"]) == 0
    assert '[onnx] missing onnxruntime; fix: pip install "pyrobc[onnx]"' in capsys.readouterr().out
    monkeypatch.setattr(doctor, "find_version", lambda name: None if name == "pyro-ppl" else found(name))
    assert main(["doctor"]) == 1
    assert "pyro-ppl MISSING" in capsys.readouterr().out


def test_doctor_finds_a_torchvision_of_another_torch(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "find_version", {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get)
    failing = (sys.executable, "-c", "raise RuntimeError('operator torchvision::nms does not exist')")
    lines = doctor._describe_torchvision(failing)
    assert "does not fit torch 2.13.0+cpu" in lines[0] and "torchvision::nms" in lines[0]
    assert "--index-url https://download.pytorch.org/whl/cpu" in lines[1]
    assert doctor._describe_torchvision((sys.executable, "-c", "")) == ["torchvision 0.28.0"]


def test_doctor_knows_the_extras_of_the_project():
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not project.is_file():
        pytest.skip("not a checkout")
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    for name in ("plots", "onnx", "cli"):
        assert {line.partition(">")[0].partition(";")[0].strip() for line in extras[name]} == set(doctor.EXTRAS[name])
