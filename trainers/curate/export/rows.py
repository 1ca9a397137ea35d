"""Rows to export: those whose target passed every check of some attempt; the others are counted."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..manifest.shards import Row, StageFolder, full_disk

FORMAT_ENDINGS = {".jpeg": ".jpg", ".jfif": ".jpg", ".tiff": ".tif"}


def finished(checks: Sequence[StageFolder]) -> Iterator[Row]:
    """Kept rows in the order of their compositions, whatever attempt succeeded."""
    if not checks:
        return
    for index in range(checks[0].count):
        rows = [row for folder in checks for row in folder.read(index) if row["keep"] is True]
        yield from sorted(rows, key=lambda row: row["row"])


def left_out(checks: Sequence[StageFolder]) -> Counter[str]:
    """Rows that are not exported: "dropped" after the last attempt, and "not run"."""
    counts: Counter[str] = Counter()
    for number, folder in enumerate(checks):
        for row in folder.rows():
            if row["keep"] is None:
                counts["not run"] += 1
            elif row["keep"] is False and (number == len(checks) - 1 or "filters" not in row):
                counts["dropped"] += 1
    return counts


def put_picture(source: Path, folder: Path, name: str) -> str:
    """Link a picture into the export's folder, or copy it to another disk; returns its path below the folder."""
    ending = source.suffix.lower()
    relative = f"pictures/{name[:2]}/{name}{FORMAT_ENDINGS.get(ending, ending)}"
    path = folder / relative
    if path.exists():
        return relative
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise full_disk(path, error) from None
    return relative
