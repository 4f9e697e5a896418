"""The architecture, read from the syntax trees: imports go down, and each heavy library stays behind its one door."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

# Layer of each module, or of each package with all it contains.  A new module is entered here.
LAYERS = {
    0: {
        "_version",
        "attention",
        "bmr",
        "calling",
        "costs",
        "dependency",
        "dists",
        "errors",
        "family",
        "gated",
        "groups",
        "json_numbers",
        "kinds",
        "meanfield",
        "moments",
        "probing",
        "propagation",
        "proposals",
        "selection",
        "slicing",
    },
    1: {
        "models",
        "guides",
        "batches",
        "checkpoint",
        "dead_units",
        "density",
        "distributed",
        "fit",
        "folding",
        "gridding",
        "lift",
        "lifted_layers",
        "likelihoods",
        "moment_loss",
        "negligible",
        "objective",
        "posterior",
        "predictive",
        "rewinding",
        "settings",
        "training",
        "watching",
    },
    2: {
        "arviz_io",
        "baselines",
        "candidates",
        "coverage",
        "decide",
        "decision_rows",
        "evidence",
        "evidence_file",
        "gap",
        "leave_one_out",
        "levels",
        "outcomes",
        "plan",
        "plan_fields",
        "plan_parts",
        "rounding",
        "rules",
        "scores",
        "sensitivity",
        "weights",
    },
    3: {
        "surgery",
        "bits",
        "codec",
    },
    4: {
        "accounting",
        "archive",
        "arrays",
        "coded_files",
        "compare",
        "compress",
        "config",
        "console",
        "decision_settings",
        "demo",
        "diagnose",
        "doctor",
        "export",
        "families",
        "figures",
        "pruning",
        "references",
        "report",
        "report_tables",
        "run_record",
        "shifts",
        "sparsify",
        "supports",
        "thinning",
        "cli",
    },
    5: {"__init__", "__main__"},  # the façade: hands out names of every layer
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}

# Families and networks know layer 0 only; they never know each other, nor the machinery that uses them.
MEMBERS = {"models", "guides"}

# The one upward import: the registry finds the built-in families by importing their package.
EXCEPTIONS = {("pyrobc.family", "pyrobc.guides")}

# What runs, reads or writes a compact network works where Pyro is not installed.
PYRO_FREE = {
    "_version",
    "attention",
    "errors",
    "groups",
    "costs",
    "dependency",
    "probing",
    "proposals",
    "slicing",
    "moments",
    "propagation",
    "json_numbers",
    "plan",
    "plan_fields",
    "plan_parts",
    "surgery",
    "bits",
    "codec",
    "archive",
    "arrays",
    "export",
}

# Libraries with a single door, so that a change of theirs is answered in one file.
DOORS = {
    "arviz": {"pyrobc.arviz_io"},
    "arviz_base": {"pyrobc.arviz_io"},
    "arviz_plots": {"pyrobc.arviz_io"},
    "arviz_stats": {"pyrobc.arviz_io"},
    "constriction": {"pyrobc.codec.streams"},
    "torch_pruning": {"pyrobc.proposals"},
}

FOUNDATION = {"numpy", "pyro", "scipy", "torch"}  # what layer 0 stands on, doors aside
TABLES = {"pandas", "xarray"}  # labelled results, built on demand

MAX_LINES = 330


class Import(NamedTuple):
    source: str
    target: str
    line: int
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def unit(module: str) -> str:
    """The row of the layer table that a module of the package belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def read_imports(modules: dict[str, Path]) -> Iterator[Import]:
    """Every import of the package, in functions too; ``from a import b`` names the module ``a.b`` if there is one."""
    for source, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        late: set[ast.AST] = set()
        for node in ast.walk(tree):
            is_deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if is_deferred or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
                late.update(child for child in ast.walk(node) if child is not node)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{source}:{node.lineno}: a relative import; write it from pyrobc on"
                base = node.module or ""
                joined = [f"{base}.{alias.name}" for alias in node.names]
                targets = [name if name in modules or base == "pyro" else base for name in joined]
            else:
                continue
            for target in targets:
                yield Import(source, target, node.lineno, node not in late)


@pytest.fixture(scope="module")
def imports(modules: dict[str, Path]) -> list[Import]:
    """All imports between modules that have a layer; those that have none fail a test of their own."""
    return [i for i in read_imports(modules) if unit(i.source) in LAYER and (is_foreign(i) or unit(i.target) in LAYER)]


def is_foreign(one: Import) -> bool:
    return one.target.split(".")[0] != "pyrobc"


def own(imports: list[Import]) -> list[Import]:
    return [i for i in imports if not is_foreign(i)]


def test_every_module_has_a_layer(modules: dict[str, Path]) -> None:
    unknown = sorted({unit(module) for module in modules} - LAYER.keys())
    assert not unknown, f"enter {unknown} in LAYERS"


def test_imports_go_down(imports: list[Import]) -> None:
    upward = [
        str(i)
        for i in own(imports)
        if LAYER[unit(i.target)] > LAYER[unit(i.source)] and (i.source, i.target) not in EXCEPTIONS
    ]
    assert not upward, "\n".join(upward)


def test_members_know_layer_zero_only(imports: list[Import]) -> None:
    wrong = [
        str(i)
        for i in own(imports)
        if unit(i.source) in MEMBERS and unit(i.source) != unit(i.target) and LAYER[unit(i.target)] > 0
    ]
    assert not wrong, "\n".join(wrong)


def test_layers_one_to_three_know_no_member(imports: list[Import]) -> None:
    wrong = [
        str(i)
        for i in own(imports)
        if unit(i.target) in MEMBERS and unit(i.source) not in MEMBERS and 1 <= LAYER[unit(i.source)] <= 3
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_can_be_loaded_in_some_order(imports: list[Import]) -> None:
    graph: dict[str, set[str]] = {}
    for i in own(imports):
        if i.at_import_time and i.source != i.target:
            graph.setdefault(i.source, set()).add(i.target)
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_foundation_stands_on_little(imports: list[Import]) -> None:
    wrong = []
    for i in imports:
        root = i.target.split(".")[0]
        if LAYER[unit(i.source)] > 0 or root in {"pyrobc", "__future__"} or root in sys.stdlib_module_names:
            continue
        is_table = root in TABLES and not i.at_import_time
        if root not in FOUNDATION and not is_table and i.source not in DOORS.get(root, set()):
            wrong.append(str(i))
    assert not wrong, "\n".join(wrong)


def test_distributions_use_only_pyro_distributions(imports: list[Import]) -> None:
    wrong = [
        str(i)
        for i in imports
        if unit(i.source) == "dists"
        and i.target.split(".")[0] == "pyro"
        and not i.target.startswith("pyro.distributions")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", sorted(DOORS))
def test_library_stays_behind_its_door(imports: list[Import], library: str) -> None:
    wrong = [str(i) for i in imports if i.target.split(".")[0] == library and i.source not in DOORS[library]]
    assert not wrong, "\n".join(wrong)


def test_compact_side_names_no_pyro(imports: list[Import]) -> None:
    wrong = [str(i) for i in imports if unit(i.source) in PYRO_FREE and i.target.split(".")[0] == "pyro"]
    assert not wrong, "\n".join(wrong)


def test_compact_side_loads_without_pyro(checkout: Path, modules: dict[str, Path]) -> None:
    names = sorted(f"pyrobc.{name}" for name in PYRO_FREE if f"pyrobc.{name}" in modules)
    code = (
        f"import sys; sys.modules['pyro'] = None\nimport importlib\nfor name in {names}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_are_short(modules: dict[str, Path]) -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules.items()}
    too_long = {module: lines for module, lines in lengths.items() if lines > MAX_LINES}
    assert not too_long, f"more than {MAX_LINES} lines: {too_long}"


def test_no_module_is_a_drawer(modules: dict[str, Path]) -> None:
    vague = [name for name in modules if name.split(".")[-1] in {"utils", "util", "helpers", "misc", "common"}]
    assert not vague, f"name these after what they do: {vague}"
