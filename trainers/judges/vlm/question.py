"""Question to a judge, its request content, and the key of its recorded answer."""

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
    """Texts and pictures in the judge's order; constant parts come first, for the server's prefix cache.

    schema: JSON schema of the answer, sent if the server supports it. first_tokens: request log-probabilities, for
    single-token answers. max_tokens: overrides the judge's.
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
        """Digest of model, sampling and parts (pictures by their pixels, in order), 16 hex digits."""
        parts = [part if isinstance(part, str) else f"picture {part.digest}" for part in self.parts]
        text = json.dumps([model, temperature, seed, parts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TokenChoice:
    """Generated token with the log-probabilities of the most likely tokens at its position."""

    token: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """Answer of a judge. tokens: () without log-probabilities; seconds: of the server when recorded."""

    text: str
    key: str
    model: str = ""
    seconds: float = 0.0
    tries: int = 1
    tokens: tuple[TokenChoice, ...] = field(default=(), repr=False)
