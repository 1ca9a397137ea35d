"""Errors that a user can cause. Each message is one sentence: the expected value, the given one, the remedy."""

from __future__ import annotations

import errno
import os


def one_line(error: BaseException) -> str:
    """First line of another library's message, at most 150 characters, to be quoted inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def joined_lines(error: BaseException, most: int = 200) -> str:
    """Another library's message in one line, at most `most` characters, to be quoted inside a sentence."""
    return " ".join(str(error).split())[:most]


FULL_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quotas


def message_of(error: Exception) -> str:
    """Return the message of an error; for one of the system the file and the reason, without its number."""
    if isinstance(error, OSError) and error.strerror:
        file = "" if error.filename is None else f"{os.fsdecode(error.filename)[:100]}: "
        if error.errno in FULL_DISK:
            return f"{file}{error.strerror}; free some space and run again"
        if file:
            return f"{file}{error.strerror}; check the path"
    return str(error)


def printable(text: object, keep: str = "") -> str:
    """Escape untrusted text for a terminal: control characters, marks that reverse the direction of writing and bytes
    that are no text are spelt out, as \\x1b. keep: characters to leave as they are."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


class UniPicError(ValueError):
    """Base class of the errors that the command line shows as one line, without a traceback."""


class CheckpointError(UniPicError):
    """A checkpoint is missing, damaged, hostile, or of another architecture."""


class LoRAError(UniPicError):
    """A LoRA cannot be read or does not fit the model."""
