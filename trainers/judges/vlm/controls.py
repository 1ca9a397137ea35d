"""Fitness test: a judge must order pictures of known order: truth, redrawn, shuffled, swapped, background alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..statistics import Bootstrap, Estimate, interval, rounded

ORDER = ("truth", "redrawn", "shuffled", "swapped", "background alone")
EQUAL = ("truth", "redrawn")
"""Equally correct pictures: they may tie, but not be in reverse order."""


@dataclass(frozen=True)
class Step:
    """Neighbouring pair of the order: mean of better - worse, paired by case, with a 95% interval."""

    better: str
    worse: str
    difference: Estimate | None
    holds: bool


@dataclass(frozen=True)
class Fitness:
    """Result of the test. means: per control, with intervals; ``fit``: every step holds."""

    means: Mapping[str, Estimate | None]
    steps: tuple[Step, ...]
    cases: int

    @property
    def fit(self) -> bool:
        return bool(self.steps) and all(step.holds for step in self.steps)

    @property
    def sentence(self) -> str:
        if not self.steps:
            return "not tested: fewer than two of the controls were scored"
        broken = [f"{step.better} from {step.worse}" for step in self.steps if not step.holds]
        if not broken:
            return f"fit: the judge orders the controls of {self.cases} cases as expected"
        return f"unfit: over {self.cases} cases the judge does not separate {', nor '.join(broken)}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "fit": self.fit,
            "sentence": self.sentence,
            "cases": self.cases,
            "means": {name: {"mean": rounded(one), "ci95": interval(one)} for name, one in self.means.items()},
            "steps": [
                {
                    "better": step.better,
                    "worse": step.worse,
                    "difference": rounded(step.difference),
                    "ci95": interval(step.difference),
                    "holds": step.holds,
                }
                for step in self.steps
            ],
        }


def fitness(scores: Mapping[str, np.ndarray], seed: int = 0) -> Fitness:
    """Test scores by control, float [n] of the same n cases, NaN if missing. Raises ValueError for unknown names.

    A step holds if its interval is above 0; between equally correct pictures, if it is not below 0.
    """
    unknown = [name for name in scores if name not in ORDER]
    if unknown:
        raise ValueError(f"expected the controls {', '.join(ORDER)}, got {unknown[0]!r}")
    columns = {name: np.asarray(scores[name], float)[:, None] for name in ORDER if name in scores}
    n = len(next(iter(columns.values()))) if columns else 0
    if n < 2:
        return Fitness({}, (), n)
    bootstrap = Bootstrap(n, seed)
    steps = []
    for better, worse in pairwise(columns):
        gap = bootstrap.difference(columns[better], columns[worse])
        if gap is None:
            holds = False
        elif (better, worse) == EQUAL:
            holds = gap.high >= 0
        else:
            holds = gap.low > 0
        steps.append(Step(better, worse, gap, holds))
    return Fitness({name: bootstrap.mean(column) for name, column in columns.items()}, tuple(steps), n)
