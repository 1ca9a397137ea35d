"""Settings of a server and of a judge on it. There is no default address."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ...config.yaml_reader import ConfigError, read_yaml_mapping
from .errors import JudgeError

RESPONSE_FORMATS = ("auto", "json_schema", "json_object", "none")
LOGPROBS = ("auto", "off")
ANSWER_SETTINGS = ("passes", "temperature", "seed", "image_max_side", "extra", "logprobs")
RESERVED = ("model", "messages", "temperature", "seed", "max_tokens", "stream", "n", "logprobs", "top_logprobs")
"""Request keys that ``extra`` must not contain: each has an option or is fixed."""


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server that the user runs. section: of the YAML file, for messages.

    base_url: such as http://localhost:8000/v1. api_key_env: name of the environment variable with the key, which is
    never written anywhere. timeout: seconds per answer; first_timeout: for the first one, while the server loads its
    model. concurrency: requests at once. image_max_side: pixels. tries: requests per question; max_wait: longest pause
    between them, seconds. extra: additional request keys.
    """

    section: ClassVar[str] = "server"

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 120.0
    first_timeout: float = 600.0
    concurrency: int = 4
    image_max_side: int = 1024
    tries: int = 5
    max_wait: float = 60.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_text("base_url", "model")
        if self.api_key_env is not None and not (isinstance(self.api_key_env, str) and self.api_key_env.isidentifier()):
            raise JudgeError(
                f"{self.section}.api_key_env must be the name of an environment variable, never the key itself"
            )
        self._check_numbers(timeout=0.01, first_timeout=0.01, max_wait=0.0)
        self._check_whole_numbers(concurrency=1, tries=1, image_max_side=32)
        if not isinstance(self.extra, Mapping):
            raise JudgeError(f"{self.section}.extra must be a mapping of request keys, got {self.extra!r}")

    def _check_text(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise JudgeError(f"{self.section}.{name} must be a text, got {value!r}")

    def _check_numbers(self, **least: float) -> None:
        for name, bound in least.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < bound:
                raise JudgeError(f"{self.section}.{name} must be a number of at least {bound:g}, got {value!r}")

    def _check_whole_numbers(self, **least: int) -> None:
        for name, bound in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                raise JudgeError(f"{self.section}.{name} must be a whole number of at least {bound}, got {value!r}")


@dataclass(frozen=True)
class JudgeConfig(ServerConfig):
    """Settings of a judge, the ``judge:`` section of a YAML file.

    max_images: limit of the server per request. template: question template; None: the benchmark's. passes: answers per
    question, with seeds seed, seed + 1, ... . logprobs, response_format: "auto" probes the server once. extra: such as
    {reasoning_effort: none}.
    """

    section: ClassVar[str] = "judge"

    max_images: int = 8
    template: str | None = None
    passes: int = 1
    temperature: float = 0.0
    seed: int = 1
    max_tokens: int = 1024
    logprobs: str = "auto"
    response_format: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None:
            self._check_text("template")
        self._check_numbers(temperature=0.0)
        self._check_whole_numbers(max_images=1, passes=1, max_tokens=1, seed=0)
        for name, choices in (("logprobs", LOGPROBS), ("response_format", RESPONSE_FORMATS)):
            if getattr(self, name) not in choices:
                raise JudgeError(f"judge.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        taken = sorted(set(self.extra) & {*RESERVED, "response_format"})
        if taken:
            raise JudgeError(f"judge.extra may not hold {taken[0]!r}; it has its own option or is fixed")

    def changed_settings(self) -> dict[str, Any]:
        """Settings on which answers depend, beside server and model, where they differ from their defaults."""
        defaults = JudgeConfig(self.base_url, self.model)
        values = {name: getattr(self, name) for name in ANSWER_SETTINGS}
        return {name: value for name, value in values.items() if value != getattr(defaults, name)}

    def public(self) -> dict[str, Any]:
        """Settings for reports; the key is not part of the settings."""
        return asdict(self) | {"extra": dict(self.extra)}


def parse_judge(values: object, source: str = "the judge") -> JudgeConfig:
    """Parse settings from a mapping, with or without the outer ``judge:`` key. Raises JudgeError that names the key."""
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
            raise JudgeError(f"{source} needs {name}; there is no default address or model")
    settings: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    for name in ("base_url", "model"):
        settings.setdefault(name, "")  # written as null: refused by the check of JudgeConfig, which names the key
    return JudgeConfig(**settings)


def read_judge(path: Path) -> JudgeConfig:
    """Read settings from a YAML file. Raises JudgeError in one sentence."""
    try:
        values = read_yaml_mapping(path)
    except ConfigError as error:
        raise JudgeError(str(error)) from None
    return parse_judge(values, str(path))
