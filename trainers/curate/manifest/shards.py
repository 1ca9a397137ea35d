"""Manifest shards: JSON lines, one file per `rows_per_shard` rows, in a folder per stage and key.

The key digests the stage's settings and the content of the stage before, so a changed config or changed input never
reuses old shards. Shards are written aside and renamed; after a kill, the next run finds whole shards only.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from unipic_core.replacing import replacing

from ...digests import add_file
from ..errors import CurateError

T = TypeVar("T")
Row = dict[str, Any]
"""JSON object of a manifest."""

KEY_LENGTH = 12
ESCAPED = "backslashreplace"
"""Error handler by which half characters, as in file names that are not UTF-8, become escapes of JSON, as \\udcfc."""


class StageFolder:
    """Shards 0 .. count - 1 of one stage: OUT/NAME-KEY/00000.jsonl, ..."""

    def __init__(self, out: Path, name: str, key: str, count: int) -> None:
        self.name, self.key, self.count = name, key[:KEY_LENGTH], count
        self.path = out / f"{name}-{self.key}"
        make_folder(self.path)

    def shard(self, index: int) -> Path:
        """Path of one shard."""
        return self.path / f"{index:05d}.jsonl"

    def done(self, index: int) -> bool:
        """True if the shard was written, by this run or an earlier one."""
        return self.shard(index).exists()

    def read(self, index: int) -> list[Row]:
        """Rows of one shard. Raises CurateError for a damaged one."""
        path = self.shard(index)
        try:
            return [row_of(line) for line in path.read_bytes().splitlines()]
        except (OSError, ValueError):
            raise CurateError(f"{path} cannot be read; remove it and run the same command again") from None

    def write(self, index: int, rows: Iterable[Row]) -> None:
        """Write one shard; one with the same content stays untouched."""
        write_lines(self.shard(index), rows)

    def complete(
        self, index: int, items: Sequence[T], make: Callable[[list[T]], Iterable[Row]], done: Callable[[Row], bool]
    ) -> int:
        """Write one shard, a row per item, and return how many rows an earlier run had made.

        make: the rows of items, in order. done: False for a row that is made again, as after a passing failure.
        """
        found = {i: row for i, row in enumerate(self.read(index)) if done(row)} if self.done(index) else {}
        missing = {i: item for i, item in enumerate(items) if i not in found}
        if missing or not self.done(index):
            rows = found | dict(zip(missing, make(list(missing.values())), strict=True))
            self.write(index, [rows[i] for i in range(len(items))])
        return len(found)

    def rows(self) -> Iterator[Row]:
        """All rows in order, one shard in memory at a time."""
        for index in range(self.count):
            yield from self.read(index)

    @property
    def content(self) -> str:
        """Digest of the shards' bytes."""
        whole = hashlib.sha256()
        for index in range(self.count):
            digest = hashlib.sha256()
            add_file(digest, self.shard(index))
            whole.update(digest.digest())
        return whole.hexdigest()[:32]


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines aside and rename. Raises CurateError on a full disk."""
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_bytes(path, lines.encode("utf-8", ESCAPED))


def row_of(line: bytes) -> Row:
    """Parse one line of a shard. Raises ValueError."""
    row: Row = json.loads(line.decode("utf-8", "surrogateescape"))  # earlier versions wrote file names as their bytes
    return row


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file aside and rename it; a file with these bytes stays. Raises CurateError on a full disk."""
    try:
        if path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise full_disk(path, error) from None


def full_disk(path: Path, error: OSError) -> CurateError:
    """Error of one sentence for a file that cannot be written."""
    return CurateError(
        f"cannot write {path}: {error.strerror or error}; free some space and run the same command again to continue"
    )


def make_folder(path: Path) -> None:
    """Create a folder. Raises CurateError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CurateError(f"expected a folder at {path}: {error.strerror or error}; choose another out") from None


class RowIndex:
    """Random access to the rows of a stage that `keep` is true for; 24 bytes of memory per row.

    categories: the rows of each category.
    """

    def __init__(self, folder: StageFolder) -> None:
        self.folder = folder
        members: dict[str, array[int]] = {}
        places: array[int] = array("q")
        count = 0
        for shard in range(folder.count):
            at = 0
            with folder.shard(shard).open("rb") as file:
                for line in file:
                    row = row_of(line)
                    if row["keep"] is True:
                        members.setdefault(str(row["category"]), array("q")).append(count)
                        places.extend((shard, at))
                        count += 1
                    at += len(line)
        self.places = np.frombuffer(places, np.int64).reshape(-1, 2)
        self.categories = {name: np.frombuffer(rows, np.int64) for name, rows in sorted(members.items())}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        shard, at = (int(value) for value in self.places[index])
        with self.folder.shard(shard).open("rb") as file:
            file.seek(at)
            return row_of(file.readline())


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of at most `size` items."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def shard_ranges(rows: int, size: int) -> Sequence[range]:
    """Rows of each shard."""
    return [range(at, min(at + size, rows)) for at in range(0, rows, size)]
