"""Which samples make up a batch: a pure function of (seed, step), so that a resumed run needs no saved position."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

import numpy as np

from ..config.run import ConfigError

Batch = tuple[str, np.ndarray]
"""A bucket's name and the indices in it."""


class BucketOrder:
    """Every sample equally often, in whole batches of one bucket.

    A bucket is an endless row of permutations, cut into batches. In epoch e it gives those batches that end in its
    e-th permutation, so what is left at its end opens the next epoch, and a bucket smaller than a batch comes up only
    every so many epochs instead of being repeated within one. The batches of an epoch are shuffled.
    """

    def __init__(self, sizes: dict[str, int], batch_size: int, seed: int) -> None:
        self.sizes = {name: n for name, n in sorted(sizes.items()) if n}
        if not self.sizes:
            raise ConfigError("the cache holds no sample; run python -m trainers.cache with the same config")
        self.batch_size, self.seed = batch_size, seed

    def __getitem__(self, step: int) -> Batch:
        epoch = self._epoch_of(step)
        name, batch = self._batches(epoch)[step - self._before(epoch)]
        return name, self._samples(name, batch * self.batch_size, (batch + 1) * self.batch_size)

    def _before(self, epoch: int) -> int:
        """Batches of all epochs before this one."""
        return sum(epoch * n // self.batch_size for n in self.sizes.values())

    def _epoch_of(self, step: int) -> int:
        """The epoch with _before(epoch) <= step < _before(epoch + 1)."""
        most = (step + len(self.sizes)) * self.batch_size // sum(self.sizes.values()) + 1
        return bisect_right(range(most + 1), step, key=self._before) - 1

    @lru_cache(maxsize=2)  # noqa: B019 - there is one order, and it lives as long as the run
    def _batches(self, epoch: int) -> list[tuple[str, int]]:
        """(bucket, number of its batch) in the order of the epoch."""
        size = self.batch_size
        batches = [
            (name, b) for name, n in self.sizes.items() for b in range(epoch * n // size, (epoch + 1) * n // size)
        ]
        return [batches[i] for i in np.random.default_rng([self.seed, epoch]).permutation(len(batches))]

    def _samples(self, name: str, start: int, stop: int) -> np.ndarray:
        """Samples start .. stop of the bucket's endless row."""
        n = self.sizes[name]
        rounds = range(start // n, (stop - 1) // n + 1)
        row = np.concatenate([self._permutation(name, r) for r in rounds])
        return row[start - rounds[0] * n : stop - rounds[0] * n]

    @lru_cache(maxsize=4096)  # noqa: B019
    def _permutation(self, name: str, number: int) -> np.ndarray:
        bucket = list(self.sizes).index(name)
        return np.random.default_rng([self.seed, number, 1, bucket]).permutation(self.sizes[name])
