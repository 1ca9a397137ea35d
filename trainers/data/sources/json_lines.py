"""The release's rows: JSONL with input_images, instruction, output_image."""

from __future__ import annotations

import io
import json
from typing import BinaryIO

import numpy as np

from ...config.run import ConfigError, DataConfig
from ..rows import BadRow, Record
from .base import PictureRows, record_of
from .captions import decode_text, encoding_of


class JsonLines(PictureRows):
    """The release's rows: one JSON object per line, empty lines ignored. Only line offsets are in memory.

    A file in UTF-16 or UTF-32 is kept in memory whole, as UTF-8.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        if not self.path.is_file():
            raise ConfigError(f"data.path: expected a JSONL file for data.kind jsonl, got {self.path}, which is none")
        self.decoded = self._decoded()
        self.lines, self.starts = self._index()
        self.count = len(self.lines)

    def _decoded(self) -> bytes | None:
        """The file as UTF-8, where it is in another encoding."""
        with open(self.path, "rb") as file:
            encoding, length = encoding_of(file.read(4))
        if encoding == "utf-8":
            self.mark = length
            return None
        self.mark = 0
        try:
            return decode_text(self.path.read_bytes(), self.path.name).encode("utf-8", "surrogatepass")
        except BadRow as error:
            raise ConfigError(f"data.path: {error}") from None

    def _open(self) -> BinaryIO:
        """The lines as UTF-8, from behind the byte order mark."""
        if self.decoded is not None:
            return io.BytesIO(self.decoded)
        file = self.path.open("rb")
        file.seek(self.mark)
        return file

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Number (from 1) and byte offset of every non-empty line."""
        index, at = [], self.mark
        with self._open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    index.append((number, at))
                at += len(line)
        table = np.array(index, dtype=np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def name(self, i: int) -> str:
        return f"line {self.lines[i]}"

    def read(self, i: int) -> Record:
        with self._open() as file:
            file.seek(self.starts[i])
            line = file.readline()
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"the line is not valid JSON ({error})") from None
        return record_of(values, self.root)
