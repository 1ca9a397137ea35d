"""Batches made ahead in a thread, so that reading them does not wait for the training, nor the training for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
WAIT = 0.2
"""Seconds after which the thread looks whether anybody still wants its items."""


class Prefetched(Generic[Item]):
    """The items of an iterator in their order, at most `depth` of them ahead; its errors come where they belong."""

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items, self._ready = items, queue.Queue[tuple[Item | None, BaseException | None]](depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True, name="batches")
        self._thread.start()

    def __iter__(self) -> Prefetched[Item]:
        return self

    def __next__(self) -> Item:
        item, error = self._ready.get()
        if error is not None:
            self._closed.set()
            raise error
        return cast(Item, item)  # None only beside an error

    def close(self) -> None:
        """Stop the thread; it ends after the item that it is making."""
        self._closed.set()

    def _fill(self) -> None:
        while not self._closed.is_set():
            try:
                entry: tuple[Item | None, BaseException | None] = next(self._items), None
            except BaseException as error:  # all of them, interrupts too, belong to whoever asks for this item
                entry = None, error
            while not self._closed.is_set():
                try:
                    self._ready.put(entry, timeout=WAIT)
                    break
                except queue.Full:
                    continue
            if entry[1] is not None:
                return
