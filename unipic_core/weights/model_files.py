"""Files of a model folder: those that a merge may copy from a source and those that it may replace at its output."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import CheckpointError
from .files import trusted_folders

MANIFEST = "unipic_files.json"
"""Name of the list of files that a merge wrote into its folder: their sizes, and digests of the small ones."""

_DIGESTED = 1 << 20
"""Size in bytes up to which a file's content is compared; of larger files, weights, only the size is."""

_MOST_FILES = 10_000


def files_to_copy(folder: Path, files: Sequence[str], folders: Sequence[str]) -> dict[str, Path]:
    """Collect the named files of a folder and all files in its named subfolders: relative path -> file.

    Empty if `folder` does not exist. Raises CheckpointError for links that lead out of it (except to the blobs of the
    download cache it is in), for circular links, and for devices and pipes.
    """
    if not folder.is_dir():
        return {}
    trusted = trusted_folders(folder)
    copies: dict[str, Path] = {}
    names = [name for name in (*files, *folders) if os.path.lexists(folder / name)]
    for name in names:
        for path in _walk(folder / name, trusted, (folder.resolve(),)):
            copies[str(path.relative_to(folder))] = path
            if len(copies) > _MOST_FILES:
                raise CheckpointError(
                    f"{folder} holds more than {_MOST_FILES} files beside its weights, which are not copied; remove "
                    "those that do not belong to the model"
                )
    return copies


def _walk(path: Path, trusted: Sequence[Path], above: tuple[Path, ...]) -> Iterator[Path]:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link that leads nowhere; remove it or put the file there") from error
    if not any(real.is_relative_to(place) for place in trusted):
        raise CheckpointError(f"{path} is a link to {real}, outside the model folder; put the file itself there")
    if real.is_dir():
        if real in above:
            raise CheckpointError(f"{path} is a link to a folder that it lies in; remove it")
        for name in sorted(os.listdir(path)):
            yield from _walk(path / name, trusted, (*above, real))
    elif real.is_file():
        yield path
    else:
        raise CheckpointError(f"{path} is a device or a pipe, not a file; remove it")


def write_manifest(folder: Path) -> None:
    """Write MANIFEST, the list of all files in a folder, into it."""
    files = {p.relative_to(folder).as_posix(): _fingerprint(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def foreign_file(folder: Path) -> str | None:
    """Return the first entry of a folder, at any depth, that its MANIFEST does not list or that changed; else None."""
    try:
        about = (folder / MANIFEST).lstat()
        listed = json.loads((folder / MANIFEST).read_bytes()) if about.st_size <= _DIGESTED << 3 else {}
    except (OSError, ValueError, RecursionError):
        listed = {}
    listed = listed if isinstance(listed, dict) else {}
    for place, folders, names in os.walk(folder):
        for name in sorted((*folders, *names)):
            path = Path(place) / name
            relative = path.relative_to(folder).as_posix()
            kind = path.lstat().st_mode
            if stat.S_ISDIR(kind):
                if any(path.iterdir()) or any(str(file).startswith(relative + "/") for file in listed):
                    continue
                return relative
            if relative == MANIFEST and stat.S_ISREG(kind) and listed:
                continue
            if not stat.S_ISREG(kind) or listed.get(relative) != _fingerprint(path):
                return relative
    return None


def _fingerprint(file: Path) -> list[int | str]:
    """Return the size of a file, followed by its digest if it is small."""
    size = file.stat().st_size
    return [size, hashlib.sha256(file.read_bytes()).hexdigest()] if size <= _DIGESTED else [size]
