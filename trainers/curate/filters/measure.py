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
from ..manifest.scores import Scores
from ..manifest.shards import Row, batches
from .catalogue import FILTERS, Filter
from .picture import Decoded, decode, read_bytes

BATCH = 8
"""Pictures per task."""

ROWS_AT_ONCE = 256
SECONDS_PER_TRANSACTION = 2.0
NOT_RUN = "not run"
"""Key of a stored value that says why there is no score."""


@dataclass(frozen=True)
class Measurement:
    """One picture and the names of the filters to measure."""

    id: str
    path: str
    filters: tuple[str, ...]


def measure_batch(batch: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Values by filter of each picture; {"not run": reason} where there is none. A task for an executor."""
    return [measure_one(one) for one in batch]


def measure_one(job: Measurement) -> dict[str, Any]:
    """Decode one picture once and measure it."""
    try:
        picture = decode(read_bytes(job.path), job.path)
    except UniPicError as error:
        return {name: {NOT_RUN: str(error)} for name in job.filters}
    return {name: _value(FILTERS[name], picture) for name in job.filters}


def _value(one: Filter, picture: Decoded) -> Any:
    if one.measure is None:
        from .packages import measure_with_package

        return measure_with_package(one.name, picture)
    value = one.measure(picture)
    return {NOT_RUN: "the picture has no transparency"} if value is None else value


def measure_pictures(
    rows: Iterable[Row], filters: Sequence[Filter], scores: Scores, executor: Executor, out: Path, progress: Progress
) -> None:
    """Measure what is missing in the store. Each picture is decoded once for all its filters."""
    numbers = [one for one in filters if one.rank in ("numpy", "extra") and not one.needs_sources]
    jobs = missing(rows, numbers, scores, out, progress)
    waiting: dict[str, dict[str, Any]] = {}
    stored = time.monotonic()
    for batch, values in _in_order(executor, jobs):
        for job, found in zip(batch, values, strict=True):
            for name, value in found.items():
                waiting.setdefault(FILTERS[name].key, {})[job.id] = value
        progress.add(len(batch))
        if time.monotonic() - stored > SECONDS_PER_TRANSACTION:
            scores.add_all(waiting)
            waiting, stored = {}, time.monotonic()
    scores.add_all(waiting)


def missing(
    rows: Iterable[Row], filters: Sequence[Filter], scores: Scores, out: Path, progress: Progress
) -> Iterator[list[Measurement]]:
    """Batches of pictures with unknown values."""
    waiting: list[Measurement] = []
    for some in batches(rows, ROWS_AT_ONCE):
        ids = [row["id"] for row in some]
        known = {one.name: _final(scores.known(one.key, ids)) for one in filters}
        seen: set[str] = set()
        for row in some:
            names = tuple(
                one.name for one in filters if row["subject"] in one.subjects and row["id"] not in known[one.name]
            )
            if row["keep"] is not True or not names or row["id"] in seen:
                progress.skip(1)
                continue
            seen.add(row["id"])
            waiting.append(Measurement(row["id"], str(out / row["path"]), names))
            if len(waiting) == BATCH:
                yield waiting
                waiting = []
    if waiting:
        yield waiting


def _final(known: dict[str, Any]) -> dict[str, Any]:
    """Without the values that a later run may find: of a package that is missing."""
    return {key: value for key, value in known.items() if not (isinstance(value, dict) and value.get("again"))}


def _in_order(
    executor: Executor, jobs: Iterable[list[Measurement]]
) -> Iterator[tuple[list[Measurement], list[dict[str, Any]]]]:
    """Pairs of a batch and its values."""
    sent: list[list[Measurement]] = []

    def tasks() -> Iterator[list[Measurement]]:
        for job in jobs:
            sent.append(job)
            yield job

    for values in executor.map(measure_batch, tasks()):
        yield sent.pop(0), values
