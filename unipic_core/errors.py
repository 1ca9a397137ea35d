"""Errors that a user can cause. Each has one sentence: what was expected, what came, what to do."""

from __future__ import annotations


class UniPicError(ValueError):
    """Base of the errors that a command line shows as one line, without a traceback."""


class CheckpointError(UniPicError):
    """A checkpoint is missing, damaged, hostile, or of another architecture."""


class LoRAError(UniPicError):
    """A LoRA cannot be read or does not fit the model."""
