"""Strict parsing of plain YAML values into frozen dataclasses; errors name the nested key.

Not pydantic (2.14, measured): it would replace the 95 lines of `parse` and `_convert`, but a section with some keys set
loses the method's defaults of the others (`times: {mean: 0}` of consistency gets std 1.0, not 1.8), `true` passes as
1.0, messages have three lines per fault and need mapping, and importing it takes 0.3 s.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
import types
import typing
from pathlib import Path
from typing import Any

from .yaml_reader import ConfigError as ConfigError
from .yaml_reader import read_yaml


def parse(cls: type, data: dict[str, Any], where: str, default: object = None) -> Any:
    """Parse a mapping into a dataclass; unknown keys and wrong types raise ConfigError.

    where: dotted path for messages. default: instance with the values of missing keys; None: the class defaults.
    """
    known = [f.name for f in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    place = where.removeprefix("config").removeprefix(".")
    for key in data:
        if key not in known:
            raise ConfigError(
                f"unknown key {displayed(key)} (= {displayed(data[key])}) in {where}; "
                f"known keys: {', '.join(sorted(known))}"
            )
    defaults = _defaults(cls) if default is None else vars(default)
    converted = {key: _convert(hints[key], value, f"{where}.{key}", defaults.get(key)) for key, value in data.items()}
    values = {**defaults, **converted}
    missing = [name for name in known if name not in values]
    if missing:
        raise ConfigError(f"{where} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except ConfigError as error:  # a check inside a section names its key without the section
        text = str(error)
        raise ConfigError(f"{place}.{text}" if place and text.split()[0] in known else text) from None


def displayed(value: object) -> str:
    """Value for a message, shortened to one line of at most 60 characters."""
    text = str(value) if isinstance(value, str) else reprlib.repr(value)
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...") if isinstance(value, str) else text[:60]


TYPE_NAMES: dict[Any, str] = {
    int: "int (a whole number)",
    float: "float (a number)",
    str: "str (text)",
    bool: "bool (true or false)",
}


def type_name(hint: object) -> str:
    """Description of a type for users."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return "a list of values, as [a, b]" if arguments[-1] is ... else f"a list of {len(arguments)} values"
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a section of keys and values"
    return TYPE_NAMES.get(hint, str(hint))


def _defaults(cls: type) -> dict[str, Any]:
    """Default values of a dataclass's fields."""
    defaults = {}
    for f in dataclasses.fields(cls):
        if f.default_factory is not dataclasses.MISSING:
            defaults[f.name] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            defaults[f.name] = f.default
    return defaults


def _convert(hint: object, value: object, where: str, default: object = None) -> Any:
    """Convert one value to its type. default: instance with the values of missing keys, for sections."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return parse(typing.cast(type, hint), value, where, default)
    if origin is dict and isinstance(value, dict):
        inner_key, inner_value = typing.get_args(hint)
        return {_convert(inner_key, k, where): _convert(inner_value, v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(hint)
        inner = inner[:1] * len(value) if inner[-1:] == (...,) else inner
        if len(inner) == len(value):
            return tuple(_convert(h, v, where) for h, v in zip(inner, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(h for h in typing.get_args(hint) if h is not type(None)), value, where, default)
    if hint is str and value is False:
        return "no"  # YAML reads an unquoted no as false
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {type_name(hint)}, got {displayed(value)}")


def override(data: dict[str, Any], change: str) -> None:
    """Apply `key=value` or `section.key=value` to nested tables."""
    path, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"expected an override of the form key=value, got {displayed(change)}")
    *sections, key = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{section} in the override {displayed(change)} is a value, not a section")
    try:
        data[key] = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: expected a YAML value in the override {displayed(change)} ({error})") from None


# --- range checks of sections -----------------------------------------------------------------------------------------


def at_least(config: object, least: float, *names: str) -> None:
    """Raise ConfigError if one of these values is below `least` or NaN; None (an absent optional key) passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def above(config: object, bound: float, *names: str) -> None:
    """Raise ConfigError unless all of these values are above the bound."""
    for name in names:
        if not getattr(config, name) > bound:
            raise ConfigError(f"{name} must be above {bound}, got {getattr(config, name)}")


def within(config: object, least: float, most: float, *names: str) -> None:
    """Raise ConfigError unless all of these values are from least to most; None (an absent optional key) passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{name} must be from {least} to {most}, got {value}")


def one_of(config: object, name: str, choices: typing.Collection[str]) -> None:
    """Raise ConfigError unless the value is one of the choices."""
    if getattr(config, name) not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {displayed(getattr(config, name))}")


def make_folder(folder: Path, key: str) -> None:
    """Create a folder that a config names. Raises ConfigError where a file, a device or a link to nothing is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = "there is something else at this path" if os.path.lexists(folder) else str(error.strerror or error)
        raise ConfigError(f"{key}: expected a folder, got {str(folder)[:100]}: {kind}") from None
