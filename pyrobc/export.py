"""Files of a compact network: written whole or not at all, read back without its classes, without pickle, without Pyro.

==================  ==================================================================================================
file                content
==================  ==================================================================================================
model.safetensors   state dict; metadata: format, digest of the plan, names that share a tensor
model.pt2           the network as a torch.export program with a free batch size: ``load`` reads it
model.onnx          the same for other run times (extra ``onnx``)
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pyrobc._version import __version__
from pyrobc.archive import ExportedNetwork, export_program, quiet, read_program, write_program
from pyrobc.checkpoint import write_atomically
from pyrobc.dependency import first_tensor
from pyrobc.errors import MissingExtraError, OutputError
from pyrobc.plan import Plan
from pyrobc.slicing import call_network

__all__ = ["FILES", "load", "save", "verify"]

FILES = ("model.safetensors", "model.pt2", "model.onnx", "posterior.nc", "plan.json")
_FORMAT = "1"


class HasTree(Protocol):
    """What ``evidence`` returns: an xarray tree that can write itself."""

    tree: Any


def save(
    net: nn.Module,
    plan: Plan,
    directory: str | Path,
    *,
    evidence: HasTree | None = None,
    example_inputs: Any = None,
    onnx: bool | Literal["auto"] = "auto",
) -> dict[str, Path]:
    """Write a compact network and where it came from.

    Args:
        net: the network that ``apply`` or ``compress`` returned; it is not changed.
        plan: its plan.
        directory: made if need be; files of an earlier network are replaced, or removed if this one has no such file.
        evidence: what the decision rested on.
        example_inputs: a batch as the network sees it; zeros of the planned shape if None.
        onnx: write model.onnx; ``auto`` does so where the extra is installed.

    Returns:
        The files written, by name.

    Raises:
        OutputError: the directory cannot be written, its disk is full, or the network cannot be exported.
        MissingExtraError: ``onnx=True`` without the extra.
    """
    wants_onnx = _has_onnx() if onnx == "auto" else onnx
    if wants_onnx and not _has_onnx():
        raise MissingExtraError.of("onnx", "onnx", "model.onnx")
    folder, digest = Path(directory), _digest(plan)
    net = copy.deepcopy(net).cpu().eval()  # what is written runs on any machine
    program = export_program(net, _zeros(plan, net) if example_inputs is None else _on_cpu(example_inputs, net))
    content = {"model.safetensors": _to_safetensors(net, digest)}
    if wants_onnx:
        content["model.onnx"] = _to_onnx(program)
    with contextlib.suppress(OSError):
        (folder / "plan.json").unlink()  # what is there is incomplete until the new plan is
    for name, data in content.items():
        write_atomically(folder / name, lambda path, data=data: _write(path, data))  # type: ignore[misc]
    write_atomically(folder / "model.pt2", lambda path: write_program(program, path, plan_sha256=digest))
    if evidence is not None:
        write_atomically(folder / "posterior.nc", lambda path: _write_tree(evidence.tree, path))
    for name in FILES:
        if (name == "model.onnx" and not wants_onnx) or (name == "posterior.nc" and evidence is None):
            (folder / name).unlink(missing_ok=True)
    write_atomically(folder / "plan.json", lambda path: _write(path, plan.to_json().encode()))
    return {name: folder / name for name in FILES if (folder / name).exists()}


def load(path: str | Path) -> ExportedNetwork:
    """The network that ``save`` wrote, ready to be called with any batch size.

    Neither its classes nor Pyro are needed, and nothing is unpickled.

    Args:
        path: the directory, or the ``.pt2`` file in it.

    Raises:
        OutputError: it is missing or damaged, or lies beside the plan of another network.
    """
    file = Path(path) / "model.pt2" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise OutputError(
            f"network {path}", got="no such file", allowed="a directory that holds model.pt2", fix="save it"
        )
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

    ``model.onnx`` is among them where it was written and onnxruntime is installed.
    """
    net = copy.deepcopy(net).cpu().eval()
    inputs = _on_cpu(inputs, net)
    with torch.no_grad():
        expected = first_tensor(call_network(net, inputs))
        got = {"model.pt2": first_tensor(call_network(load(directory), inputs))}
    file = Path(directory) / "model.onnx"
    if file.is_file() and importlib.util.find_spec("onnxruntime") is not None:
        got["model.onnx"] = torch.as_tensor(_run_onnx(file, inputs)).to(expected)
    return {name: float((value - expected).abs().max()) for name, value in got.items()}


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


def _to_safetensors(net: nn.Module, digest: str) -> bytes:
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
        "plan_sha256": digest,
        "aliases": json.dumps(aliases),
    }
    return to_bytes(tensors, metadata)


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


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_tree(tree: Any, path: Path) -> None:
    tree.to_netcdf(path, engine="h5netcdf")
