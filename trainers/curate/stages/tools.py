"""Tools of a run: store, executor, judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...judges.saved_pictures import model_stamp
from ...judges.vlm import in_order
from ..config import DecomposeConfig, ImagesConfig, SynthesiseConfig
from ..filters.catalogue import Filter
from ..manifest.executor import Executor
from ..manifest.scores import Scores
from ..manifest.shards import Row, batches
from ..synthesis.endpoint import ImagesClient
from .questions import Judge, with_judge

BATCH = 4
"""Rows per task."""


@dataclass(frozen=True)
class Tools:
    """Store of measurements, executor of tasks, and the judge, if there is one."""

    scores: Scores
    executor: Executor
    judge: Judge | None = None

    def judge_key(self, one: Filter) -> str:
        """Key of a filter's values in the store."""
        return with_judge(one, self.judge) if one.rank == "endpoint" else one.key

    def map_rows(self, make: Callable[[Row], Row], rows: Sequence[Row], client: ImagesClient | None) -> Iterator[Row]:
        """Yield the rows that ``make`` returns, in order: by threads if it asks a server, else by the executor."""
        if client is not None:
            yield from in_order(make, rows, client.config.concurrency)
            return
        for some in self.executor.map(partial(_batch, make), batches(rows, BATCH)):
            yield from some


def maker_settings(config: DecomposeConfig | SynthesiseConfig, images: ImagesConfig | None) -> list[Any]:
    """Settings of the server, or state of the weights, on which pictures depend beside the stage's own settings."""
    if config.kind == "endpoint":
        assert images is not None  # checked by the config
        return images.picture_settings()
    return [None, None, *([model_stamp(Path(config.model))] if config.model is not None else [])]


def _batch(make: Callable[[Row], Row], rows: Sequence[Row]) -> list[Row]:
    return [make(row) for row in rows]
