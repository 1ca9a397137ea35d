"""Which samples make up a batch: a pure function of (seed, step), so that a resumed run needs no saved position."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Batch = tuple[str, np.ndarray]
"""A bucket's name and the indices in it."""


class BucketOrder:
    """Every epoch visits every sample once, in batches of one bucket; its last batch is filled from its start."""

    def __init__(self, sizes: dict[str, int], batch_size: int, seed: int) -> None:
        self.sizes = {name: n for name, n in sorted(sizes.items()) if n}
        self.batch_size, self.seed = batch_size, seed
        self.batches_per_epoch = sum(-(-n // batch_size) for n in self.sizes.values())

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[position]

    @lru_cache(maxsize=2)  # noqa: B019 - there is one order, and it lives as long as the run
    def _epoch(self, epoch: int) -> list[Batch]:
        rng = np.random.default_rng([self.seed, epoch])
        batches: list[Batch] = []
        for name, n in self.sizes.items():
            order = rng.permutation(n)
            padded = np.resize(order, -(-n // self.batch_size) * self.batch_size)
            batches.extend((name, part) for part in padded.reshape(-1, self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]
