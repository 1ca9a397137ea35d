"""YAML from strangers: bounded in size and depth, without aliases, duplicate keys or Python objects."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from unipic_core.errors import UniPicError, one_line

LARGEST, DEEPEST = 1 << 20, 16
"""Bytes of a file, and levels of nesting."""


class CurateError(UniPicError):
    """A fault in the configuration or the data that stops a run; one sentence."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. CurateError names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise CurateError(f"cannot read {path}: {error.strerror or error}") from None
    if len(raw) > LARGEST:
        raise CurateError(f"{path} is larger than {LARGEST >> 20} MiB; lists of rows belong into a JSONL file")
    try:
        text = raw.decode("utf-8-sig")
        _check_events(text)
        values = yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CurateError(f"{path} cannot be read as YAML ({_where(error)})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CurateError(f"{path} must hold a mapping of names to values, got {type(values).__name__}")
    return values


def _check_events(text: str) -> None:
    """Refuse aliases and deep nesting before anything is built."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line} has an alias; write the values out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError(f"line {line} is nested deeper than {DEEPEST} levels")


def _where(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:
        return f"line {mark.line + 1}: {problem}"
    return one_line(error)
