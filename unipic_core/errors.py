"""Errors that a user can cause. Each message is one sentence: the expected value, the given one, the remedy."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The first line of another library's message, for the inside of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def printable(text: object, keep: str = "") -> str:
    """A text with names or metadata of others, for a terminal: control characters, escape sequences, marks that turn
    the direction of writing and bytes that are no text are spelt out, as \\x1b. keep: characters that may stay."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


class UniPicError(ValueError):
    """Base of the errors that a command line shows as one line, without a traceback."""


class CheckpointError(UniPicError):
    """A checkpoint is missing, damaged, hostile, or of another architecture."""


class LoRAError(UniPicError):
    """A LoRA cannot be read or does not fit the model."""
