"""Numbering of cached samples, and the choice of held-out rows."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from .batches import Lengths
from .shards import Bucket, Rows


class Samples:
    """All samples of a cache as rows 0 .. len - 1, bucket by bucket."""

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
        """Read one sample as a batch of one."""
        bucket = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self._order[bucket].take([row - int(self.starts[bucket])])

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Yield (shapes, prompt) of every row."""
        for shapes, bucket in self.buckets.items():
            for part in bucket.parts:
                for prompt in part.prompts:
                    yield shapes, prompt


def held_out_rows(samples: Samples, share: float) -> np.ndarray:
    """Choose the validation rows: int64, ascending, at least one if share is above 0.

    They are the rows with the smallest digests of shapes and prompt: the same in every run on these data, and nearly
    the same after rows are added.
    """
    if not share:
        return np.zeros(0, dtype=np.int64)
    counts: Counter[tuple[str, str]] = Counter()
    digests = np.empty(len(samples), dtype=np.uint64)
    for row, key in enumerate(samples.prompts()):
        text = f"{key[0]}\0{counts[key]}\0{key[1]}"  # the count tells rows of equal shapes and prompt apart
        digests[row] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        counts[key] += 1
    number = max(math.floor(share * len(samples)), 1)
    return np.sort(np.argsort(digests, kind="stable")[:number])


def evenly_spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """Pick at most `count` of the rows at even distances, so that all large buckets are represented."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
