"""The rows of each batch, a pure function of (seed, step), and the pieces of near lengths in which they are computed.

An endless row of permutations is cut into updates: each epoch has every row exactly once, at any batch size, and an
update that spans two epochs holds no row twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..config.run import ConfigError

MOST_PADDING = 0.05
"""Share of padding that a piece of a batch may have."""


class RowOrder:
    """order[i] is batch i: int64 [batch_size] rows of 0 .. rows - 1.

    accumulation: batches of one update. ConfigError if an update needs more rows than there are.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, accumulation: int = 1) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.update = batch_size * accumulation
        if not rows:
            raise ConfigError("the cache holds no sample; run python -m trainers.cache with the same config")
        if self.update > rows:
            raise ConfigError(
                f"an update of batch_size {batch_size} x accumulation {accumulation} needs {self.update} different "
                f"rows, but there are {rows}; lower batch_size or accumulation, or add rows"
            )

    def __getitem__(self, index: int) -> np.ndarray:
        start, stop = index * self.batch_size, (index + 1) * self.batch_size
        epochs = range(start // self.rows, (stop - 1) // self.rows + 1)
        pieces = [self._epoch(e)[max(start - e * self.rows, 0) : stop - e * self.rows] for e in epochs]
        return np.concatenate(pieces)

    @lru_cache(maxsize=3)  # noqa: B019 - there is one order, and it lives as long as the run
    def _epoch(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch, whose head avoids the rows that its first update took from the epoch before.

        The last update's worth of a large set stays as drawn, so one epoch depends on one other; small sets are
        computed from the beginning.
        """
        drawn = self._drawn(epoch)
        if not epoch:
            return drawn
        if self.rows >= 3 * self.update:
            return self._apart(drawn, self._drawn(epoch - 1), epoch)
        order = self._drawn(0)
        for e in range(1, epoch + 1):
            order = self._apart(self._drawn(e), order, e)
        return order

    def _drawn(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)

    def _apart(self, order: np.ndarray, before: np.ndarray, epoch: int) -> np.ndarray:
        """`order` with the rows at its head that `before` has at its tail exchanged for later ones."""
        tail = epoch * self.rows % self.update
        if not tail:
            return order
        order, head = order.copy(), self.update - tail
        taken = np.isin(order, before[len(before) - tail :])
        twice = np.flatnonzero(taken[:head])
        free = head + np.flatnonzero(~taken[head:])[: len(twice)]
        order[twice], order[free] = order[free], order[twice]
        return order


@dataclass(frozen=True)
class Lengths:
    """Tokens of every row, int64 [rows]: of the target, of all pictures, and of the text (0 where it is not known)."""

    target: np.ndarray
    pictures: np.ndarray
    text: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        return self.pictures + self.text

    def of(self, rows: np.ndarray) -> Lengths:
        """Those of some rows alone, in their order."""
        return Lengths(self.target[rows], self.pictures[rows], self.text[rows])

    def padded(self, rows: Sequence[int]) -> int:
        """Tokens of these rows in one piece, padding included."""
        chosen = list(rows)
        return len(chosen) * int(self.pictures[chosen].max() + self.text[chosen].max())


def pieces_of(rows: np.ndarray, lengths: Lengths, max_tokens: int = 0) -> list[list[int]]:
    """The rows in pieces of one number of target tokens, padded to at most MOST_PADDING and max_tokens (0: any).

    A row longer than max_tokens is a piece of its own.
    """
    places = np.lexsort((rows, lengths.text[rows], lengths.pictures[rows], lengths.target[rows]))
    pieces: list[list[int]] = []
    for row in rows[places].tolist():
        if pieces and lengths.target[pieces[-1][0]] == lengths.target[row]:
            longer = [*pieces[-1], row]
            padded, full = lengths.padded(longer), int(lengths.whole[longer].sum())
            if padded - full <= MOST_PADDING * padded and (not max_tokens or padded <= max_tokens):
                pieces[-1] = longer
                continue
        pieces.append([row])
    return pieces


def shared_pieces(
    rows: np.ndarray, lengths: Lengths, process: int, processes: int, max_tokens: int = 0
) -> list[tuple[list[int], bool]]:
    """(rows, whether they count) of one process: equally many pieces in each, so that none waits for another.

    Rows of near lengths go round the processes; those that have fewer pieces repeat one that weighs nothing.
    """
    ordered = rows[np.lexsort((rows, lengths.whole[rows], lengths.target[rows]))]
    shares = [ordered[p::processes] for p in range(processes)]
    pieces = [pieces_of(share, lengths, max_tokens) if len(share) else [] for share in shares]
    own, most = pieces[process], max(map(len, pieces))
    spare = [int(ordered[0])]
    return [(piece, True) for piece in own] + [(spare, False)] * (most - len(own))


def data_report(
    order: RowOrder, lengths: Lengths, max_tokens: int = 0, validation_rows: int = 0, most: int = 1000
) -> dict[str, float]:
    """RUN/data.json: counts of rows, micro-batches and tokens; padding and repeats over at most `most` batches.

    lengths: of the rows that train.
    """
    epoch = -(-order.rows // order.batch_size)
    batches = [order[i] for i in range(min(epoch, most))]
    pieces = [piece for rows in batches for piece in pieces_of(rows, lengths, max_tokens)]
    padded, full = sum(map(lengths.padded, pieces)), sum(int(lengths.whole[p].sum()) for p in pieces)
    per_update = order.update // order.batch_size
    updates = [np.concatenate(batches[at : at + per_update]) for at in range(0, len(batches), per_update)]
    return {
        "rows": order.rows + validation_rows,
        "validation_rows": validation_rows,
        "rows_per_epoch": order.rows,
        "micro_batches_per_epoch": round(len(pieces) / len(batches) * epoch),
        "largest_tokens": int(lengths.whole.max()),
        "padding_share": round(1 - full / padded, 4),
        "repeated_in_step": sum(len(rows) - len(np.unique(rows)) for rows in updates),
    }
