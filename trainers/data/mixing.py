"""Rows of several sources in one order: shares by repeats or weights, or optimizer steps that alternate between groups.

Every source is an endless sequence of permutations of its rows. A fixed pattern says which source each sample comes
from; it spreads every source evenly, so that an update of n samples has its share of them, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..config.run import ConfigError
from .batches import Order, RowOrder


class EndlessRows:
    """Permutation after permutation of the rows 0 .. rows - 1, in which `window` successive ones are all different."""

    def __init__(self, rows: int, window: int, seed: Sequence[int]) -> None:
        self.rows, self.window, self.seed = rows, window, list(seed)

    def take(self, start: int, count: int) -> np.ndarray:
        """Members start .. start + count - 1 of the sequence, int64 [count]."""
        epochs = range(start // self.rows, (start + count - 1) // self.rows + 1)
        parts = [self._epoch(e)[max(start - e * self.rows, 0) : start + count - e * self.rows] for e in epochs]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    @lru_cache(maxsize=3)  # noqa: B019 - lives as long as the run
    def _epoch(self, epoch: int) -> np.ndarray:
        """A permutation whose first `window` rows are not among the last `window` of the one before.

        The rows at the end of a permutation stay as drawn, so one epoch depends on one other. Sets of fewer than four
        windows keep their first permutation: then any rows that follow each other are different.
        """
        if self.rows < 4 * self.window:
            return self._drawn(0)
        order, window = self._drawn(epoch), self.window
        if epoch and window > 1:
            order = order.copy()
            taken = np.isin(order, self._drawn(epoch - 1)[-window:])
            twice = np.flatnonzero(taken[:window])
            free = window + np.flatnonzero(~taken[window : 2 * window + len(twice)])[: len(twice)]
            order[twice], order[free] = order[free], order[twice]
        return order

    def _drawn(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self.seed, epoch]).permutation(self.rows)


def even_pattern(counts: Sequence[int]) -> np.ndarray:
    """Source of each of sum(counts) samples, int64: source j comes counts[j] times, at even distances."""
    times = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts])
    sources = np.repeat(np.arange(len(counts)), counts)
    return sources[np.lexsort((sources, times))]


def counts_by_weight(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers near the weights' shares of `total`, each at least 1, of sum `total` where that is possible."""
    exact = np.array(weights) / sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for j in np.argsort(np.floor(exact) - exact, kind="stable")[: max(total - int(counts.sum()), 0)]:
        counts[j] += 1
    return counts.tolist()


class MixedOrder:
    """Samples of several sources in each batch. groups: the rows of each; counts: samples of each in an epoch."""

    def __init__(
        self, groups: Sequence[np.ndarray], counts: Sequence[int], batch_size: int, seed: int, accumulation: int = 1
    ) -> None:
        self.groups, self.batch_size, self.rows_per_update = list(groups), batch_size, batch_size * accumulation
        self.rows = sum(counts)
        self.pattern = even_pattern(counts)
        self.before = np.stack(
            [np.concatenate([[0], np.cumsum(self.pattern == j)]) for j in range(len(groups))]
        )  # [sources, rows + 1]: samples of each source before a place of the epoch
        self.sequences = [
            EndlessRows(len(rows), self._most(j), [seed, j]) for j, rows in enumerate(self.groups) if self._fits(j)
        ]

    def _most(self, source: int) -> int:
        """Most samples of a source in one update, wherever that begins."""
        places = np.arange(self.rows)
        return int((self._passed(source, places + self.rows_per_update) - self._passed(source, places)).max())

    def _passed(self, source: int, places: np.ndarray) -> np.ndarray:
        """Samples of a source before these places of the endless pattern."""
        epochs, rest = np.divmod(places, self.rows)
        return epochs * self.before[source, -1] + self.before[source, rest]

    def _fits(self, source: int) -> bool:
        """Raise ConfigError if an update would hold a row of the source twice."""
        most, rows = self._most(source), len(self.groups[source])
        if most > rows:
            raise ConfigError(
                f"an update of {self.rows_per_update} samples takes {most} different rows of data.sources[{source}], "
                f"which has {rows}; lower its weight or repeats, or batch_size or accumulation, or add rows"
            )
        return True

    def __getitem__(self, index: int) -> np.ndarray:
        places = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        sources = self.pattern[places % self.rows]
        rows = np.empty(self.batch_size, dtype=np.int64)
        for source in np.unique(sources).tolist():
            here = np.flatnonzero(sources == source)
            start = int(self._passed(source, places[here[:1]])[0])
            rows[here] = self.groups[source][self.sequences[source].take(start, len(here))]
        return rows


class AlternatingOrder:
    """One group after the other, an update each. orders: of each group, over the rows of all; counts: updates of each
    in a round."""

    def __init__(self, orders: Sequence[Order], counts: Sequence[int]) -> None:
        self.orders, self.pattern = list(orders), even_pattern(counts)
        self.rows = sum(order.rows for order in orders)
        self.batch_size, self.rows_per_update = orders[0].batch_size, orders[0].rows_per_update
        self.accumulation = self.rows_per_update // self.batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        update, batch = divmod(index, self.accumulation)
        rounds, place = divmod(update, len(self.pattern))
        group = int(self.pattern[place])
        each = int((self.pattern == group).sum())
        done = rounds * each + int((self.pattern[:place] == group).sum())
        return self.orders[group][done * self.accumulation + batch]


class Chosen:
    """An order over some of the rows alone."""

    def __init__(self, order: RowOrder, rows: np.ndarray) -> None:
        self.order, self.chosen = order, rows
        self.rows, self.batch_size, self.rows_per_update = order.rows, order.batch_size, order.rows_per_update

    def __getitem__(self, index: int) -> np.ndarray:
        return self.chosen[self.order[index]]
