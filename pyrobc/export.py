"""Files of a compact network: written whole or not at all, read back without its classes, without pickle, without Pyro.

==================  ==================================================================================================
file                content
==================  ==================================================================================================
model.safetensors   state dict; metadata: format, digest of the plan, names that share a tensor
model.pt2           the network as a torch.export program with a free batch size: ``load`` reads it
model.onnx          the same for other run times (extra ``onnx``)
model.rbc           the network with its architecture, near its entropy (``codec``), where the format holds it
posterior.nc        draws, log likelihoods, scores and candidates as netCDF, if evidence is given
plan.json           what was removed, and why; written last, so that its presence says that all is there
==================  ==================================================================================================
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc import codec
from pyrobc._version import __version__
from pyrobc.archive import export_program, quiet, read_program, write_program
from pyrobc.bits import stored_step
from pyrobc.calling import call_network, first_tensor
from pyrobc.checkpoint import write_atomically
from pyrobc.errors import MissingExtraError, OutputError
from pyrobc.kinds import check_kind
from pyrobc.plan import Plan

__all__ = ["FILES", "Files", "convert", "load", "planned_steps", "save", "verify"]

FILES = ("model.safetensors", "model.pt2", "model.onnx", "model.rbc", "posterior.nc", "plan.json")
_FORMAT = "1"
_FLOAT_BITS = 32
Writers = dict[str, Callable[[Path], object]]


class HasTree(Protocol):
    """What ``evidence`` returns: an xarray tree that can write itself."""

    tree: Any


class Files(dict[str, Path]):
    """Files written, by name; ``notes`` says what was left out, and why."""

    notes: tuple[str, ...] = ()


def save(
    net: nn.Module,
    plan: Plan,
    directory: str | Path,
    *,
    evidence: HasTree | None = None,
    example_inputs: Any = None,
    onnx: bool | Literal["auto"] = "auto",
    bits: int | Mapping[str, int] | None = None,
) -> Files:
    """Write a compact network and where it came from.

    Args:
        net: the network that ``apply`` or ``compress`` returned; it is not changed.
        plan: its plan.
        directory: made if need be; files of an earlier network are replaced, or removed if this one has no such file.
        evidence: what the decision rested on.
        example_inputs: a batch as the network sees it; zeros of the planned shape if None.
        onnx: write model.onnx; ``auto`` does so where the extra is installed.
        bits: fractional bits of the numbers in model.rbc (``codec.pack``).  None: ``plan.bits`` where it gives a tensor
            fewer than 32, every number as it is elsewhere; and a network that the format does not hold is saved without
            model.rbc, which the notes say.

    Returns:
        The files written, by name, with notes.

    Raises:
        PlanError: the plan leaves another network.
        OutputError: the directory cannot be written, its disk is full, or the network cannot be exported (or, with
            ``bits``, coded).
        MissingExtraError: ``onnx=True`` without the extra.
    """
    check_kind(net, nn.Module, "network", "a torch.nn.Module", "pass save(net, plan, directory)")
    check_kind(plan, Plan, "plan", "what bc.decide or bc.compress returns", "pass save(net, plan, directory)")
    plan.check_left({name: tuple(tensor.shape) for name, tensor in net.state_dict().items()})
    folder, digest = Path(directory), _digest(plan)
    net = copy.deepcopy(net).cpu().eval()  # what is written runs on any machine
    inputs = _zeros(plan, net) if example_inputs is None else _on_cpu(example_inputs, net)
    writers = _prepare(net, inputs, onnx, {"plan_sha256": digest})
    coded, notes = _code(net, plan, bits)
    if coded is not None:
        writers["model.rbc"] = lambda path: path.write_bytes(coded)
    if evidence is not None:
        writers["posterior.nc"] = lambda path: _write_tree(evidence.tree, path)
    writers["plan.json"] = lambda path: path.write_bytes(plan.to_json().encode())
    return _write_all(writers, folder, FILES, notes)


def convert(
    net: nn.Module, directory: str | Path, *, example_inputs: Any, onnx: bool | Literal["auto"] = "auto"
) -> Files:
    """Write a network of which no plan is known for other run times: model.safetensors, model.pt2 and model.onnx.

    Args:
        net: the network; it is not changed.
        directory: made if need be; it must not hold the files of a run.
        example_inputs: a batch as the network sees it.
        onnx: as for ``save``.

    Raises:
        OutputError: as for ``save``, or the directory holds a plan.
        MissingExtraError: ``onnx=True`` without the extra.
    """
    if (Path(directory) / "plan.json").exists():
        raise OutputError(
            f"output {directory}", got="the files of a run, with its plan", allowed="a directory without plan.json",
            fix="choose another output directory",
        )  # fmt: skip
    net = copy.deepcopy(net).cpu().eval()
    return _write_all(_prepare(net, _on_cpu(example_inputs, net), onnx, {}), Path(directory), FILES[:3], ())


def load(path: str | Path) -> nn.Module:
    """A network read back, in evaluation mode: what ``save``, ``codec.pack`` or ``pyrobc pack`` wrote.

    Neither its classes nor Pyro are needed, and nothing is unpickled.  From ``.pt2`` comes a program that takes any
    batch size, from ``.rbc`` the module itself, layer by layer.

    Args:
        path: the directory, the ``.pt2`` file in it, or any ``.rbc`` file.

    Raises:
        OutputError: it is missing or damaged, or a ``.pt2`` file lies beside the plan of another network.
    """
    file = Path(path) / "model.pt2" if Path(path).is_dir() else Path(path)
    if not file.is_file() or file.suffix not in (".pt2", ".rbc"):
        raise OutputError(
            f"network {path}", got=f"a {file.suffix or 'nameless'} file" if file.is_file() else "no such file",
            allowed="a directory that holds model.pt2, a .pt2 or an .rbc file",
            fix="name the directory" if file.is_file() else "save it",
        )  # fmt: skip
    if file.suffix == ".rbc":
        try:
            return codec.unpack(file)
        except OutputError as error:  # which does not know the name of the file
            raise OutputError(f"network {file}", got=error.got, allowed=error.allowed, fix=error.fix) from error
    net, extra = read_program(file)
    beside = file.with_name("plan.json")
    if beside.is_file():
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
        if extra.get("plan_sha256") != digest:
            raise OutputError(
                f"network {file}",
                got=f"a network of plan {extra.get('plan_sha256', 'none')[:12]}",
                allowed=f"the network of the plan beside it, {digest[:12]}",
                fix="save both again",
            )
    return net


def verify(net: nn.Module, directory: str | Path, inputs: Any) -> dict[str, float]:
    """Largest absolute difference between ``net``'s output and that of each reloaded file, by file name.

    ``model.rbc`` is among them where it was written, ``model.onnx`` where onnxruntime is installed besides.
    """
    net = copy.deepcopy(net).cpu().eval()
    inputs = _on_cpu(inputs, net)
    with torch.no_grad():
        expected = first_tensor(call_network(net, inputs))
        got = {"model.pt2": first_tensor(call_network(load(directory), inputs))}
        if (Path(directory) / "model.rbc").is_file():
            got["model.rbc"] = first_tensor(call_network(load(Path(directory) / "model.rbc"), inputs))
    file = Path(directory) / "model.onnx"
    if file.is_file() and importlib.util.find_spec("onnxruntime") is not None:
        got["model.onnx"] = torch.as_tensor(_run_onnx(file, inputs)).to(expected)
    return {name: float((value - expected).abs().max()) for name, value in got.items()}


def _prepare(net: nn.Module, inputs: Any, onnx: bool | Literal["auto"], identity: Mapping[str, str]) -> Writers:
    """All that can fail for the network's sake, done before anything is written."""
    wants_onnx = _has_onnx() if onnx == "auto" else onnx
    if wants_onnx and not _has_onnx():
        raise MissingExtraError.of("onnx", "onnx", "model.onnx")
    program, tensors = export_program(net, inputs), _to_safetensors(net, identity)
    writers: Writers = {
        "model.safetensors": lambda path: path.write_bytes(tensors),
        "model.pt2": lambda path: write_program(program, path, **identity),
    }
    if wants_onnx:
        graph = _to_onnx(program)
        writers["model.onnx"] = lambda path: path.write_bytes(graph)
    return writers


def _write_all(writers: Writers, folder: Path, names: Sequence[str], notes: tuple[str, ...]) -> Files:
    """Write in the order of ``names``; one that this network does not have is removed."""
    if "plan.json" in names:
        with contextlib.suppress(OSError):
            (folder / "plan.json").unlink()  # what is there is incomplete until the new plan is
    for name in names:
        if name in writers:
            write_atomically(folder / name, writers[name])
        else:
            (folder / name).unlink(missing_ok=True)
    files = Files({name: folder / name for name in names if name in writers})
    files.notes = notes
    return files


def _code(net: nn.Module, plan: Plan, bits: int | Mapping[str, int] | None) -> tuple[bytes | None, tuple[str, ...]]:
    """The bytes of model.rbc, or a note why there are none."""
    if bits is not None:
        return codec.encode(net, bits=bits)[0], ()
    try:
        return codec.encode(net, steps=planned_steps(plan, net.state_dict()))[0], ()
    except OutputError as error:
        reason = f"{error.subject}: {error.got}, which the format does not hold"
    except Exception as error:  # one more copy of the network must not cost a run its results
        reason = f"{type(error).__name__}: {error}"
    return None, (f"model.rbc was left out: {reason}",)


def planned_steps(plan: Plan, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Step of each tensor that the plan puts on a grid: by ``plan.bits``, or of the grid that it was fitted on.

    The latter only where all numbers still lie on it.
    """
    real = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    widths = {name: bits for name, bits in plan.bits.items() if bits < _FLOAT_BITS and name in real}
    fitted = {name: step for name, step in plan.rule.get("steps", {}).items() if name in real}
    lying = {n: step for n, step in fitted.items() if torch.equal((real[n] / step).round() * step, real[n])}
    return {name: stored_step(real[name], bits) for name, bits in widths.items()} | lying


def _has_onnx() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript"))


def _digest(plan: Plan) -> str:
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def _zeros(plan: Plan, net: nn.Module) -> Tensor:
    shape = plan.provenance.get("input_shape")
    if shape is None:
        raise OutputError(
            "export", got="a plan without input_shape", allowed="example inputs", fix="pass example_inputs=x[:1]"
        )
    return next(iter(net.parameters())).detach().new_zeros(1, *shape)


def _on_cpu(value: Any, net: nn.Module) -> Any:
    """Inputs where and as ``net`` wants them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", next(net.parameters()).dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, Mapping):
        return {key: _on_cpu(part, net) for key, part in value.items()}
    return tuple(_on_cpu(part, net) for part in value)


def _to_safetensors(net: nn.Module, identity: Mapping[str, str]) -> bytes:
    """A tensor that has several names is written under the first; metadata maps the others to it."""
    from safetensors.torch import save as to_bytes

    names: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    tensors, aliases = {}, {}
    for name, tensor in net.state_dict().items():
        key = (tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride())
        if key in names:
            aliases[name] = names[key]
        else:
            names[key] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    metadata = {
        "format": "pt",
        "pyrobc_format": _FORMAT,
        "pyrobc_version": __version__,
        **identity,
        "aliases": json.dumps(aliases),
    }
    return _sort_metadata(to_bytes(tensors, metadata))


def _sort_metadata(data: bytes) -> bytes:
    """The same file with its metadata in alphabetical order: the library's own order differs from run to run."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _to_onnx(program: torch.export.ExportedProgram) -> bytes:
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        exported = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["output"])
    if exported is None:
        raise OutputError("model.onnx", got="no program", allowed="an ONNX program", fix="pass onnx=False")
    return bytes(exported.model_proto.SerializeToString())


def _run_onnx(file: Path, inputs: Any) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    if isinstance(inputs, Mapping):
        values = [inputs[name] for name in names]
    else:
        values = list(inputs) if isinstance(inputs, tuple) else [inputs]
    feed = {name: np.asarray(value.detach().cpu()) for name, value in zip(names, values, strict=True)}
    return session.run(None, feed)[0]


def _write_tree(tree: Any, path: Path) -> None:
    tree.to_netcdf(path, engine="h5netcdf")
