"""Plain values, as YAML has them, to frozen dataclasses: an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import yaml


class ConfigError(ValueError):
    """A config file says something that no trainer understands."""


def parse(cls: type, data: dict[str, Any], where: str) -> Any:
    """A dataclass from a mapping, strictly."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in known:
            names = ", ".join(sorted(known))
            raise ConfigError(f"unknown key {key!r} (= {data[key]!r}) in {where}; known keys: {names}")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING and n not in values]
    if needed:
        raise ConfigError(f"{where} needs {', '.join(needed)}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return parse(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(hint)
        inner = inner[:1] * len(value) if inner[-1:] == (...,) else inner
        if len(inner) == len(value):
            return tuple(_convert(h, v, where) for h, v in zip(inner, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(h for h in typing.get_args(hint) if h is not type(None)), value, where)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def override(data: dict[str, Any], change: str) -> None:
    """Apply `key=value` or `section.key=value` to nested tables."""
    path, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"an override is key=value, got {change!r}")
    *sections, key = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{section} in the override {change!r} is a value, not a section")
    data[key] = yaml.safe_load(text)
