"""Rows that cannot be used: found before anything is encoded where a header tells, left out, and listed in a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from unipic_core.errors import printable
from unipic_core.replacing import write_json

from ..config.run import ConfigError, DataConfig
from .rows import BadRow, Row
from .sources import Source, open_source

ROWS_AT_ONCE = 64
"""Decoded pictures of so many samples are in memory at a time."""


@dataclass(frozen=True)
class Checked:
    """A source whose rows have been looked at. digests: per row; bad: row -> reason."""

    source: Source
    digests: list[str]
    bad: dict[int, str]

    def digest(self, indices: Sequence[int]) -> str:
        """Of all that the rows of a shard are made from."""
        return hashlib.sha256(json.dumps([self.digests[i] for i in indices]).encode()).hexdigest()[:16]


def check_rows(data: DataConfig) -> Checked:
    """Look at every row without decoding a picture. ConfigError if none is good."""
    source = open_source(data)
    print(source.note)
    digests, bad = [], {}
    for i in tqdm(range(len(source)), unit=" rows", desc="checking", leave=False, disable=data.kind == "nano"):
        try:
            digests.append(source.check(i))
        except BadRow as error:
            bad[i] = str(error)
            digests.append(f"bad: {error}")
    checked = Checked(source, digests, bad)
    Path(data.folder).mkdir(parents=True, exist_ok=True)
    require_good(data, checked, bad)
    return checked


def require_good(data: DataConfig, checked: Checked, bad: dict[int, str]) -> None:
    """ConfigError, with the report written, if nothing is left."""
    if len(bad) == len(checked.source):
        report = write_report(data, checked, bad)
        why = f"{checked.source.name(0)}: {bad[0]}" if bad else "there is none"
        raise ConfigError(printable(f"no row of {data.path} can be used; {why}; all in {report}"))


def write_report(data: DataConfig, checked: Checked, bad: dict[int, str]) -> Path:
    """report.json: every row that is left out (counted from 0), its name, and why."""
    skipped = [{"row": i, "name": checked.source.name(i), "reason": bad[i]} for i in sorted(bad)]
    total = len(checked.source)
    path = Path(data.folder) / "report.json"
    write_json(path, {"rows": total, "used": total - len(bad), "skipped": skipped})
    return path


def report(data: DataConfig, checked: Checked, bad: dict[int, str]) -> None:
    """The report, and one printed line if any row is left out."""
    path = write_report(data, checked, bad)
    if bad:
        first = min(bad)
        where = f"first {checked.source.name(first)}: {bad[first]}"
        print(printable(f"{len(bad)} of {len(checked.source)} rows are left out, {where}; all in {path}"))


class Tried(Dataset):
    """Some rows of a source for a loader: each with its number, and as a Row or the reason why there is none."""

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


def load_rows(checked: Checked, indices: Sequence[int], workers: int) -> Iterator[list[tuple[int, Row | str]]]:
    """The rows that the check let pass, decoded, a few at a time."""
    good = [i for i in indices if i not in checked.bad]
    rows: list[tuple[int, Row | str]] = []
    for row in DataLoader(Tried(checked.source, good), batch_size=None, num_workers=workers):
        rows.append(row)
        if len(rows) == ROWS_AT_ONCE:
            yield rows
            rows = []
    if rows:
        yield rows
