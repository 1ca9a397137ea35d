"""Combination of a question's numbers into a value, and of a case's values into its score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Kind = Literal["scores", "named", "lines", "digit", "yes_no"]
Combine = Literal["min", "mean", "geometric", "product", "capped_mean"]


def combine(values: Sequence[float], how: Combine) -> float:
    """Combine numbers >= 0 (at least one) by minimum, mean, geometric mean or product.

    capped_mean: none counts for more than the first.
    """
    if how == "min":
        return min(values)
    if how == "mean":
        return sum(values) / len(values)
    if how == "capped_mean":
        return sum(min(value, values[0]) for value in values) / len(values)
    if how == "product":
        return math.prod(values)
    return math.prod(values) ** (1 / len(values))
