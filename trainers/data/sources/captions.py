"""Text files of people and other programs: UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one."""

from __future__ import annotations

import codecs

from ..rows import BadRow

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order mark -> encoding."""


def encoding_of(start: bytes) -> tuple[str, int]:
    """(encoding, bytes of its mark) from the first bytes of a file; UTF-8 without a mark."""
    for mark, encoding in MARKS:
        if start.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def decode_text(content: bytes, name: str) -> str:
    """The text of a file. Raises BadRow for other encodings, which are not guessed."""
    encoding, length = encoding_of(content)
    if not length and b"\0" in content[:4096]:
        raise BadRow(f"{name} seems to be UTF-16 without a byte order mark; save it as UTF-8")
    try:
        return content[length:].decode(encoding)
    except UnicodeDecodeError as error:
        raise BadRow(
            f"{name} is not {encoding.upper()} ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
