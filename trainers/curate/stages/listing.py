"""Pictures that the config names, in a fixed order and without opening them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unipic_core.conditioning.picture_files import ENDINGS
from unipic_core.errors import printable

from ...digests import digest
from ..config import SUBJECTS, IngestConfig, Stages
from ..errors import CurateError
from ..manifest.shards import batches

MOST_TEXT = 200
LISTED_AT_ONCE = 1000
"""Entries per step of the digest; another number gives another digest."""


@dataclass(frozen=True)
class Entry:
    """One picture before it is read. path: absolute, or of a drawn one below the run's folder. draw: recipe of a drawn
    one. parts: of a photograph, [{name, category}]. group: pictures of one group never share a composition."""

    path: str
    category: str
    subject: str
    name: str
    group: str = ""
    parts: tuple[dict[str, str], ...] = ()
    draw: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


def entries(stages: Stages) -> Iterator[Entry]:
    """All pictures of all sets. Raises CurateError for a set that does not exist."""
    for number, config in enumerate(stages.ingest):
        if config.kind == "folder":
            yield from _folder(config, number)
        elif config.kind == "jsonl":
            yield from _rows(config, number)
        else:
            from .drawn_sources import drawn_entries

            yield from drawn_entries(config, number, stages.seed)


def listing_state(stages: Stages) -> tuple[int, str]:
    """(number of pictures, digest of all that entries say, and of sizes and times of files)."""
    count, state = 0, ""
    for some in batches(entries(stages), LISTED_AT_ONCE):
        count += len(some)
        state = digest(state, [_state(one) for one in some])
    return count, state


def _state(one: Entry) -> list[object]:
    """Values that change with the row of one picture. Those without parts keep the digests of earlier versions."""
    return [_stamp(one), one.category, one.subject, one.name, one.group, *([list(one.parts)] if one.parts else [])]


def _stamp(one: Entry) -> list[object]:
    """Values that change with the picture, without opening it."""
    if one.draw or one.fault:
        return [one.path, one.draw, one.fault]
    try:
        about = os.stat(one.path)
    except (OSError, ValueError):
        return [one.path, "missing"]
    return [one.path, about.st_size, about.st_mtime_ns]


def _root(config: IngestConfig, number: int, kind: str) -> Path:
    path = Path(os.path.abspath(config.path or ""))
    if not (path.is_dir() if kind == "folder" else path.is_file()):
        expected = "a folder of pictures" if kind == "folder" else "a JSONL file of pictures"
        raise CurateError(f"ingest[{number}].path: expected {expected}, got {config.path}, which is none")
    return path


def _folder(config: IngestConfig, number: int) -> Iterator[Entry]:
    root = _root(config, number, "folder")
    found = 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(folder).relative_to(root)
        category = config.category or (printable(below.parts[0]) if below.parts else config.subject)
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS:
                found += 1
                yield Entry(os.path.join(folder, name), category, config.subject, category)
                if config.samples and found >= config.samples:
                    return
    if not found:
        raise CurateError(f"ingest[{number}].path: there is no picture in {root}; known endings: {', '.join(ENDINGS)}")


def _rows(config: IngestConfig, number: int) -> Iterator[Entry]:
    path = _root(config, number, "jsonl")
    found = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            found += 1
            yield _row(config, path, line_number, line)
            if config.samples and found >= config.samples:
                return
    if not found:
        raise CurateError(f"ingest[{number}].path: {path} has no rows")


def _row(config: IngestConfig, path: Path, number: int, line: bytes) -> Entry:
    """Entry of one line; one that cannot be used has a fault and is counted as a bad picture."""
    where = f"{path.name}, line {number}"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return Entry(where, "", config.subject, "", fault=f"{where} is not valid JSON")
    if not isinstance(values, dict) or not isinstance(values.get("image"), str):
        return Entry(where, "", config.subject, "", fault=f"{where} has no 'image', the path of a picture")
    picture = os.path.abspath(path.parent / values["image"])
    if os.path.commonpath([path.parent, picture]) != str(path.parent):
        return Entry(where, "", config.subject, "", fault=f"{where}: the path leaves the folder of {path.name}")
    category = values.get("category", config.category or config.subject)
    subject, group = values.get("subject", config.subject), values.get("group", "")
    texts = {"category": category, "name": values.get("name", category), "subject": subject, "group": group}
    for key, value in texts.items():
        if not _is_line(value) or len(value) > MOST_TEXT:
            return Entry(where, "", config.subject, "", fault=f"{where}: {key} must be a short text, got {value!r:.60}")
    if subject not in SUBJECTS:
        known = ", ".join(SUBJECTS)
        return Entry(where, "", config.subject, "", fault=f"{where}: subject must be one of {known}, got {subject!r}")
    parts = values.get("parts", [])
    fits = isinstance(parts, list) and all(
        isinstance(one, dict) and set(one) == {"name", "category"} and all(map(_is_line, one.values())) for one in parts
    )
    if not fits:
        return Entry(where, "", config.subject, "", fault=f"{where}: parts must be a list of {{name, category}}")
    return Entry(picture, category, subject, texts["name"], group, tuple(parts))


def _is_line(value: object) -> bool:
    """True for a text of one line that any file can hold: no control characters, no half characters."""
    return isinstance(value, str) and value.isprintable()
