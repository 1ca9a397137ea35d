"""One question to a judge, the request it becomes, and the key its answer is recorded under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .pictures import Picture

Part = str | Picture


@dataclass(frozen=True)
class Question:
    """Texts and pictures in the order in which the judge sees them; what stays the same comes first, for its cache.

    schema: JSON schema of the answer, sent where the server takes one. first_tokens: ask for log-probabilities, for
    answers of one token. max_tokens: overrides the judge's.
    """

    parts: tuple[Part, ...]
    schema: Mapping[str, Any] | None = None
    first_tokens: bool = False
    max_tokens: int | None = None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.parts if isinstance(part, Picture))

    @property
    def content(self) -> list[dict[str, Any]]:
        """Content parts of an OpenAI chat message."""
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": part.url}}
            for part in self.parts
        ]

    def key(self, model: str, temperature: float, seed: int) -> str:
        """16 hexadecimal digits of model, sampling, and parts with pictures by their pixels; order matters."""
        parts = [part if isinstance(part, str) else f"picture {part.digest}" for part in self.parts]
        text = json.dumps([model, temperature, seed, parts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TokenChoice:
    """A generated token with the log-probabilities of the likeliest tokens in its place, itself included."""

    token: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """A judge's reply. ``tokens`` is empty without log-probabilities; ``seconds`` are the server's at recording."""

    text: str
    key: str
    model: str = ""
    seconds: float = 0.0
    tries: int = 1
    tokens: tuple[TokenChoice, ...] = field(default=(), repr=False)
