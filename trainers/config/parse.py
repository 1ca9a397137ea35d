"""Plain values, as YAML has them, to frozen dataclasses: an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from typing import Any

import yaml


class ConfigError(ValueError):
    """A config file says something that no trainer understands."""


def parse(cls: type, data: dict[str, Any], where: str, default: object = None) -> Any:
    """A dataclass from a mapping, strictly. default: an instance that has the keys that the mapping lacks; None: those
    of the class."""
    known = [f.name for f in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    place = where.removeprefix("config").removeprefix(".")
    for key in data:
        if key not in known:
            raise ConfigError(
                f"unknown key {shown(key)} (= {shown(data[key])}) in {where}; known keys: {', '.join(sorted(known))}"
            )
    defaults = _defaults(cls) if default is None else vars(default)
    given = {key: _convert(hints[key], value, f"{where}.{key}", defaults.get(key)) for key, value in data.items()}
    values = {**defaults, **given}
    needed = [name for name in known if name not in values]
    if needed:
        raise ConfigError(f"{where} needs {', '.join(needed)}")
    try:
        return cls(**values)
    except ConfigError as error:  # a section's check names its key alone
        text = str(error)
        raise ConfigError(f"{place}.{text}" if place and text.split()[0] in known else text) from None


def shown(value: object) -> str:
    """A value in a message, in at most 60 characters of one line."""
    text = str(value) if isinstance(value, str) else reprlib.repr(value)
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...") if isinstance(value, str) else text[:60]


WORDS: dict[Any, str] = {
    int: "int (a whole number)",
    float: "float (a number)",
    str: "str (text)",
    bool: "bool (true or false)",
}


def expected(hint: object) -> str:
    """A type as a user writes it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return "a list of values, as [a, b]" if arguments[-1] is ... else f"a list of {len(arguments)} values"
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a section of keys and values"
    return WORDS.get(hint, str(hint))


def _defaults(cls: type) -> dict[str, Any]:
    """What the fields are that nobody gives."""
    made = {}
    for f in dataclasses.fields(cls):
        if f.default_factory is not dataclasses.MISSING:
            made[f.name] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            made[f.name] = f.default
    return made


def _convert(hint: object, value: object, where: str, default: object = None) -> Any:
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
    raise ConfigError(f"{where} must be {expected(hint)}, got {shown(value)}")


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
    try:
        data[key] = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: expected a YAML value in the override {shown(change)} ({error})") from None


LONGEST, DEEPEST = 2**20, 16
"""Characters of a config, and levels of nesting."""


class PlainLoader(yaml.SafeLoader):
    """Without aliases, which let a few lines stand for gigabytes or contain themselves, and nested a few levels."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise ConfigError(f"line {event.start_mark.line + 1} has a YAML alias (*); write the value out")
        self.level += 1
        if self.level > DEEPEST:
            raise ConfigError(f"it is nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def read_yaml(text: str) -> Any:
    """Plain values; ConfigError in one line for what is no YAML, too long, too deep, or has aliases."""
    if len(text) > LONGEST:
        raise ConfigError(f"it has {len(text)} characters, at most {LONGEST} are read")
    try:
        return yaml.load(text, Loader=PlainLoader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # numbers of 5,000 digits, odd keys, ...
        raise ConfigError(" ".join(str(error).split())[:200] or type(error).__name__) from None


# --- what a section checks of its values ------------------------------------------------------------------------------


def at_least(config: object, least: float, *names: str) -> None:
    """ConfigError if one of these is below; None, for a key that may be absent, and not-a-number are no numbers."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def above(config: object, bound: float, *names: str) -> None:
    """ConfigError unless all of these are above the bound."""
    for name in names:
        if not getattr(config, name) > bound:
            raise ConfigError(f"{name} must be above {bound}, got {getattr(config, name)}")


def within(config: object, least: float, most: float, *names: str) -> None:
    """ConfigError unless all of these are from least to most."""
    for name in names:
        if not least <= getattr(config, name) <= most:
            raise ConfigError(f"{name} must be from {least} to {most}, got {getattr(config, name)}")


def one_of(config: object, name: str, choices: typing.Collection[str]) -> None:
    if getattr(config, name) not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {shown(getattr(config, name))}")
