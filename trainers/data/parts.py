"""One of several processes or machines that encode a cache together: each takes every n-th shard."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..config.run import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True)
class CachePart:
    """Part `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[Item]) -> list[Item]:
        """This part's items."""
        return list(items[self.index :: self.count])

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def suffix(self) -> str:
        """For names of files that each part writes."""
        return "" if self.count == 1 else f"-part-{self.index + 1}-of-{self.count}"


def part_named(text: str | None) -> CachePart:
    """`i/n`, counted from 1; None: the process's place among those that accelerate launch or torchrun started.

    Raises ConfigError for anything else.
    """
    if text is None:
        return CachePart(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    numbers = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise ConfigError(f"--part: expected i/n with i from 1 to n, as 2/8, got {text!r}")
    return CachePart(int(numbers[1]) - 1, int(numbers[2]))
