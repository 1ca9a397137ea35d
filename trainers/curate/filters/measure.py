"""Measurements of pictures that the store does not have, in batches for the executor."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unipic_core.errors import UniPicError

from ...progress import Progress
from ..manifest.executor import Executor
from ..manifest.scores import FINAL, NOT_RUN, Scores
from ..manifest.shards import Row, batches
from .catalogue import FILTERS, Filter
from .picture import Decoded, decode, read_bytes

BATCH = 8
"""Pictures per task."""

ROWS_AT_ONCE = 256
SECONDS_PER_TRANSACTION = 2.0


@dataclass(frozen=True)
class Measurement:
    """One picture and the names of the filters to measure."""

    id: str
    path: str
    filters: tuple[str, ...]


def measure_batch(batch: Sequence[Measurement]) -> list[tuple[str, dict[str, Any]]]:
    """(picture, values by filter) of each picture; {"not run": reason} where there is none. A task for an executor."""
    return [(one.id, measure_one(one)) for one in batch]


def measure_one(job: Measurement) -> dict[str, Any]:
    """Decode one picture once and measure it."""
    try:
        picture = decode(read_bytes(job.path), job.path)
    except UniPicError as error:
        return {name: {NOT_RUN: str(error)} for name in job.filters}
    return {name: _value(FILTERS[name], picture) for name in job.filters}


def _value(one: Filter, picture: Decoded) -> Any:
    """Value of one filter: numbers, texts, or {"not run": reason}."""
    if one.measure is None:
        from .packages import measure_with_package

        return measure_with_package(one.name, picture)
    value = one.measure(picture)
    return {NOT_RUN: "the picture has no transparency", FINAL: True} if value is None else value


def measure_pictures(
    rows: Iterable[Row], filters: Sequence[Filter], scores: Scores, executor: Executor, out: Path, progress: Progress
) -> None:
    """Measure what is missing in the store. Each picture is decoded once for all its filters."""
    local = [one for one in filters if one.rank != "endpoint" and not one.needs_sources]
    jobs = missing(rows, local, scores, out, progress)
    waiting: dict[str, dict[str, Any]] = {}
    stored = time.monotonic()
    for measured in executor.map(measure_batch, jobs):
        for picture, values in measured:
            for name, value in values.items():
                waiting.setdefault(FILTERS[name].key, {})[picture] = value
        progress.add(len(measured))
        if time.monotonic() - stored > SECONDS_PER_TRANSACTION:
            scores.add_all(waiting)
            waiting, stored = {}, time.monotonic()
    scores.add_all(waiting)


def missing(
    rows: Iterable[Row], filters: Sequence[Filter], scores: Scores, out: Path, progress: Progress
) -> Iterator[list[Measurement]]:
    """Yield batches of pictures with unknown values."""
    waiting: list[Measurement] = []
    for some in batches(rows, ROWS_AT_ONCE):
        ids = [row["id"] for row in some]
        known = {one.name: set(scores.final(one.key, ids)) for one in filters}
        for row in some:
            names = tuple(
                one.name for one in filters if row["subject"] in one.subjects and row["id"] not in known[one.name]
            )
            if row["keep"] is not True or not names:
                progress.skip(1)
                continue
            for name in names:
                known[name].add(row["id"])  # another row may show this picture
            waiting.append(Measurement(row["id"], str(out / row["path"]), names))
            if len(waiting) == BATCH:
                yield waiting
                waiting = []
    if waiting:
        yield waiting
