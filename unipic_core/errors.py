"""Errors that a user can cause. Each has one sentence: what was expected, what came, what to do."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The first line of another library's message, for the inside of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


class UniPicError(ValueError):
    """Base of the errors that a command line shows as one line, without a traceback."""


class CheckpointError(UniPicError):
    """A checkpoint is missing, damaged, hostile, or of another architecture."""


class LoRAError(UniPicError):
    """A LoRA cannot be read or does not fit the model."""
