"""Numbers as callers bring them, Python's and numpy's alike. A text is no number, nor are True and False."""

from __future__ import annotations

import math
from numbers import Integral, Real


def finite(value: object) -> int | float | None:
    """The number as Python's own, None for NaN, infinity and what is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def whole(value: object) -> int | None:
    """The whole number that this is, as 64.0 is 64; None if it is none."""
    number = finite(value)
    return int(number) if number is not None and number == int(number) else None
