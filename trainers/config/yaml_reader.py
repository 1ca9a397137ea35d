"""YAML files of users: bounded in size and depth, without aliases, duplicate keys or Python objects."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS, MAX_DEPTH = 2**20, 16
MAX_BYTES = 4 * MAX_CHARACTERS + 4
"""More than MAX_CHARACTERS in any text: a huge file is refused before it is read whole."""


class ConfigError(ValueError):
    """Fault in a config; one sentence that says what was expected, what came and what to do."""


class BoundedLoader(yaml.SafeLoader):
    """Safe loader that refuses aliases (a few lines could fill the memory), deep nesting and duplicate keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.events.AliasEvent):
            raise ConfigError(f"line {line} has a YAML alias (*); write the value out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"line {line} is nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} occurs twice; remove one")
            if isinstance(key, Hashable):  # PyYAML reports the others
                keys.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Parse YAML into plain values. Raises ConfigError, in one line, for invalid YAML or text beyond the bounds."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"it has {len(text)} characters, at most {MAX_CHARACTERS} are read")
    try:
        return yaml.load(text, Loader=BoundedLoader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # numbers of 5,000 digits, odd keys, ...
        raise ConfigError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping with text keys. Raises ConfigError that names the file."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ConfigError(f"cannot read {path}: it is a device or a pipe; name a YAML file")
    try:
        with path.open("rb") as file:
            values = read_yaml(file.read(MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # also text that is not UTF-8
        raise ConfigError(f"cannot read {path} as YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(values).__name__}")
    return values
