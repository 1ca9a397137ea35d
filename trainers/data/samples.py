"""Cached samples under one numbering, and which of them are held out for validation."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from .batches import Lengths
from .shards import Bucket, Rows


class Samples:
    """All samples of a cache: rows 0 .. len - 1, bucket after bucket."""

    def __init__(self, buckets: Mapping[str, Bucket]) -> None:
        self.buckets = dict(buckets)
        self._order = list(self.buckets.values())
        sizes = [len(bucket) for bucket in self._order]
        self.starts = np.cumsum([0, *sizes])
        self.lengths = Lengths(
            np.repeat([b.num_target_tokens for b in self._order], sizes),
            np.repeat([b.num_picture_tokens for b in self._order], sizes),
            np.concatenate([b.text_lengths for b in self._order]),
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, row: int) -> Rows:
        """One sample, as a batch of one."""
        bucket = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self._order[bucket].take([row - int(self.starts[bucket])])

    def prompts(self) -> Iterator[tuple[str, str]]:
        """(shapes, prompt) of every row."""
        for shapes, bucket in self.buckets.items():
            for part in bucket.parts:
                for prompt in part.prompts:
                    yield shapes, prompt


def held_out_rows(samples: Samples, share: float) -> np.ndarray:
    """The rows that validation takes, ascending, int64: at least one where share is above 0.

    Those with the smallest digests of shapes and prompt: the same for every run on these data, and nearly the same
    after rows were added.
    """
    if not share:
        return np.zeros(0, dtype=np.int64)
    seen: Counter[tuple[str, str]] = Counter()
    digests = np.empty(len(samples), dtype=np.uint64)
    for row, key in enumerate(samples.prompts()):
        text = f"{key[0]}\0{seen[key]}\0{key[1]}"  # rows that look alike here are told apart by their order
        digests[row] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        seen[key] += 1
    count = max(math.floor(share * len(samples)), 1)
    return np.sort(np.argsort(digests, kind="stable")[:count])


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, at even distances: all buckets are among them."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]
