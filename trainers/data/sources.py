"""Data sources: the composition set, JSONL, a folder of captioned pictures, a saved Hugging Face data set.

A source is a sequence of rows. `check(i)` digests row i without decoding its pictures; `source[i]` decodes it. Both
raise BadRow. `name(i)` identifies row i to the user: a line number, a file name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config.run import ConfigError, DataConfig
from ..nano.catalogue import Split
from ..nano.emoji import Bank
from ..nano.render import render
from ..nano.scenes import make_scene
from .rows import BadRow, Picture, Record, Row, check_pictures, make_row, read_record


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
    kinds = {"jsonl": JsonLines, "folder": Folder, "datasets": SavedDataset}
    return kinds[data.kind](data)


class Compositions:
    """Rows of the composition set, each a pure function of (seed, index)."""

    def __init__(
        self,
        data: DataConfig,
        start: int,
        stop: int,
        split: Split = "train",
        seed: int | None = None,
        bank: Bank | None = None,
    ) -> None:
        self.data, self.start, self.stop, self.split = data, start, stop, split
        self.seed = data.seed if seed is None else seed
        self.bank = bank or Bank.open()

    @property
    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "assets": len(self.bank.by_key)}

    @property
    def note(self) -> str:
        return self.bank.note

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> Row:
        scene = make_scene(self.bank, self.split, self.seed, self.start + i, size=self.data.size)
        sample = render(self.bank, scene)
        return make_row(sample.target, list(sample.references), sample.instruction, self.data.reference_budget)

    def check(self, i: int) -> str:
        return ""  # set.json identifies these rows completely

    def name(self, i: int) -> str:
        return f"{self.split} scene {self.start + i}"


class PictureRows:
    """Base of sources whose pictures are files or bytes; a subclass sets `count` and implements `read(i)`."""

    count: int

    def __init__(self, data: DataConfig) -> None:
        assert data.path is not None  # checked by DataConfig
        self.data, self.path = data, Path(data.path)
        self.root = Path(data.images) if data.images else self.path if self.path.is_dir() else self.path.parent
        if not self.path.exists():
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
        return {"kind": self.data.kind, "rows": len(self), "path": self.data.path, "samples": self.data.samples}

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


def record_of(values: object, root: Path) -> Record:
    """Parse a row with the release's keys `input_images` (0 to 6), `instruction`, `output_image`. Raises BadRow."""
    if not isinstance(values, dict):
        raise BadRow(f"expected an object with input_images, instruction and output_image, got {type(values).__name__}")
    references = values.get("input_images")
    if not isinstance(references, (list, tuple)):
        raise BadRow("no input_images: expected a list of 0 to 6 pictures")
    if values.get("output_image") is None:
        raise BadRow("no output_image")
    target = picture_of(values["output_image"], root)
    return Record(target, tuple(picture_of(r, root) for r in references), values.get("instruction", ""))


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
    if "\0" in value or os.path.commonpath([top, path]) != top:
        raise BadRow(f"the path {value!r} leaves the folder of the pictures")
    return Path(path)


class JsonLines(PictureRows):
    """The release's rows: one JSON object per line, empty lines ignored. Only line offsets are in memory."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        if not self.path.is_file():
            raise ConfigError(f"data.path: expected a JSONL file for data.kind jsonl, got the folder {self.path}")
        self.lines, self.starts = self._index()
        self.count = len(self.lines)

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Number (from 1) and byte offset of every non-empty line."""
        index, at = [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    index.append((number, at))
                at += len(line)
        table = np.array(index, dtype=np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def name(self, i: int) -> str:
        return f"line {self.lines[i]}"

    def read(self, i: int) -> Record:
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            line = file.readline()
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"the line is not valid JSON ({error})") from None
        return record_of(values, self.root)


class Folder(PictureRows):
    """Captioned pictures in one folder, as LoRA trainers use them (subfolders are not read):

        0001.png                 the target, in any supported format
        0001.txt                 its instruction (UTF-8)
        0001_1.png, 0001_2.png   its references, in numerical order; without any the row is text to image

    Numbers may start at 0, have leading zeros, and follow a hyphen. NAME_N is a reference only if a picture or caption
    NAME exists: a folder of shot_1.png + shot_1.txt, shot_2.png + shot_2.txt holds two targets. If NAME exists and
    NAME_N has a caption, NAME_N could be a reference or a target, and NAME is skipped with that reason.
    """

    ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        if not self.path.is_dir():
            raise ConfigError(f"data.path: expected a folder for data.kind folder, got the file {self.path}")
        self.root = self.path
        self.captions: dict[str, Path] = {}
        self.pictures: dict[str, list[Path]] = {}
        for path in sorted(self.path.iterdir()):
            if path.suffix.lower() == ".txt":
                self.captions[path.stem] = path
            elif path.suffix.lower() in self.ENDINGS:
                self.pictures.setdefault(path.stem, []).append(path)
        self.references = self._references()
        reference_names = {name for names in self.references.values() for _, name in names}
        self.targets = sorted((self.captions.keys() | self.pictures.keys()) - reference_names, key=natural)
        self.count = len(self.targets)

    def _references(self) -> dict[str, list[tuple[int, str]]]:
        """Map each target to its references as (number, name), in order."""
        references: dict[str, list[tuple[int, str]]] = {}
        for name in self.pictures:
            parts = re.fullmatch(r"(.+)[_-]([0-9]{1,4})", name)
            if parts and (parts[1] in self.pictures or parts[1] in self.captions):
                references.setdefault(parts[1], []).append((int(parts[2]), name))
        return {target: sorted(names) for target, names in references.items()}

    def _check(self, numbered: Sequence[tuple[int, str]]) -> None:
        """Raise BadRow for references whose order or use is ambiguous."""
        numbers = [number for number, _ in numbered]
        for _, name in numbered:
            if name in self.captions:
                raise BadRow(f"{name} has a caption, so it may be a reference or a target; remove {name}.txt or rename")
        start = min(numbers, default=1)
        if start > 1 or numbers != list(range(start, start + len(numbers))):
            missing = sorted(set(range(min(start, 1), max(numbers) + 1)) - set(numbers))
            why = f"number {missing[0]} is missing" if missing else "a number occurs twice"
            raise BadRow(f"expected references numbered without gaps, got {numbers}: {why}")

    def name(self, i: int) -> str:
        return self.targets[i]

    def read(self, i: int) -> Record:
        name = self.targets[i]
        numbered = self.references.get(name, [])
        self._check(numbered)
        if name not in self.captions:
            raise BadRow(f"no instruction: {name}.txt does not exist")
        try:
            prompt = self.captions[name].read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise BadRow(f"{name}.txt cannot be read ({error})") from None
        references = tuple(self._only_picture(reference) for _, reference in numbered)
        return Record(self._only_picture(name), references, prompt)

    def _only_picture(self, name: str) -> Path:
        paths = self.pictures.get(name, [])
        if len(paths) != 1:
            raise BadRow(f"expected one picture named {name}, got {len(paths)}")
        return paths[0]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Natural sorting key: 2 before 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", name)]


class SavedDataset(PictureRows):
    """Hugging Face data set from `save_to_disk` with the columns input_images, instruction and output_image.

    Pictures are Image features, bytes, or paths below data.images. In a data set with splits, `train` is used.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        try:
            from datasets import load_from_disk
        except ImportError:
            raise ConfigError("data.kind datasets needs the package datasets; run pip install datasets") from None
        try:
            loaded: Any = load_from_disk(str(self.path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path} is not a saved data set: {' '.join(str(error).split())[:200]}") from None
        if isinstance(loaded, dict):
            if "train" not in loaded:
                raise ConfigError(
                    f"{self.path} has the splits {', '.join(loaded)} and no train; set data.path to the folder of one"
                )
            loaded = loaded["train"]
        missing_columns = {"input_images", "instruction", "output_image"} - set(loaded.column_names)
        if missing_columns:
            raise ConfigError(
                f"{self.path} has no column {', '.join(sorted(missing_columns))}; its columns are {loaded.column_names}"
            )
        self.table = loaded.with_format("arrow")  # pictures as they are stored, not decoded
        self.count = len(loaded)

    def read(self, i: int) -> Record:
        (values,) = self.table[i].to_pylist()
        return record_of(values, self.root)
