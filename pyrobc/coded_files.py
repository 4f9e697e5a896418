"""The commands ``pyrobc pack`` and ``pyrobc unpack``: ``.rbc`` files from networks, and other formats from them.

Both compute first and write last, each file whole or not at all; the same input gives the same bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from pyrobc.console import make_parser, print_table
from pyrobc.errors import ConfigError, OutputError, PlanError

if TYPE_CHECKING:
    from torch import nn

    from pyrobc.plan import Plan

__all__ = ["make_pack_parser", "make_unpack_parser", "run_pack", "run_unpack"]


def make_pack_parser() -> ArgumentParser:
    """The options of ``pyrobc pack``."""
    parser = make_parser("pack", "write a network as a small coded file, quantised if widths are given")
    parser.add_argument("source", type=str | None, default=None, nargs="?", help="directory of a run, or an .rbc file")
    parser.add_argument("--output", type=str, required=True, help="the .rbc file to write")
    parser.add_argument(
        "--bits", type=int | None, default=None, help="fractional bits of weights and biases: steps 2^-B"
    )
    parser.add_argument(
        "--bits-file", type=str | None, default=None, help="JSON file: fractional bits by name of the state dict"
    )
    parser.add_argument(
        "--network", type=str | None, default=None, help="in place of a source: package.module:callable, with --weights"
    )
    parser.add_argument("--network-args", type=dict[str, Any], default={}, help="arguments of its callable")
    parser.add_argument("--weights", type=str | None, default=None, help="safetensors file with its state dict")
    return parser


def make_unpack_parser() -> ArgumentParser:
    """The options of ``pyrobc unpack``."""
    parser = make_parser("unpack", "turn a coded file into model.safetensors, model.pt2 and model.onnx")
    parser.add_argument("source", type=str, help="an .rbc file, or the directory of a run")
    parser.add_argument("--output", type=str, required=True, help="directory to write to")
    parser.add_argument(
        "--input-shape", type=str | None, default=None, help="of one example, such as 1,28,28, where the file is silent"
    )
    return parser


def run_pack(options: Namespace, command: list[str]) -> int:
    """Write an ``.rbc`` file; print its bytes, their ratio to float32, and the bits by part."""
    target = Path(options.output)
    if target.suffix != ".rbc":
        raise ConfigError("output", got=repr(str(target)), allowed="a name that ends in .rbc", fix="rename it")
    bits = _read_bits(options.bits, options.bits_file)
    net, plan, source = _find_network(options)
    if source is not None and target.exists() and target.samefile(source):
        raise ConfigError("output", got=f"the source itself, {source}", allowed="another file", fix="choose a new name")
    from pyrobc import codec

    packing = codec.pack(net, target, bits=bits)
    numbers = sum(p.numel() for p in net.parameters())
    dense = [] if plan is None else [("float32 parameters before compression", 4 * plan.parameters[0])]
    sizes = [*dense, ("float32 parameters of this network", 4 * numbers), (target.name, packing.num_bytes)]
    rows = [[name, f"{size:,}", f"{sizes[0][1] / size:.3g}\u00d7" if size else ""] for name, size in sizes]
    print_table(["", "bytes", "ratio"], rows)
    total = 8 * packing.num_bytes
    parts = [
        [name, f"{count:,.0f}", f"{count / total:.1%}", f"{count / max(numbers, 1):.3f}"]
        for name, count in [*((n, c) for n, c in packing.parts.items() if c), ("all", total)]
    ]
    print_table(["part", "bits", "share", "per parameter"], parts)
    print(f"largest change of a number: {_measure_change(net, codec.unpack(target)):.3g}")
    print(f"written: {target}")
    return 0


def run_unpack(options: Namespace, command: list[str]) -> int:
    """Write what other run times read; print each file's bytes and how far its outputs are from the network's."""
    given = None if options.input_shape is None else _parse_shape(options.input_shape)
    file = _find_file(options.source)
    import torch

    from pyrobc.export import convert, load, verify

    net = load(file)
    shape, origin = (given, "as given") if given is not None else _find_shape(net, file)
    generator = torch.Generator().manual_seed(0)
    try:
        inputs = torch.randn(2, *shape, generator=generator)
        with torch.no_grad():
            net(inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            "input shape", got=f"{_join(shape)} ({origin}): {reason}",
            allowed="the shape of one example, without the batch", fix="pass it as --input-shape 1,28,28, for instance",
        ) from error  # fmt: skip
    folder = Path(options.output)
    files = convert(net, folder, example_inputs=inputs)
    differences = verify(net, folder, inputs)
    print(f"input shape: {_join(shape)}, {origin}")
    rows = [
        [name, f"{path.stat().st_size:,}", f"{differences[name]:.2g}" if name in differences else ""]
        for name, path in files.items()
    ]
    print_table(["file", "bytes", "largest difference of outputs"], rows)
    print(f"written: {', '.join(files)} in {folder}")
    return 0


def _read_bits(bits: int | None, file: str | None) -> int | dict[str, int] | None:
    if bits is not None and file is not None:
        raise ConfigError("widths", got="--bits and --bits-file", allowed="one of them", fix="leave one out")
    if file is None:
        return bits
    allowed, fix = 'a JSON object such as {"0.weight": 4}', "write whole numbers by name of the state dict"
    try:
        widths = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"widths {file}", got=f"{type(error).__name__}: {error}", allowed=allowed, fix=fix) from error
    if not isinstance(widths, dict):
        raise ConfigError(f"widths {file}", got=type(widths).__name__, allowed=allowed, fix=fix)
    wrong = next((name for name, value in widths.items() if type(value) is not int), None)
    if wrong is not None:
        raise ConfigError(f"widths {file}: {wrong}", got=json.dumps(widths[wrong]), allowed="a whole number", fix=fix)
    return widths


def _find_network(options: Namespace) -> tuple[nn.Module, Plan | None, Path | None]:
    """The network to pack, the plan that led to it if one is there, and the file it was read from."""
    if (options.source is None) == (options.network is None):
        raise ConfigError(
            "network to pack", got="neither or both of a source and --network",
            allowed="the directory of a run, an .rbc file, or --network with --weights", fix="name one",
        )  # fmt: skip
    if options.network is None:
        if options.weights is not None or options.network_args:
            raise ConfigError("--weights", got="no --network", allowed="both", fix="name the network's callable")
        from pyrobc.export import load

        file = _find_file(options.source)
        net = load(file)
        return net, _find_plan(net, file, is_run=Path(options.source).is_dir()), file
    if options.weights is None:
        raise ConfigError("--network", got="no --weights", allowed="both", fix="name the safetensors file")
    from pyrobc.config import build_network

    return build_network(options.network, options.network_args, options.weights).eval(), None, None


def _find_file(source: str) -> Path:
    """The ``.rbc`` file that is meant."""
    path = Path(source)
    if not path.exists():
        raise OutputError(
            f"source {source}", got="no such file or directory", allowed="the directory of a run, or an .rbc file",
            fix="check the path",
        )  # fmt: skip
    if not path.is_dir():
        if path.suffix != ".rbc":
            raise ConfigError(
                "source", got=repr(source), allowed="the directory of a run, or an .rbc file",
                fix="pack the network first, from its run or with --network",
            )  # fmt: skip
        return path
    if not (path / "model.rbc").is_file():
        raise OutputError(
            f"run {source}", got="no model.rbc", allowed="a directory that holds one",
            fix="run compress again and read its notes: the format may not hold this architecture",
        )  # fmt: skip
    return path / "model.rbc"


def _find_plan(net: nn.Module, file: Path, *, is_run: bool) -> Plan | None:
    """The plan beside ``file`` if it is that of ``net``; a run's must be."""
    from pyrobc.plan import read_plan

    beside = file.with_name("plan.json")
    if not beside.is_file():
        return None
    try:
        plan = read_plan(beside)
    except PlanError:
        if is_run:
            raise
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    if shapes == plan.network_left():
        return plan
    if is_run:
        raise PlanError(
            f"plan {beside}", got="a plan of another network", allowed=f"the plan of {file.name} beside it",
            fix="save both again, or name the .rbc file instead of its directory",
        )  # fmt: skip
    return None


def _find_shape(net: nn.Module, file: Path) -> tuple[tuple[int, ...], str]:
    """The shape of one example: the plan's if it is beside, else that of a linear layer that comes first."""
    from torch import nn

    plan = _find_plan(net, file, is_run=False)
    if plan is not None and isinstance(plan.provenance.get("input_shape"), tuple | list):
        return tuple(plan.provenance["input_shape"]), "from plan.json"
    first = next(module for module in net.modules() if not isinstance(module, nn.Sequential))
    if type(first) is nn.Linear:
        return (first.in_features,), "from the first layer"
    raise ConfigError(
        "input shape", got=f"none, and a network that begins with {type(first).__name__}, which does not tell it",
        allowed="the shape of one example, without the batch", fix="pass it as --input-shape 1,28,28, for instance",
    )  # fmt: skip


def _parse_shape(text: str) -> tuple[int, ...]:
    sizes = [part.strip() for part in text.strip("()[] ").split(",")]
    if not all(size.isascii() and size.isdigit() and 0 < int(size) < 2**31 for size in sizes):
        raise ConfigError(
            "input shape", got=repr(text), allowed="positive whole numbers with commas between", fix="write 1,28,28"
        )
    return tuple(map(int, sizes))


def _join(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))


def _measure_change(net: nn.Module, packed: nn.Module) -> float:
    """Largest absolute difference between the numbers of two networks of one architecture."""
    pairs = zip(net.state_dict().values(), packed.state_dict().values(), strict=True)
    return max((float((a - b).abs().max()) for a, b in pairs if a.is_floating_point()), default=math.nan)
