"""How the numbers of one question become a value, and the values of a case its score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Kind = Literal["scores", "lines", "digit", "yes_no"]
Combine = Literal["min", "mean", "geometric", "product"]


def combine(values: Sequence[float], how: Combine) -> float:
    """min, mean, geometric mean, or product of at least one number of 0 or more."""
    if how == "min":
        return min(values)
    if how == "mean":
        return sum(values) / len(values)
    if how == "product":
        return math.prod(values)
    return math.prod(values) ** (1 / len(values))
