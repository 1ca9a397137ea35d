"""Batch composition: the rows of each batch, a pure function of (seed, step), and their split into micro-batches.

One permutation of the rows per epoch; the concatenated permutations are cut into updates. Each epoch has every row
exactly once, at any batch size, and an update that spans two epochs holds no row twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from ..config.run import ConfigError

MAX_PADDING = 0.05
"""Largest share of padding in a micro-batch."""


class RowOrder:
    """Sequence of batches: order[i] is batch i, int64 [batch_size], with values in 0 .. rows - 1.

    accumulation: batches per update. Raises ConfigError if an update needs more rows than there are.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, accumulation: int = 1) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rows_per_update = batch_size * accumulation
        self._latest = (-1, np.zeros(0, dtype=np.int64))  # the last epoch of a small set, and its order
        if not rows:
            raise ConfigError("the cache holds no samples; run python -m trainers.cache with the same config")
        if self.rows_per_update > rows:
            raise ConfigError(
                f"an update of batch_size {batch_size} x accumulation {accumulation} needs {self.rows_per_update} "
                f"different rows, got {rows}; lower batch_size or accumulation, or add rows"
            )

    def __getitem__(self, index: int) -> np.ndarray:
        start, stop = index * self.batch_size, (index + 1) * self.batch_size
        epochs = range(start // self.rows, (stop - 1) // self.rows + 1)
        pieces = [self._epoch(e)[max(start - e * self.rows, 0) : stop - e * self.rows] for e in epochs]
        return np.concatenate(pieces)

    @lru_cache(maxsize=3)  # noqa: B019 - there is one order, and it lives as long as the run
    def _epoch(self, epoch: int) -> np.ndarray:
        """Permutation of an epoch, without repeats in the update that it shares with the previous epoch.

        In a large set the last update's worth of rows stays as drawn, so an epoch depends only on the one before it;
        in a small one on all before it, which are computed one from the other.
        """
        permutation = self._permutation(epoch)
        if not epoch:
            return permutation
        if self.rows >= 3 * self.rows_per_update:
            return self._without_repeats(permutation, self._permutation(epoch - 1), epoch)
        done, order = self._latest
        if not 0 <= done <= epoch:
            done, order = 0, self._permutation(0)
        for e in range(done + 1, epoch + 1):
            order = self._without_repeats(self._permutation(e), order, e)
        self._latest = epoch, order
        return order

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)

    def _without_repeats(self, order: np.ndarray, before: np.ndarray, epoch: int) -> np.ndarray:
        """Swap rows at the head of `order` that the tail of `before` already holds with later rows."""
        tail = epoch * self.rows % self.rows_per_update
        if not tail:
            return order
        order, head = order.copy(), self.rows_per_update - tail
        in_tail = np.isin(order, before[len(before) - tail :])
        repeated = np.flatnonzero(in_tail[:head])
        free = head + np.flatnonzero(~in_tail[head:])[: len(repeated)]
        order[repeated], order[free] = order[free], order[repeated]
        return order


@dataclass(frozen=True)
class Lengths:
    """Token counts per row, int64 [rows]: target, all pictures (target included), text (0 where unknown)."""

    target: np.ndarray
    pictures: np.ndarray
    text: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.pictures + self.text

    def select(self, rows: np.ndarray) -> Lengths:
        """Lengths of the given rows, in that order."""
        return Lengths(self.target[rows], self.pictures[rows], self.text[rows])

    def padded_tokens(self, rows: Sequence[int]) -> int:
        """Tokens of these rows in one micro-batch, padding included."""
        chosen = list(rows)
        return len(chosen) * int(self.pictures[chosen].max() + self.text[chosen].max())


def micro_batches_of(rows: np.ndarray, lengths: Lengths, max_tokens: int = 0) -> list[list[int]]:
    """Split rows into micro-batches: equal target sizes, at most MAX_PADDING padding and max_tokens (0: any).

    A row longer than max_tokens is a micro-batch by itself.
    """
    by_length = np.lexsort((rows, lengths.text[rows], lengths.pictures[rows], lengths.target[rows]))
    micro_batches: list[list[int]] = []
    for row in rows[by_length].tolist():
        if micro_batches and lengths.target[micro_batches[-1][0]] == lengths.target[row]:
            longer = [*micro_batches[-1], row]
            padded, full = lengths.padded_tokens(longer), int(lengths.total[longer].sum())
            if padded - full <= MAX_PADDING * padded and (not max_tokens or padded <= max_tokens):
                micro_batches[-1] = longer
                continue
        micro_batches.append([row])
    return micro_batches


def micro_batches_of_process(
    rows: np.ndarray, lengths: Lengths, process: int, processes: int, max_tokens: int = 0
) -> list[tuple[list[int], bool]]:
    """List (rows, counts) for one process; every process gets the same number of micro-batches, so none waits.

    Rows of similar length are dealt round the processes. A process with fewer micro-batches is padded with repeats of
    the shortest row, which have counts False and contribute no gradient.
    """
    ordered = rows[np.lexsort((rows, lengths.total[rows], lengths.target[rows]))]
    shares = [ordered[p::processes] for p in range(processes)]
    all_processes = [micro_batches_of(share, lengths, max_tokens) if len(share) else [] for share in shares]
    this_process, count = all_processes[process], max(map(len, all_processes))
    filler = [int(ordered[0])]
    return [(rows, True) for rows in this_process] + [(filler, False)] * (count - len(this_process))


class Order(Protocol):
    """order[i]: the rows of batch i, int64 [batch_size]. rows: samples of an epoch; rows_per_update: of an update."""

    rows: int
    batch_size: int
    rows_per_update: int

    def __getitem__(self, index: int) -> np.ndarray: ...


def data_report(
    order: Order, lengths: Lengths, max_tokens: int = 0, validation_rows: int = 0, max_batches: int = 1000
) -> dict[str, float]:
    """Contents of RUN/data.json: rows, micro-batches, tokens, and padding and repeats over at most max_batches batches.

    lengths: of all rows that the order names.
    """
    epoch = -(-order.rows // order.batch_size)
    batches = [order[i] for i in range(min(epoch, max_batches))]
    micro_batches = [m for rows in batches for m in micro_batches_of(rows, lengths, max_tokens)]
    padded, full = (
        sum(map(lengths.padded_tokens, micro_batches)),
        sum(int(lengths.total[m].sum()) for m in micro_batches),
    )
    per_update = order.rows_per_update // order.batch_size
    updates = [np.concatenate(batches[at : at + per_update]) for at in range(0, len(batches), per_update)]
    return {
        "rows": len(lengths.target),
        "validation_rows": validation_rows,
        "rows_per_epoch": order.rows,
        "micro_batches_per_epoch": round(len(micro_batches) / len(batches) * epoch),
        "largest_tokens": int(lengths.total.max()),
        "padding_share": round(1 - full / padded, 4),
        "repeated_in_step": sum(len(rows) - len(np.unique(rows)) for rows in updates),
    }
