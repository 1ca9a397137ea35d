"""Errors of a judge: those that stop a run, and those of one question, whose score stays missing."""

from __future__ import annotations

from typing import Literal

FailureKind = Literal["unparsed", "refused", "cut", "rejected", "server", "picture", "not asked"]
"""unparsed: no scores in the text; refused: the model declined; cut: max_tokens reached; rejected: HTTP 400, 413 or
422; server: no answer after all tries; picture: unreadable; not asked: an earlier question of the case failed."""


class JudgeError(ValueError):
    """Error that stops the run: one sentence with what was expected, what came and what to do."""


class AnswerError(ValueError):
    """Error of one question; the run continues and counts it by ``kind``."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


def one_line(text: object, limit: int = 200) -> str:
    """Text of another program for use in a message: no control characters, at most ``limit`` characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."
