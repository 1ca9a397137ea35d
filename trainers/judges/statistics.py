"""Paired bootstrap over samples.

Scores are float arrays [n, k]: n samples with at most k items each, NaN where there is nothing to score. A mean is over
items; a resample draws whole samples, so that items of one picture stay together and systems stay paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval (percentiles of the bootstrap)."""

    value: float
    low: float
    high: float


def rounded(estimate: Estimate | None) -> float | None:
    """The value as it is reported."""
    return None if estimate is None else round(estimate.value, 5)


def interval(estimate: Estimate | None) -> list[float] | None:
    """The bounds as they are reported."""
    return None if estimate is None else [round(estimate.low, 5), round(estimate.high, 5)]


class Bootstrap:
    """The same resamples for everything that is estimated, so all comparisons are paired."""

    def __init__(self, n: int, seed: int, draws: int = DRAWS) -> None:
        rng = np.random.default_rng(seed)
        self.counts = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)  # [draws, n]

    def _sums(self, scores: np.ndarray, where: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum over the scored items, and the same in each resample."""
        per_sample = np.where(where, scores, 0).sum(axis=1)
        return float(per_sample.sum()), self.counts @ per_sample

    def mean(self, scores: np.ndarray) -> Estimate | None:
        """Mean over the items; None when fewer than two samples have any."""
        scored = np.isfinite(scores)
        return self._ratio_of(scores, scored.astype(float), scored)

    def difference(self, first: np.ndarray, second: np.ndarray) -> Estimate | None:
        """Mean of first - second over the items that both score."""
        return self.mean(first - second)

    def ratio(self, first: np.ndarray, second: np.ndarray) -> Estimate | None:
        """Mean of first over mean of second, on the items that both score; None where the second may be 0 or less."""
        both = np.isfinite(first) & np.isfinite(second)
        return self._ratio_of(first, second, both)

    def _ratio_of(self, above: np.ndarray, below: np.ndarray, where: np.ndarray) -> Estimate | None:
        if where.any(axis=1).sum() < 2:
            return None
        numerator, numerators = self._sums(above, where)
        denominator, denominators = self._sums(below, where)
        drawn = denominators > 1e-9
        if denominator <= 1e-9 or drawn.mean() < 0.975:
            return None
        low, high = np.percentile(numerators[drawn] / denominators[drawn], [2.5, 97.5])
        return Estimate(numerator / denominator, float(low), float(high))
