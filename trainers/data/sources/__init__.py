"""Data sources: the composition set, JSONL, folders of captioned pictures, saved data sets, parquet, WebDataset tars.

A source is a sequence of rows. `check(i)` digests row i without decoding its pictures; `source[i]` decodes it. Both
raise BadRow. `name(i)` identifies row i to the user: a line number, a file name.
"""

from __future__ import annotations

from typing import Any, Protocol

from ...config.run import DataConfig
from ..rows import Row
from .compositions import Compositions
from .folder import Folder
from .json_lines import JsonLines
from .saved import SavedDataset
from .tables import Parquet
from .tars import Tars

__all__ = ["Compositions", "Source", "open_source"]


class Source(Protocol):
    """Rows 0 .. len - 1. identity: the source's entries of the cache's set.json; note: a line to print."""

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def note(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Row: ...

    def check(self, i: int) -> str: ...

    def name(self, i: int) -> str: ...


def open_source(data: DataConfig) -> Source:
    """Open the source of a config. Raises ConfigError if it does not exist."""
    if data.kind == "nano":
        return Compositions(data, 0, data.samples)
    kinds = {
        "jsonl": JsonLines,
        "folder": Folder,
        "datasets": SavedDataset,
        "parquet": Parquet,
        "webdataset": Tars,
    }
    return kinds[data.kind](data)
