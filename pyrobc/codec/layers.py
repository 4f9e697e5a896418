"""Layers of an ``.rbc`` file: the ones there are, their settings as fields, and empty layers from fields.

A layer is its number in ``LAYERS``; then its required settings; then a flag (probability 1/8), whether optional
settings differ from their defaults, and if so a flag for each and those that differ.  Sizes are numbers.  *Sizes in
several dimensions*: a flag (probability 7/8), whether all are equal; then one or all of them.  *Incoming channels or
features*: if an earlier layer has some, a flag (7/8), whether they are as many as the last one's; if not, how many.
Nothing here names a class that is not in the table, so a file cannot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyrobc.codec.coder import damaged
from pyrobc.codec.format import MAX_NUMBER, FieldReader, FieldWriter
from pyrobc.errors import OutputError
from pyrobc.slicing import SelectLinear

__all__ = [
    "NAMED", "SEQUENTIAL", "Layer", "build_layer", "describe_layer", "find_channels", "put_kind", "read_layer",
    "take_kind", "write_layer",
]  # fmt: skip

SEQUENTIAL, NAMED = 0, 31
"""Numbers of a ``Sequential`` whose children are named 0, 1, 2, ..., and of one with other names."""
MAX_SETTING = 4096
"""Largest kernel, stride, padding and dilation."""
_LIKELY, _UNLIKELY = 57344, 8192  # 7/8 and 1/8


@dataclass(frozen=True)
class Setting:
    """An argument of a layer.  ``code``: size, count, flag, signed, real, or sizes and counts in ``num`` dimensions."""

    name: str
    code: str
    default: Any = None
    num: int = 0


@dataclass(frozen=True)
class Kind:
    """A layer class, what it must be told, and what it may be told (up to eight settings)."""

    cls: type[nn.Module]
    required: tuple[Setting, ...] = ()
    optional: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A layer as data: its number in ``LAYERS`` and its arguments."""

    number: int
    settings: Mapping[str, Any]


def _conv(cls: type[nn.Module], num: int) -> Kind:
    return Kind(
        cls,
        (
            Setting("in_channels", "channels"),
            Setting("out_channels", "channels"),
            Setting("kernel_size", "size", num=num),
        ),
        (
            Setting("stride", "size", (1,) * num, num),
            Setting("padding", "count", (0,) * num, num),
            Setting("dilation", "size", (1,) * num, num),
            Setting("groups", "channels", 1),
            Setting("bias", "flag", True),
            Setting("padding_mode", "mode", "zeros"),
        ),
    )


def _pool(cls: type[nn.Module], num: int, *others: Setting) -> Kind:
    return Kind(
        cls,
        (Setting("kernel_size", "size", num=num),),
        (Setting("stride", "size", "kernel_size", num), Setting("padding", "count", (0,) * num, num), *others),
    )


def _norm(cls: type[nn.Module]) -> Kind:
    return Kind(
        cls,
        (Setting("num_features", "channels"),),
        (
            Setting("eps", "real", 1e-5),
            Setting("momentum", "momentum", 0.1),
            Setting("affine", "flag", True),
            Setting("track_running_stats", "flag", True),
        ),
    )


_CEIL = Setting("ceil_mode", "flag", False)
_INPLACE = Setting("inplace", "flag", False)
_COUNT_PAD = Setting("count_include_pad", "flag", True)
_FEATURES = (Setting("in_features", "channels"), Setting("out_features", "channels"))
_BIAS = (Setting("bias", "flag", True),)

# The numbers are part of the format: a new layer takes the next one.
LAYERS: dict[int, Kind] = {
    1: Kind(nn.Flatten, (), (Setting("start_dim", "signed", 1), Setting("end_dim", "signed", -1))),
    2: Kind(nn.Linear, _FEATURES, _BIAS),
    3: Kind(SelectLinear, _FEATURES, _BIAS),
    4: _conv(nn.Conv1d, 1),
    5: _conv(nn.Conv2d, 2),
    6: _norm(nn.BatchNorm1d),
    7: _norm(nn.BatchNorm2d),
    8: Kind(nn.ReLU, (), (_INPLACE,)),
    9: Kind(nn.Tanh),
    10: Kind(nn.Sigmoid),
    11: Kind(nn.GELU, (), (Setting("approximate", "approximation", "none"),)),
    12: Kind(nn.SiLU, (), (_INPLACE,)),
    13: _pool(nn.MaxPool1d, 1, Setting("dilation", "size", (1,), 1), _CEIL),
    14: _pool(nn.MaxPool2d, 2, Setting("dilation", "size", (1, 1), 2), _CEIL),
    15: _pool(nn.AvgPool1d, 1, _CEIL, _COUNT_PAD),
    16: _pool(nn.AvgPool2d, 2, _CEIL, _COUNT_PAD),
    17: Kind(nn.Dropout, (), (Setting("p", "real", 0.5), _INPLACE)),
    18: Kind(nn.Identity),
    19: Kind(nn.AdaptiveAvgPool2d, (Setting("output_size", "size", num=2),)),
}
_NUMBERS = {kind.cls: number for number, kind in LAYERS.items()}
_WORDS = {"mode": ("zeros", "reflect", "replicate", "circular"), "approximation": ("none", "tanh")}


def describe_layer(module: nn.Module, name: str) -> Layer:
    """A layer as data.

    Raises:
        OutputError: it is none of ``LAYERS``, or uses a setting that the format does not hold.
    """
    number = _NUMBERS.get(type(module))
    if number is None:
        known = ", ".join(["Sequential", *(kind.cls.__name__ for kind in LAYERS.values())])
        raise OutputError(
            f"layer {name or 'network'}", got=type(module).__name__, allowed=f"a tree of {known}",
            fix="write this network with pyrobc.save (model.pt2), or rebuild it from these layers",
        )  # fmt: skip
    kind = LAYERS[number]
    settings = {s.name: _get(module, s, name) for s in (*kind.required, *kind.optional)}
    unusual = next((a for a in ("return_indices", "divisor_override") if getattr(module, a, None)), None)
    unusual = unusual or ("hooks" if module._forward_hooks or module._forward_pre_hooks else None)
    if unusual is not None:
        raise _refuse(name, unusual, "none")
    return Layer(number, settings)


def write_layer(layer: Layer, out: FieldWriter, channels: int) -> None:
    """Append a layer's settings; ``channels`` come out of the layer before, 0 if unknown."""
    kind = LAYERS[layer.number]
    for setting in kind.required:
        _put(out, setting, layer.settings[setting.name], channels)
    differs = [layer.settings[s.name] != _default(s, layer.settings) for s in kind.optional]
    if kind.optional:
        out.put_flag(any(differs), _UNLIKELY)
    if any(differs):
        for setting, differing in zip(kind.optional, differs, strict=True):
            out.put_flag(differing)
            if differing:
                _put(out, setting, layer.settings[setting.name], channels)


def read_layer(number: int, reader: FieldReader, channels: int) -> Layer:
    """The layer whose number is already taken."""
    kind = LAYERS.get(number)
    if kind is None:
        raise damaged(f"a layer of unknown number {number}")
    settings = {s.name: _take(reader, s, channels) for s in kind.required}
    some_differ = bool(kind.optional) and reader.take_flag(_UNLIKELY)
    for setting in kind.optional:
        is_given = some_differ and reader.take_flag()
        settings[setting.name] = _take(reader, setting, channels) if is_given else _default(setting, settings)
    _check(settings)
    return Layer(number, settings)


def put_kind(out: FieldWriter, number: int, last: int) -> None:
    """Append a number after a layer of number ``last``: a flag, whether it is the usual one; if not, five bits."""
    usual = _USUAL.get(last, SEQUENTIAL)
    out.put_flag(number == usual, _LIKELY)
    if number != usual:
        out.put_bits(number, 5)


def take_kind(reader: FieldReader, last: int) -> int:
    """What ``put_kind`` wrote."""
    return _USUAL.get(last, SEQUENTIAL) if reader.take_flag(_LIKELY) else reader.take_bits(5)


# What usually comes after a layer; before all is a Sequential.
_USUAL = {SEQUENTIAL: 3, 1: 2, 2: 8, 3: 8, 4: 8, 5: 14, 6: 8, 7: 8, 8: 2, 13: 4, 14: 5, 17: 2}


def find_channels(layer: Layer, channels: int) -> int:
    """What comes out of a layer if ``channels`` come in."""
    return int(layer.settings.get("out_features") or layer.settings.get("out_channels") or channels)


def build_layer(layer: Layer) -> nn.Module:
    """The layer with tensors that have shapes but no memory; random generators are left alone."""
    cls = LAYERS[layer.number].cls
    settings = {name: _collapse(value) for name, value in layer.settings.items()}
    if "bias" in settings or "affine" in settings:
        settings["device"] = "meta"
    try:
        if cls is SelectLinear:
            return SelectLinear(nn.Linear(**settings), torch.zeros(settings["in_features"], device="meta").long())
        return cls(**settings)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise damaged(f"a {cls.__name__} that cannot be ({error})") from error


def _collapse(value: Any) -> Any:
    """Equal sizes as one number: pools print what they were given."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _check(settings: Mapping[str, Any]) -> None:
    """Refuse what torch would accept now and fail on later."""
    numbers = [math.prod(v) if isinstance(v, tuple) else v for k, v in settings.items() if k in _FACTORS]
    if math.prod(numbers) > MAX_NUMBER:
        raise damaged("a layer of too many weights")
    groups = settings.get("groups", 1)
    if settings.get("in_channels", 0) % groups or settings.get("out_channels", 0) % groups:
        raise damaged("channels that the groups do not divide")
    if "groups" not in settings and any(
        2 * pad > size for pad, size in zip(settings.get("padding", ()), settings.get("kernel_size", ()), strict=False)
    ):
        raise damaged("a pool that is padded by more than half of its kernel")
    if not 0.0 <= settings.get("p", 0.0) <= 1.0 or settings.get("eps", 0.0) < 0.0:
        raise damaged("a probability or an epsilon out of range")


_FACTORS = ("in_features", "out_features", "in_channels", "out_channels", "num_features", "kernel_size")


def _default(setting: Setting, settings: Mapping[str, Any]) -> Any:
    return settings["kernel_size"] if setting.default == "kernel_size" else setting.default


def _get(module: nn.Module, setting: Setting, layer: str) -> Any:
    value = getattr(module, setting.name)
    if setting.name == "bias":
        return value is not None
    if setting.num:
        if not isinstance(value, int | tuple | list):
            raise _refuse(layer, f"{setting.name}={value!r}", "numbers")
        value = (value,) * setting.num if isinstance(value, int) else tuple(value)
        if None in value:
            raise _refuse(layer, f"{setting.name}={value}", "numbers")
        if max(value) > MAX_SETTING:
            raise _refuse(layer, f"{setting.name}={value}", f"up to {MAX_SETTING}")
    return value


def _refuse(layer: str, got: str, allowed: str) -> OutputError:
    return OutputError(
        f"layer {layer or 'network'}", got=got, allowed=allowed, fix="write this network with pyrobc.save (model.pt2)"
    )


def _put(out: FieldWriter, setting: Setting, value: Any, channels: int) -> None:
    if setting.num:
        is_even = len(set(value)) == 1
        if setting.num > 1:
            out.put_flag(is_even, _LIKELY)
        for part in value[:1] if is_even else value:
            out.put_number(part)
    elif setting.code == "signed":
        out.put_signed(value)
    elif setting.code in ("real", "momentum"):
        out.put_double(-1.0 if value is None else value)
    elif setting.code in _WORDS:
        out.put_bits(_WORDS[setting.code].index(value), 2)
    elif setting.code == "flag":
        out.put_flag(value)
    else:
        if setting.name in _INCOMING and channels:
            out.put_flag(value == channels, _LIKELY)
        if setting.name not in _INCOMING or value != channels:
            out.put_number(value)


def _take(reader: FieldReader, setting: Setting, channels: int) -> Any:
    if setting.num:
        least = 1 if setting.code == "size" else 0
        is_even = setting.num == 1 or reader.take_flag(_LIKELY)
        if is_even:
            return (reader.take_number(least, MAX_SETTING),) * setting.num
        return tuple(reader.take_number(least, MAX_SETTING) for _ in range(setting.num))
    if setting.code == "signed":
        return reader.take_signed(-64, 64)
    if setting.code in ("real", "momentum"):
        value = reader.take_double()
        return None if setting.code == "momentum" and value == -1.0 else value
    if setting.code in _WORDS:
        word = reader.take_bits(2)
        if word >= len(_WORDS[setting.code]):
            raise damaged("a setting of an unknown word")
        return _WORDS[setting.code][word]
    if setting.code == "flag":
        return reader.take_flag()
    if setting.name in _INCOMING and channels and reader.take_flag(_LIKELY):
        return channels
    return reader.take_number(minimum=1)


_INCOMING = ("in_features", "in_channels", "num_features")
