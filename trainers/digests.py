"""Digests of plain values, and of files, read in blocks. (hashlib.file_digest needs Python 3.11.)"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

BLOCK = 1 << 20


class Digest(Protocol):
    """A hash object of hashlib."""

    def update(self, data: bytes, /) -> None: ...


def add_file(digest: Digest, path: Path) -> None:
    """Feed a file's bytes into a digest. Raises OSError."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)


def digest(*parts: object) -> str:
    """32 hex digits of a digest of plain values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
