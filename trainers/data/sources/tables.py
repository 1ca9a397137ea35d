"""Rows in parquet files, read one row group at a time (pyarrow: parquet's codecs are no thing to write oneself)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...config.run import ConfigError, DataConfig
from ..rows import Record
from .base import PictureRows, record_of

COLUMNS = ("input_images", "instruction", "output_image")
OPTIONAL = ("mask",)


class ParquetRows:
    """The rows of a parquet file, or of all `*.parquet` of a folder in the order of their names. ConfigError."""

    def __init__(self, path: Path) -> None:
        self.paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.paths:
            raise ConfigError(f"data.path: expected a parquet file or a folder of them, got {path}, which has none")
        groups: list[tuple[int, int, int]] = []  # file, row group, rows
        for i, one in enumerate(self.paths):
            file = open_parquet(one)
            missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise ConfigError(f"{one} has no column {', '.join(missing)}; it has {file.schema_arrow.names}")
            groups += [(i, g, file.metadata.row_group(g).num_rows) for g in range(file.metadata.num_row_groups)]
        self.groups = [(i, g) for i, g, _ in groups]
        self.starts = np.cumsum([0, *(rows for *_, rows in groups)])
        self._group = lru_cache(maxsize=1)(self._read)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_group"}  # for loaders' workers

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._group = lru_cache(maxsize=1)(self._read)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """A row's columns as Python values."""
        at = int(np.searchsorted(self.starts, i, side="right")) - 1
        table, row = self._group(at), i - int(self.starts[at])
        return {name: table.column(name)[row].as_py() for name in table.column_names}

    def _read(self, at: int) -> Any:
        file, group = self.groups[at]
        opened = open_parquet(self.paths[file])
        optional = [name for name in OPTIONAL if name in opened.schema_arrow.names]
        return opened.read_row_group(group, columns=[*COLUMNS, *optional])


class Parquet(PictureRows):
    """Parquet files with the columns input_images, instruction, output_image and, where rows have masks, mask.

    Pictures are Image features ({"bytes", "path"}), bytes, or paths below data.images.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        self.table = ParquetRows(self.path)
        self.count = len(self.table)

    def read(self, i: int) -> Record:
        return record_of(self.table[i], self.root)


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile: its footer is read, no row. ConfigError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError('data.kind parquet needs pyarrow; run pip install "comfyui-unipic[parquet]"') from None
    try:
        return ParquetFile(path, memory_map=True)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path} is not a parquet file ({' '.join(str(error).split())[:200]})") from None
