"""Fingerprints of models on disk, by which ComfyUI notices that a file was replaced under the same name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_DEPTH, _MOST = 2, 10_000
_BESIDE = ("config.json", "recipe.json")
"""Files that are read beside a single weight file."""

FileState = tuple[str, int, int, int]


def file_states(path: Path) -> list[FileState]:
    """Name, size, time of change and number on the disk of each file that loading `path` may read.

    path: a weight file, or a model folder with its parts. Links are followed, as loading follows them.
    """
    files = _below(path, _DEPTH) if path.is_dir() else iter([path, *(path.with_name(name) for name in _BESIDE)])
    states = (_state(file) for _, file in zip(range(_MOST), files, strict=False))
    return sorted(state for state in states if state is not None)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # absent or not readable: loading raises the error
        return
    for entry in entries:
        if entry.is_dir():
            yield from _below(Path(entry.path), depth - 1) if depth > 1 else ()
        else:
            yield Path(entry.path)


def _state(file: Path) -> FileState | None:
    try:
        state = file.stat()
    except OSError:
        return None
    return str(file), state.st_size, state.st_mtime_ns, state.st_ino
