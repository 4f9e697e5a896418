"""A run file and its command-line options, turned into the arguments of ``compress``.

Every key of the file is an option too (``--epochs 30``, ``--data.train train.npz``), and an option wins over the file.
Nothing heavy is imported before the settings are known to be well formed.  Import paths and files are relative to the
working directory, and arrays are read without unpickling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jsonargparse

from pyrobc.errors import ConfigError, suggest

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DataConfig",
    "RunConfig",
    "add_run_options",
    "build_network",
    "build_run",
    "parse",
    "read_config",
    "to_config",
]

BUILT_IN = {
    "lenet_300_100": "mlp", "lenet_5": "lenet", "lenet_5_caffe": "lenet", "mlp": "mlp", "resnet_20": "resnet",
    "resnet_32": "resnet", "resnet_50": "resnet", "vgg_16": "vgg", "vit_tiny": "vit",
}  # fmt: skip
"""Networks that come with the package: name to module of ``pyrobc.models``."""

Source = str | dict[str, str]


def _key(words: str, default: Any = dataclasses.MISSING) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": words})
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from."""

    train: Source = _key(
        "rows to train and decide on: an .npz with arrays x and y, {x: a.npy, y: b.npy}, or package.module:dataset"
    )
    validation: Source | None = _key("rows for early stopping, with patience, as above", None)
    test: Source | None = _key("rows for the table, read once at the end, as above", None)


@dataclass(frozen=True)
class RunConfig:
    """What a run file may hold; see ``compress`` for the meaning of its settings."""

    model: str = _key(f"package.module:callable, or one of {', '.join(BUILT_IN)}")
    data: DataConfig = _key("")
    model_args: dict[str, Any] = _key("arguments of the model's callable", {})
    state_dict: str | None = _key("safetensors file of a trained network to start from", None)
    likelihood: str = _key("categorical, normal or bernoulli", "categorical")
    family: str = _key("sparsity method, group_horseshoe for instance; pyrobc doctor lists all", "log_uniform")
    family_args: dict[str, Any] = _key("its settings", {})
    epochs: int = _key("epochs of the first fit", 60)
    readapt_epochs: int | None = _key("epochs after each cut; a quarter of epochs if null", None)
    rounds: int = _key("cuts at most", 1)
    batch_size: int = _key("rows per step", 128)
    lr: float = _key("learning rate", 3e-3)
    seed: int = _key("of all randomness, initial weights included", 0)
    temperature: float = _key("weight of the KL; 1 is the ELBO", 1.0)
    warmup_epochs: int = _key("epochs of growing KL weight", 0)
    clip_norm: float | None = _key("largest gradient norm", None)
    autocast: bool = _key("whether fits compute the network's products in bfloat16", False)
    patience: int | None = _key("epochs without a better validation loss before stopping", None)
    reduction: str | None = _key("reduced prior or baseline; the family's default if null", None)
    epsilon: float = _key("largest negligible share of a layer's input", 0.01)
    prior_odds: Literal["implied", "learned", "none"] | float = _key(
        "implied, learned, a probability, or none for the bare Bayes factor", "implied"
    )
    max_worse: float = _key("standard errors by which the reduced ELPD may fall short", 2.0)
    budget: int | None = _key("largest number of parameters", None)
    rule: str | dict[str, Any] | None = _key(
        "decision rule in place of the default: predictive, {false_prune_rate: {level: 0.05}}, {all: [...]}, ...", None
    )
    round_to: int = _key("channels that each block keeps a multiple of", 1)
    prune_each_epoch: bool = _key("whether groups leave after every epoch of the first fit already", False)
    keep_weights: int | float | Literal["odds"] | None = _key(
        "weights that stay inside the groups: a number, a share of the dense parameters, or odds", None
    )
    coarseness: float | None = _key("step of the grids of numbers, in posterior standard deviations", None)
    support_weight: float = _key("of a prior by which weights amid others stay, 0 to 1", 0.0)
    num_draws: int = _key("posterior draws for the evidence", 200)
    evidence_rows: int = _key("training rows the evidence looks at", 1000)
    device: str | None = _key("cpu, cuda, cuda:1, ...", None)
    dtype: Literal["float32", "float64"] = _key("floating-point type", "float32")
    output: str = _key("directory for everything the run writes", "runs/compress")


def add_run_options(parser: jsonargparse.ArgumentParser) -> None:
    """Give ``parser`` the option ``--config`` and one for every key."""
    read_file = jsonargparse.ActionConfigFile  # type: ignore[attr-defined]
    parser.add_argument("--config", action=read_file, help="YAML file with any of the keys below")
    for prefix, owner in (("", RunConfig), ("data.", DataConfig)):
        hints = typing.get_type_hints(owner)
        for part in dataclasses.fields(owner):
            if part.name == "data":
                continue
            default = part.default_factory() if callable(part.default_factory) else part.default
            given = {"required": True} if default is dataclasses.MISSING else {"default": default}
            words = {"help": part.metadata["help"], "type": hints[part.name]}
            parser.add_argument(f"--{prefix}{part.name}", **given, **words)


def read_config(path: str | Path, options: Sequence[str] = ()) -> RunConfig:
    """The settings of a run file, with command-line options on top.

    Raises:
        ConfigError: the file is missing or is not YAML, or a key or a value is wrong.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_run_options(parser)
    return to_config(parse(parser, ["--config", str(path), *options]))


def to_config(values: jsonargparse.Namespace) -> RunConfig:
    """A parsed namespace as a ``RunConfig``."""
    settings = values.as_dict()
    data = DataConfig(**settings["data"])
    return RunConfig(**{f.name: settings[f.name] for f in dataclasses.fields(RunConfig) if f.name != "data"}, data=data)


def parse(parser: jsonargparse.ArgumentParser, arguments: Sequence[str]) -> jsonargparse.Namespace:
    """``parser.parse_args`` whose refusals are one line and name the nearest choice.

    Raises:
        ConfigError: an option, a key or a value is wrong.
    """
    try:
        return parser.parse_args(list(arguments))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise _explain(" ".join(str(error).split()), parser.format_help()) from error


def _explain(message: str, help_text: str) -> ConfigError:
    """What jsonargparse said, with the nearest option or key named."""
    options = re.findall(r"--[a-z][\w.-]*", help_text)
    if unknown := re.search(r"unrecognized arguments: (\S+)", message):
        name = unknown[1]
        allowed = "options of this command, see --help" if name.startswith("-") else "no further argument"
        fix = suggest(name.partition("=")[0], set(options)) if name.startswith("-") else "remove it"
        return ConfigError("option" if name.startswith("-") else "argument", got=repr(name), allowed=allowed, fix=fix)
    if unknown := re.search(r"(?:[Kk]ey|[Oo]ption) '([^']+)'(?: is not (?:accepted|expected)|$)", message):
        name = unknown[1]
        keys = [f.name for f in dataclasses.fields(RunConfig)] + [
            f"data.{f.name}" for f in dataclasses.fields(DataConfig)
        ]
        near = [key for key in keys if key.count(".") == name.count(".")] or keys
        return ConfigError("run file", got=f"the key {name!r}", allowed=", ".join(near), fix=suggest(name, near))
    if missing := re.search(r"arguments are required: ([^\s,]+)", message):
        has_file = ", or put it in the run file" if "--config" in options else ""
        fix = f"give --{missing[1]}{has_file}" if f"--{missing[1]}" in options else "see --help"
        return ConfigError("settings", got=f"no {missing[1]}", allowed=f"a value for {missing[1]}", fix=fix)
    wrong = re.search(r'Parser key "([^"]+)":? ?(.*)', message)
    subject, got = (f"setting {wrong[1]}", wrong[2]) if wrong else ("settings", message)
    if "parsing config" in message or "Unexpected config" in message:
        return ConfigError("run file", got=message, allowed="YAML with one key per setting", fix="correct the file")
    if union := re.search(r"Subtypes: \[(.*)\] Errors: .* Given value: (\S+)", got):
        names = re.sub(r"<class '([^']+)'>|typing\.", r"\1", union[1])
        return ConfigError(subject, got=repr(union[2]), allowed=names, fix="correct the value")
    if typed := re.search(r"Expected an? (.*?)\. Got value: (.*)", got):
        name = re.sub(r"<class '([^']+)'>", r"\1", typed[1])
        return ConfigError(subject, got=repr(typed[2]), allowed=name, fix="correct the value")
    return ConfigError(subject, got=got, allowed="see --help", fix="correct the value")


def build_run(config: RunConfig) -> dict[str, Any]:
    """The arguments of ``compress`` that a configuration stands for; reads files and imports the user's code.

    Raises:
        ConfigError: an import path or a state dict cannot be used.
        DataError: data cannot be used.
    """
    import torch

    from pyrobc.settings import check_device

    check_device(config.device)
    net = build_network(config.model, config.model_args, config.state_dict, seed=config.seed)
    with _importing_from_here():
        dtype = getattr(torch, config.dtype)
        sources = {"data": config.data.train, "validation": config.data.validation, "test": config.data.test}
        data = {name: _read_data(name, source, config) for name, source in sources.items() if source is not None}
    replaced = {"model", "data", "model_args", "state_dict", "dtype"}
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in replaced}
    return {"net": net.to(dtype), **data, **settings, "dtype": dtype}


def build_network(model: str, arguments: Mapping[str, Any], state_dict: str | None, *, seed: int = 0) -> nn.Module:
    """The network of an import path or a built-in name, with the weights of a safetensors file if one is named.

    Raises:
        ConfigError: it cannot be built, or the weights are not its own.
    """
    from torch import nn

    from pyrobc.batches import seeded

    with _importing_from_here():
        build = _find_model(model)
        with seeded(seed), _blaming(f"model {model!r}", "arguments that the callable takes"):
            net = build(**arguments)
        if not isinstance(net, nn.Module):
            raise ConfigError(
                f"model {model!r}", got=type(net).__name__, allowed="a callable that returns a torch.nn.Module",
                fix="point at the function or class that builds the network",
            )  # fmt: skip
        if state_dict is not None:
            _load_state(net, state_dict)
    return net


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """The working directory at the head of the import path, as for ``python -m``; put back afterwards."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _blaming(subject: str, allowed: str) -> Iterator[None]:
    """Whatever the user's code raises, said in one line."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            subject, got=f"{type(error).__name__}: {error}", allowed=allowed, fix="try the same call in Python"
        ) from error


def _find_model(path: str) -> Any:
    if ":" in path:
        return _import_path("model", path)
    if path not in BUILT_IN:
        raise ConfigError(
            "model", got=repr(path), allowed=f"package.module:callable, or one of {', '.join(BUILT_IN)}",
            fix=suggest(path, BUILT_IN),
        )  # fmt: skip
    module = importlib.import_module(f"pyrobc.models.{BUILT_IN[path]}")
    return module.build if path == "mlp" else getattr(module, path)


def _import_path(subject: str, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    with _blaming(f"{subject} {path!r}", "package.module:name, importable from the working directory"):
        module: types.ModuleType = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(
            f"{subject} {path!r}", got=f"no {attribute!r} in {module_name}", allowed="a name in that module",
            fix=suggest(attribute, public),
        )  # fmt: skip
    return getattr(module, attribute)


def _load_state(net: Any, path: str) -> None:
    from safetensors.torch import load_file

    with _blaming(f"state_dict {path}", "a safetensors file of this network"):
        net.load_state_dict(load_file(path))


def _read_data(name: str, source: Source, config: RunConfig) -> Any:
    import torch

    from pyrobc.batches import no_rows

    if isinstance(source, str) and ":" in source and not Path(source).exists():
        dataset = _import_path(name, source)
        if callable(dataset) and not hasattr(dataset, "__getitem__"):
            with _blaming(f"{name} {source!r}", "a callable without arguments, or a data set"):
                dataset = dataset()
        is_sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not is_sized or isinstance(dataset, torch.nn.Module):
            raise ConfigError(
                f"{name} {source!r}", got=type(dataset).__name__, allowed="a torch Dataset with a length",
                fix="return one from the callable",
            )  # fmt: skip
        if len(dataset) == 0:
            raise no_rows(name)
        order = torch.Generator().manual_seed(config.seed)
        is_training = name == "data"
        rows = config.batch_size if is_training else 1024
        return torch.utils.data.DataLoader(dataset, rows, shuffle=is_training, generator=order)
    from pyrobc.arrays import read_arrays

    dtype = getattr(torch, config.dtype)
    return read_arrays(source, are_labels=config.likelihood == "categorical", dtype=dtype)
