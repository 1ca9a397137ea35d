"""Settings of a judge: which server, which model, how it is asked. No address is built in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .errors import JudgeError, one_line

RESPONSE_FORMATS = ("auto", "json_schema", "json_object", "none")
LOGPROBS = ("auto", "off")
RESERVED = ("model", "messages", "temperature", "seed", "max_tokens", "stream", "n", "logprobs", "top_logprobs")
"""Keys of the request that ``extra`` may not replace: each has an option or is fixed."""


@dataclass(frozen=True)
class JudgeConfig:
    """The ``judge:`` section of a YAML file.

    base_url: as http://localhost:8000/v1. api_key_env: name of the environment variable that holds the key; the key
    itself is never written anywhere. timeout: seconds for one answer; first_timeout: for the first one, while a server
    loads its model. max_images: what the server takes in one request. image_max_side: pixels. passes: answers per
    question, with seeds seed, seed + 1, ... . logprobs and response_format: "auto" probes the server once. extra: more
    keys of the request, as {reasoning_effort: none}. tries, max_wait: requests per question, and the longest pause
    between two of them in seconds.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 120.0
    first_timeout: float = 600.0
    concurrency: int = 4
    max_images: int = 8
    image_max_side: int = 1024
    template: str = "edit"
    passes: int = 1
    temperature: float = 0.0
    seed: int = 1
    max_tokens: int = 1024
    logprobs: str = "auto"
    response_format: str = "auto"
    tries: int = 5
    max_wait: float = 60.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("base_url", "model", "template"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise JudgeError(f"judge.{name} must be a text, got {value!r}")
        if self.api_key_env is not None and not (isinstance(self.api_key_env, str) and self.api_key_env.isidentifier()):
            raise JudgeError("judge.api_key_env must be the name of an environment variable, never the key itself")
        for name, least in (("timeout", 0.01), ("first_timeout", 0.01), ("max_wait", 0.0), ("temperature", 0.0)):
            _check_number(name, getattr(self, name), least)
        for name in ("concurrency", "max_images", "passes", "max_tokens", "tries"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("image_max_side", self.image_max_side, 32)
        _check_whole("seed", self.seed, 0)
        _check_choice("logprobs", self.logprobs, LOGPROBS)
        _check_choice("response_format", self.response_format, RESPONSE_FORMATS)
        if not isinstance(self.extra, Mapping):
            raise JudgeError(f"judge.extra must be a mapping of request keys, got {self.extra!r}")
        taken = sorted(set(self.extra) & {*RESERVED, "response_format"})
        if taken:
            raise JudgeError(f"judge.extra may not hold {taken[0]!r}; it has an option or is fixed")

    def public(self) -> dict[str, Any]:
        """Everything a report may show; the key is not part of the settings at all."""
        return asdict(self) | {"extra": dict(self.extra)}


def _check_number(name: str, value: object, least: float) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= least
    if not fits:
        raise JudgeError(f"judge.{name} must be a number of at least {least:g}, got {value!r}")


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise JudgeError(f"judge.{name} must be a whole number of at least {least}, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise JudgeError(f"judge.{name} must be one of {', '.join(choices)}, got {value!r}")


def parse_judge(values: object, source: str = "the judge") -> JudgeConfig:
    """Settings from a mapping, with or without the outer ``judge:`` key. Raises JudgeError naming the key."""
    if isinstance(values, Mapping) and set(values) == {"judge"}:
        values = values["judge"]
    if not isinstance(values, Mapping):
        raise JudgeError(f"{source} must be a mapping with base_url and model, got {type(values).__name__}")
    known = {one.name: one for one in fields(JudgeConfig)}
    for key in values:
        if key not in known:
            raise JudgeError(f"{source} has an unknown key {key!r}; known: {', '.join(known)}")
    for name, one in known.items():
        if one.default is MISSING and one.default_factory is MISSING and name not in values:
            raise JudgeError(f"{source} lacks {name}; there is no default address or model")
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    for name in ("base_url", "model"):
        given.setdefault(name, "")
    return JudgeConfig(**given)


def read_judge(path: Path) -> JudgeConfig:
    """Settings from a YAML file. Raises JudgeError in one sentence."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JudgeError(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JudgeError(f"{path} is not valid YAML: {one_line(error)}") from None
    return parse_judge(values, str(path))
