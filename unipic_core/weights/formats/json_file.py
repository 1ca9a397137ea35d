"""JSON of a model folder, of a size that its kind may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, one_line

MAX_CONFIG = 1 << 20
"""Most bytes of a config: a thousand times those of the released ones."""

MAX_INDEX = 1 << 23
"""Most bytes of an index of shards, as of the header of a safetensors file."""


def read_json(path: Path, most: int = MAX_CONFIG) -> Any:
    """The content of a JSON file of at most `most` bytes. Raises CheckpointError."""
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
    """The content of JSON text. CheckpointError that names its source."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON ({one_line(error)}); fetch it again") from error
