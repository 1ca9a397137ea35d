"""Likeness of a target to the truth: the compositor's picture of drawn sources, or the photograph of De&Re."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unipic_core.errors import UniPicError

from ...judges.arrays import picture_psnr
from ...progress import Progress
from ..filters.catalogue import Filter
from ..filters.decide import store_id
from ..filters.picture import decode, read_bytes
from ..manifest.scores import NOT_RUN
from ..manifest.shards import Row, StageFolder, batches
from .tools import Tools

BATCH = 8
SOLID = 0.5
"""Share of a pixel that an item must cover for the pixel to count."""


def measure_likeness(before: StageFolder, filters: Sequence[Filter], tools: Tools, out: Path, title: str) -> None:
    """Measure what is missing in the store, for the filters that compare a target with its sources here."""
    for one in filters:
        if one.needs_sources and one.rank in ("numpy", "extra"):
            progress = Progress(f"{title}, {one.name}", sum(1 for _ in before.rows()), unit="targets")
            for found in tools.executor.map(compare_batch, _missing(before, one, tools, out, progress)):
                tools.scores.add(one.key, found)
                progress.add(len(found))
            progress.close()


def _missing(
    before: StageFolder, one: Filter, tools: Tools, out: Path, progress: Progress
) -> Iterator[tuple[str, str, list[tuple[str, Row]]]]:
    """Yield tasks of ``compare_batch``: (filter, folder of the run, [(key, row)])."""
    for index in range(before.count):
        rows = [row for row in before.read(index) if row["keep"] is True]
        known = tools.scores.final(one.key, [store_id(one, row) for row in rows])
        new = [(key, row) for row in rows if (key := store_id(one, row)) not in known]
        progress.skip(len(rows) - len(new))
        for batch in batches(new, BATCH):
            yield one.name, str(out), batch


def compare_batch(task: tuple[str, str, list[tuple[str, Row]]]) -> dict[str, Any]:
    """Values by key. A task for an executor."""
    name, out, batch = task
    return {key: _value(name, Path(out), row) for key, row in batch}


def _value(name: str, out: Path, row: Row) -> Any:
    try:
        if name == "likeness":
            return likeness(out, row)
        from ..filters.packages import compare_with_package

        return compare_with_package(name, out, row)
    except UniPicError as error:
        return {NOT_RUN: str(error)}


def likeness(out: Path, row: Row) -> float:
    """PSNR in dB: of drawn sources the lowest inside one item, of De&Re over the picture. Raises UniPicError."""
    target = _picture(out / row["path"])
    if "reference" in row:
        return psnr(target, _picture(out / row["reference"]))
    from ..synthesis.drawn import truth_of

    truth = truth_of(row, target.size)
    values = [
        psnr(target, truth.target, place.mask >= SOLID) for place in truth.placements if place.mask.max() >= SOLID
    ]
    return min(values) if values else psnr(target, truth.target)


def psnr(picture: Image.Image, truth: Image.Image, mask: np.ndarray | None = None) -> float:
    """PSNR in dB at the truth's size, six digits. mask: bool [H, W], the pixels that count."""
    if picture.size != truth.size:
        picture = picture.resize(truth.size, Image.Resampling.LANCZOS)
    return float(f"{picture_psnr(picture, truth, mask):.6g}")


def _picture(path: Path) -> Image.Image:
    return decode(read_bytes(str(path)), str(path)).rgb
