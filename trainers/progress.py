"""Progress on stderr, with the time left at the rate of the last minutes; items of earlier runs do not count."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

WINDOW = 120.0  # seconds
EVERY, EVERY_IN_A_LOG = 1.0, 60.0  # seconds


class Progress:
    """Counter of one stage. total: items; done: those that earlier runs have done, which say nothing of the rate."""

    def __init__(
        self, title: str, total: int, done: int = 0, unit: str = "pictures", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque([(clock(), done)])
        self._shown = clock()
        self._terminal = sys.stderr.isatty()

    def add(self, items: int = 1) -> None:
        """Count items that this run has done."""
        self.done += items
        now = self._clock()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and now - self._marks[0][0] > WINDOW:
            self._marks.popleft()
        if now - self._shown >= (EVERY if self._terminal else EVERY_IN_A_LOG):
            self._shown = now
            start, end = ("\r", "") if self._terminal else ("", "\n")
            print(f"{start}{self.line():<78}", end=end, file=sys.stderr, flush=True)

    def skip(self, items: int) -> None:
        """Count items that need no work in this run."""
        self.done += items
        self._marks = deque((at, count + items) for at, count in self._marks)

    @property
    def rate(self) -> float | None:
        """Items per second in the last minutes, None before there are any."""
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return (after - before) / (last - first) if after > before and last > first else None

    def line(self) -> str:
        """One line: done of total, rate, time left."""
        text = f"{self.title}: {self.done:,} of {self.total:,} {self.unit}"
        if self.rate is None:
            return text
        left = max(self.total - self.done, 0) / self.rate
        return f"{text}, {self.rate:.3g} a second, {duration(left)} left"

    def close(self) -> None:
        """Clear the line of a terminal."""
        if self._terminal:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
