"""Near duplicates: the first picture of a group stays.

Exact search over 64-bit difference hashes with numpy: 8 + 48 bytes of memory and about 0.5 ms per million pictures
before it. Pictures of one outline in other colours are no duplicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

FAR = 64
"""Bits of a picture without any near one."""

MOST_COLOUR = 12.0
"""Mean absolute difference of the 4 x 4 cells' colours (0..255) up to which two pictures have the same colours."""


NEAR = 16
"""Differing bits up to which a picture is compared, unless a threshold asks for more."""


class Duplicates:
    """Pictures seen so far, in order. least: differing bits of pictures that are no duplicates."""

    def __init__(self, least: float = 0.0) -> None:
        self.radius = max(NEAR, math.ceil(least))
        self.hashes = np.zeros(1024, np.uint64)
        self.colours = np.zeros((1024, 48), np.uint8)
        self.rows = np.zeros(1024, np.int64)
        self.count = 0

    def nearest(self, value: Mapping[str, str]) -> tuple[int, int]:
        """(differing bits, row) of the nearest picture so far with the same colours; (64, -1) if there is none."""
        if not self.count:
            return FAR, -1
        bits = np.bitwise_count(self.hashes[: self.count] ^ _hash(value))
        close = np.flatnonzero(bits <= self.radius)
        if not len(close):
            return FAR, -1
        difference = np.abs(self.colours[close].astype(np.int16) - _colours(value)).mean(axis=1)
        close = close[difference <= MOST_COLOUR]
        if not len(close):
            return FAR, -1
        best = close[int(np.argmin(bits[close]))]
        return int(bits[best]), int(self.rows[best])

    def add(self, value: Mapping[str, str], row: int) -> None:
        """Remember a picture that stays."""
        if self.count == len(self.hashes):
            self.hashes = np.concatenate([self.hashes, np.zeros_like(self.hashes)])
            self.colours = np.concatenate([self.colours, np.zeros_like(self.colours)])
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self.hashes[self.count], self.colours[self.count] = _hash(value), _colours(value)
        self.rows[self.count] = row
        self.count += 1


def _hash(value: Mapping[str, str]) -> np.uint64:
    return np.uint64(int(value["hash"], 16))


def _colours(value: Mapping[str, str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(value["colours"]), np.uint8)
