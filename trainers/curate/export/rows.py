"""Rows to export: those whose target passed every check of some attempt; the others are counted."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from unipic_core.conditioning.picture_files import ENDINGS, open_picture

from ..manifest.shards import Row, StageFolder, full_disk

FORMAT_ENDINGS = {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".tiff": ".tif", ".jpeg2000": ".jp2"}


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


def ending_of(picture: Path) -> str:
    """Ending of a picture's copy, by which training finds it: the commonest of its own, or that of its format."""
    ending = picture.suffix.lower()
    if ending not in ENDINGS:
        with open_picture(picture) as opened:
            ending = f".{opened.format or 'png'}".lower()
    return FORMAT_ENDINGS.get(ending, ending)


def put_picture(source: Path, folder: Path, name: str) -> str:
    """Link a picture into the export's folder, or copy it to another disk; returns its path below the folder."""
    relative = f"pictures/{name[:2]}/{name}{ending_of(source)}"
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
