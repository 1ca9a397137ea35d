"""Check rows before encoding (headers only), skip unusable ones, and list them in report.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from unipic_core.errors import printable
from unipic_core.replacing import write_json

from ..config.parse import make_folder
from ..config.run import ConfigError, DataConfig
from .parts import CachePart
from .rows import BadRow, Row
from .sources import Source, open_source

CHECKED_AT_ONCE = 1024

ROWS_AT_ONCE = 64
"""Number of samples whose decoded pictures are in memory at a time."""


@dataclass(frozen=True)
class CheckedSource:
    """Source with the result of checking some of its rows. digests: row -> digest; bad: row -> reason."""

    source: Source
    digests: dict[int, str]
    bad: dict[int, str]

    @property
    def duplicates(self) -> int:
        """Number of usable rows whose prompt and pictures are those of an earlier row."""
        usable = [digest for i, digest in self.digests.items() if i not in self.bad and digest]
        return len(usable) - len(set(usable))

    def digest(self, indices: Sequence[int]) -> str:
        """Digest of the source data of these rows, 16 hex digits."""
        return hashlib.sha256(json.dumps([self.digests[i] for i in indices]).encode()).hexdigest()[:16]


def check_rows(data: DataConfig, part: CachePart = CachePart()) -> CheckedSource:
    """Check every row of the part's shards without decoding pictures. Raises ConfigError if none is usable."""
    source = open_source(data)
    print(source.note)
    digests: dict[int, str] = {}
    bad: dict[int, str] = {}
    rows = [i for shard in part.of(shard_ranges(data, len(source))) for i in shard]
    for i, (digest, reason) in zip(rows, checked_in_parallel(source, rows, data), strict=True):
        if reason is not None:
            refuse_bad_row(data, source, i, reason)
            bad[i] = reason
        digests[i] = digest
    checked = CheckedSource(source, digests, bad)
    make_folder(Path(data.folder), "data.folder")
    require_usable(data, checked, bad)
    return checked


def shard_ranges(data: DataConfig, rows: int) -> list[range]:
    """The rows of each shard."""
    size = data.samples_per_shard
    return [range(at, min(at + size, rows)) for at in range(0, rows, size)]


def checked_in_parallel(source: Source, rows: Sequence[int], data: DataConfig) -> Iterator[tuple[str, str | None]]:
    """(digest, reason why the row cannot be used) of each; threads, because files are read and digested."""

    def check(i: int) -> tuple[str, str | None]:
        try:
            return source.check(i), None
        except BadRow as error:
            return f"bad: {error}", str(error)

    with ThreadPoolExecutor(max(data.workers, 1)) as pool:
        for at in tqdm(range(0, len(rows), CHECKED_AT_ONCE), desc="checking", leave=False, disable=data.kind == "nano"):
            yield from pool.map(check, rows[at : at + CHECKED_AT_ONCE])


def refuse_bad_row(data: DataConfig, source: Source, i: int, reason: object) -> None:
    """Raise ConfigError for a row that cannot be used, where the config asks for it."""
    if data.bad_rows == "stop":
        raise ConfigError(
            printable(
                f"{source.name(i)} of {data.path}: {reason}; correct it, or skip such rows with data.bad_rows=skip"
            )
        )


def require_usable(data: DataConfig, checked: CheckedSource, bad: dict[int, str]) -> None:
    """Write the report and raise ConfigError if no row is usable."""
    if len(bad) == len(checked.digests) and (bad or not len(checked.source)):
        report = write_report(data, checked, bad)
        why = f"{checked.source.name(min(bad))}: {bad[min(bad)]}" if bad else "it has no rows"
        raise ConfigError(printable(f"no row of {data.path} can be used; {why}; all reasons: {report}"))


def write_report(data: DataConfig, checked: CheckedSource, bad: dict[int, str], part: CachePart = CachePart()) -> Path:
    """Write report.json: each skipped row (counted from 0), its name and the reason."""
    skipped = [{"row": i, "name": checked.source.name(i), "reason": bad[i]} for i in sorted(bad)]
    total = len(checked.digests)
    path = Path(data.folder) / f"report{part.suffix}.json"
    values = {"rows": total, "used": total - len(bad), "duplicates": checked.duplicates, "skipped": skipped}
    write_json(path, values)
    return path


def print_report(data: DataConfig, checked: CheckedSource, bad: dict[int, str], part: CachePart = CachePart()) -> None:
    """Write the report; print one line if any row is skipped."""
    path = write_report(data, checked, bad, part)
    if checked.duplicates:
        print(
            f"{checked.duplicates} of {len(checked.digests)} rows are the same as an earlier one; they are encoded too"
        )
    if bad:
        first = min(bad)
        where = f"first {checked.source.name(first)}: {bad[first]}"
        print(printable(f"{len(bad)} of {len(checked.digests)} rows are skipped, {where}; all reasons: {path}"))


class DecodedRows(Dataset):
    """Rows of a source for a DataLoader, each as (index, Row) or (index, reason for skipping it)."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, Row | str]:
        index = self.indices[i]
        try:
            return index, self.source[index]
        except BadRow as error:
            return index, str(error)


def load_rows(checked: CheckedSource, indices: Sequence[int], workers: int) -> Iterator[list[tuple[int, Row | str]]]:
    """Decode the rows that passed the check, ROWS_AT_ONCE at a time."""
    good = [i for i in indices if i not in checked.bad]
    rows: list[tuple[int, Row | str]] = []
    for row in DataLoader(DecodedRows(checked.source, good), batch_size=None, num_workers=workers):
        rows.append(row)
        if len(rows) == ROWS_AT_ONCE:
            yield rows
            rows = []
    if rows:
        yield rows
