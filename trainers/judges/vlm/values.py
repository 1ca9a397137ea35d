"""Combination of a question's numbers into a value, and of a case's values into its score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Kind = Literal["scores", "lines", "digit", "yes_no"]
Combine = Literal["min", "mean", "geometric", "product"]


def combine(values: Sequence[float], how: Combine) -> float:
    """Combine numbers >= 0 (at least one) by minimum, mean, geometric mean or product."""
    if how == "min":
        return min(values)
    if how == "mean":
        return sum(values) / len(values)
    if how == "product":
        return math.prod(values)
    return math.prod(values) ** (1 / len(values))
