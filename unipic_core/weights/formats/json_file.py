"""Read JSON files of a model folder, with a limit of their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, one_line

MAX_CONFIG = 1 << 20
"""Largest config in bytes: a thousand times the released ones."""

MAX_INDEX = 1 << 23
"""Largest index of shards in bytes, the same as for the header of a safetensors file."""


def read_json(path: Path, most: int = MAX_CONFIG) -> Any:
    """Read a JSON file of at most `most` bytes. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes, expected at most {most:,}; it is not what its name says, "
                "fetch it again"
            )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_json(text, str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """Parse JSON text. source: name for the message. Raises CheckpointError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON ({one_line(error)}); fetch it again") from error
