"""Tools of a run: store, executor, judge."""

from __future__ import annotations

from dataclasses import dataclass

from ..filters.catalogue import Filter
from ..manifest.executor import Executor
from ..manifest.scores import Scores
from .questions import Judge, with_judge


@dataclass(frozen=True)
class Tools:
    """Store of measurements, executor of tasks, and the judge, if there is one."""

    scores: Scores
    executor: Executor
    judge: Judge | None = None

    def judge_key(self, one: Filter) -> str:
        """Key of a filter's values in the store."""
        return with_judge(one, self.judge) if one.rank == "endpoint" else one.key
