"""Sources whose pictures are files or bytes, and the release's keys of a row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...config.run import ConfigError, DataConfig
from ..rows import BadRow, Picture, Record, Row, check_pictures, read_record


class PictureRows:
    """Base of sources whose pictures are files or bytes; a subclass sets `count` and implements `read(i)`."""

    count: int

    needs_path = True
    """False where `data.path` may be a pattern of several files."""

    def __init__(self, data: DataConfig) -> None:
        assert data.path is not None  # checked by DataConfig
        self.data, self.path = data, Path(data.path)
        self.root = Path(data.images) if data.images else self.path if self.path.is_dir() else self.path.parent
        if self.needs_path and not self.path.exists():
            raise ConfigError(
                f"data.path: expected the data set's file or folder, got {self.path}, which does not exist"
            )
        if not self.root.is_dir():
            raise ConfigError(f"data.images: expected the folder of the pictures, got {self.root}")

    @property
    def note(self) -> str:
        return f"{len(self)} rows in {self.path}"

    @property
    def identity(self) -> dict[str, Any]:
        data = self.data
        return {"kind": data.kind, "rows": len(self), "path": data.path, "samples": data.samples, **places_of(data)}

    def __len__(self) -> int:
        return min(self.count, self.data.samples or self.count)

    def __getitem__(self, i: int) -> Row:
        return read_record(self.read(i), self.data.size, self.data.reference_budget)

    def check(self, i: int) -> str:
        return check_pictures(self.read(i))

    def name(self, i: int) -> str:
        return f"row {i}"

    def read(self, i: int) -> Record:
        raise NotImplementedError


PLACES = ("images", "controls")
"""Keys of DataConfig that say where pictures lie."""


def places_of(data: DataConfig) -> dict[str, Any]:
    """Where pictures lie, as JSON holds it; without the keys that say nothing."""
    return {key: list(value) if isinstance(value, tuple) else value for key in PLACES if (value := getattr(data, key))}


def record_of(values: object, root: Path) -> Record:
    """Parse a row with the release's keys `input_images` (0 to 6), `instruction`, `output_image`. Raises BadRow.

    `mask` is optional beside them: a picture of the target's size, white where it trains.
    """
    if not isinstance(values, dict):
        raise BadRow(f"expected an object with input_images, instruction and output_image, got {type(values).__name__}")
    references = values.get("input_images")
    if not isinstance(references, (list, tuple)):
        raise BadRow("no input_images: expected a list of 0 to 6 pictures")
    if values.get("output_image") is None:
        raise BadRow("no output_image")
    target = picture_of(values["output_image"], root)
    mask = None if values.get("mask") is None else picture_of(values["mask"], root)
    return Record(target, tuple(picture_of(r, root) for r in references), values.get("instruction", ""), mask)


def picture_of(value: object, root: Path) -> Picture:
    """Resolve a path below `root`, bytes, or a stored Image feature ({"bytes", "path"}). Raises BadRow.

    Paths are untrusted: one that leaves `root` is refused. Symbolic links are followed.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadRow(f"expected the path of a picture, got {type(value).__name__}")
    top = os.path.abspath(root)
    path = os.path.abspath(os.path.join(top, value))
    if "\\" in value and not os.path.lexists(path):  # written on Windows
        path = os.path.abspath(os.path.join(top, value.replace("\\", "/")))
    if "\0" in value or os.path.commonpath([top, path]) != top:
        raise BadRow(f"the path {value!r} leaves the folder of the pictures")
    return Path(path)
