"""Ingest: one row per picture with its digest, or the reason why it cannot be read; the next run tries such again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from unipic_core.errors import UniPicError, printable

from ...digests import digest
from ...progress import Progress
from ..config import Stages
from ..filters.picture import content_id, decode, read_bytes
from ..manifest.executor import Executor
from ..manifest.shards import Row, StageFolder, batches, full_disk
from .drawn_sources import draw_picture
from .listing import Entry, entries, listing_state

VERSION = 1
BATCH = 8
Numbered = tuple[int, Entry]
"""Number of a row, and its picture."""


def ingest(stages: Stages, executor: Executor) -> StageFolder:
    """Write the first manifest."""
    total, state = listing_state(stages)
    size = stages.rows_per_shard
    key = digest("ingest", VERSION, [asdict(one) for one in stages.ingest], stages.seed, size, state)
    folder = StageFolder(stages.folder, "ingest", key, -(-total // size))
    progress = Progress("ingest", total)
    listed = enumerate(entries(stages))

    def read(some: Sequence[Numbered]) -> Iterator[Row]:
        for rows in executor.map(ingest_batch, tasks(stages.folder, some)):
            progress.add(len(rows))
            yield from rows

    for index in range(folder.count):
        progress.skip(folder.complete(index, list(islice(listed, size)), read, lambda row: row["keep"] is True))
    progress.close()
    return folder


def tasks(out: Path, some: Sequence[Numbered]) -> Iterator[tuple[str, list[Numbered]]]:
    """Yield tasks of ``ingest_batch``: (folder of the run, entries)."""
    for batch in batches(some, BATCH):
        yield str(out), batch


def ingest_batch(task: tuple[str, list[Numbered]]) -> list[Row]:
    """Rows of a few entries. A task for an executor."""
    out, batch = task
    return [{"row": number, **ingest_one(Path(out), one)} for number, one in batch]


def ingest_one(out: Path, one: Entry) -> Row:
    """Row of one picture; `keep` is false with a reason for one that cannot be read."""
    about: dict[str, Any] = {"category": one.category, "subject": one.subject, "name": one.name}
    about |= {"group": one.group} if one.group else {}
    about |= {"parts": list(one.parts)} if one.parts else {}
    about |= {"drawn": one.draw} if one.draw else {}
    try:
        if one.fault:
            raise UniPicError(one.fault)
        if one.draw:
            write_picture(out / one.path, draw_picture(one.draw))
        path = str(out / one.path)
        data = read_bytes(path)
        picture = decode(data, path)
    except UniPicError as error:
        return {"id": "", "path": one.path, **about, "keep": False, "reason": printable(error)}
    size = {"width": picture.size[0], "height": picture.size[1], "alpha": picture.alpha is not None}
    return {"id": content_id(data), "path": one.path, **about, **size, "keep": True, "reason": ""}


def write_picture(path: Path, data: bytes) -> None:
    """Write a picture aside and rename it. Raises CurateError on a full disk."""
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise full_disk(path, error) from None
