"""Numbering of the cached samples of one or several sets, the order in which they train, and held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..config.run import ConfigError, DataConfig, RunConfig
from .batches import Lengths, Order, RowOrder
from .index import CachedSamples
from .mixing import AlternatingOrder, Chosen, MixedOrder, counts_by_weight
from .shards import Rows

ROUND = 24
"""Updates of a round in which alternating sources have the shares of their weights."""


class Samples:
    """Rows 0 .. len - 1 of all sets, set by set."""

    def __init__(self, sets: Sequence[CachedSamples]) -> None:
        self.sets = list(sets)
        self.starts = np.cumsum([0, *map(len, sets)])
        each = [one.lengths for one in sets]
        self.lengths = Lengths(*(np.concatenate([getattr(x, n) for x in each]) for n in ("target", "pictures", "text")))
        self.digests = np.concatenate([one.digests for one in sets])
        self.num_references = np.concatenate([one.num_references for one in sets])
        self.num_masked = sum(one.num_masked for one in sets)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, row: int) -> Rows:
        """Read one sample as a batch of one."""
        at = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sets[at].take(row - int(self.starts[at]))

    def by_set(self, rows: np.ndarray) -> list[np.ndarray]:
        """Those of these rows that each set has."""
        ends = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [rows[(rows >= start) & (rows < end)] for start, end in ends]


def order_of(config: RunConfig, data: DataConfig, samples: Samples, rows: np.ndarray) -> Order:
    """The batches of a run: all of `rows` once in each epoch, or as repeats, weights and `alternate` say."""
    if data.alternate == "tasks":
        editing = samples.num_references[rows] > 0
        groups = [rows[~editing], rows[editing]]
        if not all(map(len, groups)):
            raise ConfigError("data.alternate: tasks needs rows with references and rows without, got one kind alone")
        return alternating(config, groups, [1, 1])
    groups = samples.by_set(rows)
    if empty := [source.folder for source, group in zip(data.parts, groups, strict=True) if not len(group)]:
        raise ConfigError(f"{empty[0]} has no row to train on; run python -m trainers.cache, or remove it")
    if not data.sources:
        return one_group(config, rows, config.seed)
    weights = [source.weight for source in data.sources if source.weight is not None]
    repeats = [source.repeats for source in data.sources]
    if data.alternate == "sources":
        return alternating(config, groups, counts_by_weight(weights, ROUND) if weights else repeats)
    counts = [n * len(group) for n, group in zip(repeats, groups, strict=True)]
    if weights:
        counts = counts_by_weight(weights, len(rows))
    return MixedOrder(groups, counts, config.batch_size, config.seed, config.accumulation)


def one_group(config: RunConfig, rows: np.ndarray, seed: int) -> Order:
    return Chosen(RowOrder(len(rows), config.batch_size, seed, config.accumulation), rows)


def alternating(config: RunConfig, groups: Sequence[np.ndarray], counts: Sequence[int]) -> Order:
    return AlternatingOrder([one_group(config, rows, config.seed + j) for j, rows in enumerate(groups)], counts)


def held_out_rows(samples: Samples, share: float) -> np.ndarray:
    """Choose the validation rows: int64, ascending, at least one if share is above 0.

    They are the rows with the smallest digests of shapes and prompt: the same in every run on these data, and nearly
    the same after rows are added.
    """
    if not share:
        return np.zeros(0, dtype=np.int64)
    number = max(math.floor(share * len(samples)), 1)
    return np.sort(np.argsort(samples.digests, kind="stable")[:number])


def evenly_spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """Pick at most `count` of the rows at even distances, so that all large buckets are represented."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
