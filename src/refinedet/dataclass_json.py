"""Dataclasses as JSON files and back, with one clear line for a bad file; the format of every config.json.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from refinedet.errors import RefineDetError, did_you_mean
from refinedet.files import read_json, write_text

ConfigT = TypeVar("ConfigT")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings of a config, ready for JSON."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"not a config: {config!r}")
    return dataclasses.asdict(config)


def from_dict(kind: type[ConfigT], values: Any, *, source: str = "config") -> ConfigT:
    """The config of class ``kind`` that ``to_dict`` wrote. Missing keys take their defaults.

    Raises:
        RefineDetError: an unknown key (the nearest one is suggested) or a value of the wrong type; ``source`` is
            named in the message.
    """
    result = _convert(kind, values, source)
    return typing.cast(ConfigT, result)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise RefineDetError(f"{where}: expected an object with named values, found {value!r}")
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        for key in value:
            if key not in names:
                hint = did_you_mean(str(key), names, otherwise="")
                raise RefineDetError(f"{where}: unknown key '{key}'" + (f", {hint}" if hint else ""))
        arguments = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in value.items()}
        try:
            return kind(**arguments)
        except RefineDetError as error:
            raise RefineDetError(f"{where}: {error}") from None
        except TypeError as error:
            raise RefineDetError(f"{where}: {str(error).split('() ')[-1]}") from None
    origin, arguments_of = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments_of:
            return value
        raise RefineDetError(f"{where}: must be one of {', '.join(map(repr, arguments_of))}, not {value!r}")
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments_of:
            return None
        return _convert(next(a for a in arguments_of if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RefineDetError(f"{where}: expected a list, found {value!r}")
        kinds = [arguments_of[0]] * len(value) if arguments_of[-1] is Ellipsis else list(arguments_of)
        if len(kinds) != len(value):
            raise RefineDetError(f"{where}: expected {len(kinds)} values, found {len(value)}")
        return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise RefineDetError(f"{where}: a number beyond any that a computer calculates with") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RefineDetError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings with their names joined by dots.

    Example:
        >>> dict(flatten({"train": {"batch_size": 32}, "summary": "a"}))
        {'train.batch_size': 32, 'summary': 'a'}
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def save_json(config: Any, path: Path) -> None:
    """Write a config as indented JSON.

    Raises:
        RefineDetError: no permission, a full disk; what ``path`` held before is still there.
    """
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_json(kind: type[ConfigT], path: Path) -> ConfigT:
    """Read what ``save_json`` wrote.

    Raises:
        RefineDetError: the file is missing, is no JSON, or holds an unknown key; the message names the file.
    """
    return from_dict(kind, read_json(path), source=str(path))
