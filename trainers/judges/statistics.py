"""Paired bootstrap over samples.

Scores are float arrays [n, k]: n samples with at most k items each, NaN if there is nothing to score. Means are over
items; resamples draw whole samples, so items of one picture stay together and systems stay paired.

Not scipy.stats.bootstrap (1.17, measured): it agrees (0.9856 to 1.0032, ours 0.9854 to 1.0030), but draws resamples per
statistic, takes 168 ms per estimate on 600 samples (ours: 12 ms), 1.3 s to import and 143 MB on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """Value with its 95% bootstrap percentile interval."""

    value: float
    low: float
    high: float


def rounded(estimate: Estimate | None) -> float | None:
    """Rounded value for reports."""
    return None if estimate is None else round(estimate.value, 5)


def interval(estimate: Estimate | None) -> list[float] | None:
    """Rounded bounds for reports."""
    return None if estimate is None else [round(estimate.low, 5), round(estimate.high, 5)]


class Bootstrap:
    """One set of resamples for all estimates, so that all comparisons are paired."""

    def __init__(self, n: int, seed: int, draws: int = DRAWS) -> None:
        rng = np.random.default_rng(seed)
        self.counts = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)  # [draws, n]

    def _sums(self, scores: np.ndarray, where: np.ndarray) -> tuple[float, np.ndarray]:
        """Sum over the scored items, of the sample and of each resample."""
        per_sample = np.where(where, scores, 0).sum(axis=1)
        return float(per_sample.sum()), self.counts @ per_sample

    def mean(self, scores: np.ndarray) -> Estimate | None:
        """Mean over items; None if fewer than two samples have scores."""
        scored = np.isfinite(scores)
        return self._ratio_of(scores, scored.astype(float), scored)

    def difference(self, first: np.ndarray, second: np.ndarray) -> Estimate | None:
        """Mean of first - second over items that both score."""
        return self.mean(first - second)

    def ratio(self, first: np.ndarray, second: np.ndarray) -> Estimate | None:
        """Mean of first / mean of second over items that both score; None if the second may be 0 or negative."""
        both = np.isfinite(first) & np.isfinite(second)
        return self._ratio_of(first, second, both)

    def _ratio_of(
        self, numerator_scores: np.ndarray, denominator_scores: np.ndarray, where: np.ndarray
    ) -> Estimate | None:
        if where.any(axis=1).sum() < 2:
            return None
        numerator, numerators = self._sums(numerator_scores, where)
        denominator, denominators = self._sums(denominator_scores, where)
        defined = denominators > 1e-9
        if denominator <= 1e-9 or defined.mean() < 0.975:
            return None
        low, high = np.percentile(numerators[defined] / denominators[defined], [2.5, 97.5])
        return Estimate(numerator / denominator, float(low), float(high))
