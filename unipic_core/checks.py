"""Accept Python and numpy numbers; reject strings and bools."""

from __future__ import annotations

import math
from numbers import Integral, Real


def finite(value: object) -> int | float | None:
    """Convert a finite number to Python's int or float; None for NaN, infinity, an int that no float can be, and
    anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if isinstance(value, Integral):
        return int(value)
    return number if math.isfinite(number) else None


def whole(value: object) -> int | None:
    """Convert a whole number of any size to int, 64.0 to 64; None for anything else."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    number = finite(value)
    return int(number) if number is not None and number == int(number) else None
