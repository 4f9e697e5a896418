"""The command ``pyrobc``: demo, compress, inspect, report, pack, unpack, doctor.

A refusal is one line on stderr and exit code 2; an interrupted run ends with 130 and resumes when started again.
Nothing heavy is imported before a command runs, so that help and refusals come at once.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from pyrobc import coded_files
from pyrobc._version import __version__
from pyrobc.console import make_parser, print_table
from pyrobc.errors import ConfigError, PyrobcError, suggest

__all__ = ["main"]

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except PyrobcError as error:
        rank = os.environ.get("RANK", "0")  # torchrun's
        who = "pyrobc" if rank == "0" else f"pyrobc, process {rank}"
        print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        can_resume = bool({"demo", "compress"} & set(arguments[:1]))
        hint = f"; to resume: {shlex.join(['pyrobc', *arguments])}" if can_resume else ""
        print(f"\npyrobc: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as in `pyrobc inspect run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:  # --help and --print_config
        return int(stop.code or 0)


def _dispatch(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        print(f"pyrobc {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_describe_commands(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise ConfigError("command", got=repr(name), allowed=", ".join(COMMANDS), fix=suggest(name, COMMANDS))
    from pyrobc.config import parse

    build, run = COMMANDS[name]
    parser = build()
    return run(parse(parser, rest), ["pyrobc", *arguments])


def _describe_commands() -> str:
    lines = ["usage: pyrobc COMMAND [options]", "", "Bayesian compression of neural networks.", "", "commands:"]
    lines += [f"  {name:<10}{build().description}" for name, (build, _) in COMMANDS.items()]
    lines += ["", "options:", "  --help    this text; after a command, its options", "  --version the version"]
    return "\n".join(lines)


def _make_demo_parser() -> ArgumentParser:
    parser = make_parser("demo", "compress a small network on scikit-learn's digits")
    parser.add_argument("--output", type=str, default="runs/demo", help="directory for everything the run writes")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness")
    parser.add_argument(
        "--family", type=str | None, default=None, help="sparsity method; the demo's own choice if left out"
    )
    return parser


def _make_compress_parser() -> ArgumentParser:
    from pyrobc.config import add_run_options

    parser = make_parser("compress", "compress a network of your own on data of your own")
    add_run_options(parser)
    return parser


def _make_inspect_parser() -> ArgumentParser:
    parser = make_parser("inspect", "show a plan: widths, rule, notes")
    parser.add_argument("plan", type=str, help="plan.json, or the directory that holds it")
    parser.add_argument("--group", type=str | None, default=None, help="explain one group, block[index]")
    parser.add_argument("--diff", type=str | None, default=None, help="another plan: say where they differ")
    return parser


def _make_report_parser() -> ArgumentParser:
    parser = make_parser("report", "write the report of a run anew, from its directory; nothing is fitted")
    parser.add_argument("run", type=str, help="directory that compress wrote, or save")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; report.html in the directory")
    return parser


def _make_doctor_parser() -> ArgumentParser:
    return make_parser("doctor", "show versions, devices, and what is missing")


def _run_demo(options: Namespace, command: list[str]) -> int:
    folder = Path(options.output)
    _check_writable(folder)
    from pyrobc import demo
    from pyrobc.distributed import joined

    family = options.family or demo.DEFAULT_FAMILY
    if family not in demo.DEMO_SETTINGS:
        choices = demo.DEMO_SETTINGS
        raise ConfigError(
            "family of the demo", got=repr(family), allowed=", ".join(choices), fix=suggest(family, choices)
        )
    with joined() as team:
        result = demo.run_demo(folder, seed=options.seed, family=family, progress=sys.stderr.isatty())
        if team.is_first:
            _finish(result, folder, command)
    return 0


def _run_compress(options: Namespace, command: list[str]) -> int:
    from pyrobc.config import build_run, to_config

    config = to_config(options)
    arguments = build_run(config)
    folder = Path(config.output)
    _check_writable(folder)
    import yaml

    from pyrobc.checkpoint import write_text
    from pyrobc.compress import compress
    from pyrobc.distributed import joined

    settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    with joined(config.device) as team:
        result = compress(**arguments, progress=sys.stderr.isatty())
        if team.is_first:
            target = folder / "run.yaml"
            is_users = any(Path(str(file)).resolve() == target.resolve() for file in options.config or ())
            write_text(target.with_name("settings.yaml") if is_users else target, settings)
            _finish(result, folder, command)
    return 0


def _run_inspect(options: Namespace, command: list[str]) -> int:
    from pyrobc.plan import read_plan
    from pyrobc.plan_fields import OUTCOMES

    plan = read_plan(_find_plan(options.plan))
    if options.group is not None:
        print(plan.explain(options.group))
        return 0
    if options.diff is not None:
        other = read_plan(_find_plan(options.diff))
        print("\n".join(plan.diff(other)) or "the plans are the same")
        return 0
    ratio = f"{plan.compression_ratio:.3g}"
    print(f"parameters {plan.parameters[0]:,} -> {plan.parameters[1]:,} ({ratio} times fewer)")
    print(f"multiply-accumulates {plan.macs[0]:,} -> {plan.macs[1]:,}")
    rows = [[b.name, str(b.size), *(str(b.outcomes.count(o)) for o in OUTCOMES)] for b in plan.blocks]
    print_table(["block", "groups", *OUTCOMES], rows)
    print(f"rule: {plan.describe_rule()}")
    facts = {"with": plan.other_settings(), "evidence": plan.evidence, "from": plan.provenance}
    facts |= {"left alone": plan.left_alone}
    for title, values in facts.items():
        shown = {key: value for key, value in values.items() if key != "references"}
        if shown:
            print(f"{title}: {_join(shown, '; ')}")
    for note in plan.notes:
        print(f"note: {note}")
    return 0


def _run_report(options: Namespace, command: list[str]) -> int:
    from pyrobc.report import report_run

    print(f"report: {report_run(options.run, options.output)}")
    return 0


def _run_doctor(options: Namespace, command: list[str]) -> int:
    from pyrobc.doctor import diagnose

    lines, is_well = diagnose()
    print("\n".join(lines))
    return 0 if is_well else 1


COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace, list[str]], int]]] = {
    "demo": (_make_demo_parser, _run_demo),
    "compress": (_make_compress_parser, _run_compress),
    "inspect": (_make_inspect_parser, _run_inspect),
    "report": (_make_report_parser, _run_report),
    "pack": (coded_files.make_pack_parser, coded_files.run_pack),
    "unpack": (coded_files.make_unpack_parser, coded_files.run_unpack),
    "doctor": (_make_doctor_parser, _run_doctor),
}


def _finish(result: Any, folder: Path, command: list[str]) -> None:
    """Write the files and the report, print the table, and drop the checkpoints: the run needs them no more."""
    from pyrobc.checkpoint import write_text
    from pyrobc.export import save, verify
    from pyrobc.report import describe_measurement, report_run, tabulate
    from pyrobc.run_record import NAME, make_record

    files = save(result.net, result.plan, folder, evidence=result.evidence, example_inputs=result.example_inputs)
    differences = verify(result.net, folder, result.example_inputs)
    record = make_record(result, command=shlex.join(command), differences=differences, notes=files.notes)
    write_text(folder / NAME, record.to_json())
    report = report_run(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print_table(["", "dense", "compact", "ratio"], [list(row.values()) for row in tabulate(result)])
    print(describe_measurement(result))
    for note in (*result.plan.notes, *files.notes):
        print(f"note: {note}")
    print(f"files: {', '.join(files)} in {folder}")
    print(f"report: {report}")


def _join(values: Mapping[str, Any], separator: str) -> str:
    """``key value`` pairs on one line, numbers to four digits, mappings in brackets."""
    texts = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            texts[key] = f"({_join(value, ', ')})"
        else:
            texts[key] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return separator.join(f"{key} {text}" for key, text in texts.items())


def _find_plan(path: str) -> Path:
    return Path(path) / "plan.json" if Path(path).is_dir() else Path(path)


def _check_writable(folder: Path) -> None:
    """Refuse a directory that cannot be written before hours are spent, not after."""
    from pyrobc.checkpoint import write_text

    probe = folder / ".writable"
    write_text(probe, "\n")
    probe.unlink(missing_ok=True)
