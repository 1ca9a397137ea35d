"""Use of each reference in the new picture: its strength, its region and its part of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import finite
from ..errors import UniPicError

GRID = 1000
"""Side of the grid on which regions are given, whatever the picture's size."""

MAX_STRENGTH = 100.0


@dataclass(frozen=True)
class Region:
    """Box in the new picture, on a grid of GRID x GRID from its left and top. Raises UniPicError for an empty one."""

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        sides = [finite(side) for side in (self.left, self.top, self.right, self.bottom)]
        if any(side is None or not 0 <= side <= GRID for side in sides):
            given = (self.top, self.left, self.bottom, self.right)
            raise UniPicError(f"a box must lie between 0 and {GRID}, got [top, left, bottom, right] = {list(given)}")
        if not (self.left < self.right and self.top < self.bottom):
            raise UniPicError(f"a box must be wider and higher than 0, got {self}")
        if max(self.right, self.bottom) <= 1:
            raise UniPicError(
                f"a box must be on a grid from 0 to {GRID}, got one from 0 to 1: {self}; multiply by {GRID}"
            )

    def __str__(self) -> str:
        sides = (self.top, self.left, self.bottom, self.right)
        return f"[top, left, bottom, right] = [{', '.join(f'{side:g}' for side in sides)}]"

    @property
    def whole(self) -> bool:
        """True for the whole picture."""
        return (self.left, self.top, self.right, self.bottom) == (0, 0, GRID, GRID)


@dataclass(frozen=True)
class Influence:
    """Use of one reference.

    strength: factor on the attention of the new picture's tokens to the reference; 1 = as without, 0 = none. region:
    tokens outside it do not attend to the reference; None = everywhere. start, end: part of the run in which both
    count, as shares of its steps. Raises UniPicError.
    """

    strength: float = 1.0
    region: Region | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        strength = finite(self.strength)
        if strength is None or not 0 <= strength <= MAX_STRENGTH:
            raise UniPicError(
                f"a reference's strength must be a number from 0 to {MAX_STRENGTH:g}, got {self.strength!r}; 1 is usual"
            )
        start, end = finite(self.start), finite(self.end)
        if start is None or end is None or not 0 <= start <= end <= 1:
            raise UniPicError(
                f"a reference's start and end must be numbers from 0 to 1 in order, got {self.start!r} and {self.end!r}"
            )

    @property
    def neutral(self) -> bool:
        """True if it changes nothing."""
        return self.strength == 1 and (self.region is None or self.region.whole)


NEUTRAL = Influence()
"""The influence that changes nothing."""


def checked_influences(influences: Sequence[Influence] | None, count: int) -> tuple[Influence, ...]:
    """One influence per reference; empty if none changes anything. Raises UniPicError for another number of them."""
    if influences is None:
        return ()
    if len(influences) != count or not all(isinstance(influence, Influence) for influence in influences):
        raise UniPicError(f"expected one Influence for each of {count} pictures, got {list(influences)!r:.200}")
    return () if all(influence.neutral for influence in influences) else tuple(influences)
