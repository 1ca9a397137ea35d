"""Plain values, as YAML has them, to frozen dataclasses: an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import yaml


class ConfigError(ValueError):
    """A config file says something that no trainer understands."""


def parse(cls: type, data: dict[str, Any], where: str, default: Any = None) -> Any:
    """A dataclass from a mapping, strictly. default: an instance that has the keys that the mapping lacks; None: those
    of the class."""
    known = [f.name for f in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in known:
            raise ConfigError(
                f"unknown key {key!r} (= {data[key]!r}) in {where}; known keys: {', '.join(sorted(known))}"
            )
    defaults = _defaults(cls) if default is None else vars(default)
    given = {key: _convert(hints[key], value, f"{where}.{key}", defaults.get(key)) for key, value in data.items()}
    values = {**defaults, **given}
    needed = [name for name in known if name not in values]
    if needed:
        raise ConfigError(f"{where} needs {', '.join(needed)}")
    return cls(**values)


def _defaults(cls: type) -> dict[str, Any]:
    """What the fields are that nobody gives."""
    made = {}
    for f in dataclasses.fields(cls):
        if f.default_factory is not dataclasses.MISSING:
            made[f.name] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            made[f.name] = f.default
    return made


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    """default: what a section has instead of the keys that it is not given."""
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
        return "no"  # as YAML reads a no without quotes
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


# --- what a section checks of its values ------------------------------------------------------------------------------


def at_least(config: Any, least: float, *names: str) -> None:
    """ConfigError if one of these is below; None, for a key that may be absent, and not-a-number are no numbers."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def above(config: Any, bound: float, *names: str) -> None:
    """ConfigError unless all of these are above the bound."""
    for name in names:
        if not getattr(config, name) > bound:
            raise ConfigError(f"{name} must be above {bound}, got {getattr(config, name)}")


def within(config: Any, least: float, most: float, *names: str) -> None:
    """ConfigError unless all of these are from least to most."""
    for name in names:
        if not least <= getattr(config, name) <= most:
            raise ConfigError(f"{name} must be from {least} to {most}, got {getattr(config, name)}")


def one_of(config: Any, name: str, choices: typing.Collection[str]) -> None:
    if getattr(config, name) not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
