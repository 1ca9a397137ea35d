"""Percentiles of a corpus, for filters whose scale is the corpus itself."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import numpy as np

LARGEST_SAMPLE = 10_000


class Calibration:
    """Sample of a corpus: the values of the LARGEST_SAMPLE pictures with the smallest digests."""

    def __init__(self, values: Iterable[tuple[str, Mapping[str, float]]]) -> None:
        sample = [value for _, value in heapq.nsmallest(LARGEST_SAMPLE, values, key=lambda one: one[0])]
        self.count = len(sample)
        self.edges = np.sort(np.array([one["edges"] for one in sample]))
        self.bits = np.sort(np.array([one["bits"] for one in sample]))

    def rank(self, value: Mapping[str, float]) -> float:
        """Mean of the percentile ranks of edge density and JPEG bits, 0..1; 0 for a picture without a ground."""
        if not self.count or not value["bits"]:
            return 0.0
        ranks = [_rank(self.edges, value["edges"]), _rank(self.bits, value["bits"])]
        return float(f"{sum(ranks) / 2:.6g}")


def _rank(values: np.ndarray, value: float) -> float:
    """Share of the values below, and half of the equal ones."""
    low, high = np.searchsorted(values, value, "left"), np.searchsorted(values, value, "right")
    return float(low + high) / (2 * len(values))
