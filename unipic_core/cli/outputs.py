"""Output files of a command: their names, and checks that none of them replaces a file without permission."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import UniPicError


def output_paths(out: Path, seed: int, count: int) -> list[Path]:
    """Path of each output: `out` itself for one picture, OUT-SEED with the same ending for several."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{seed + i}") for i in range(count)]


def check_outputs(paths: Iterable[Path], inputs: Iterable[Path], overwrite: bool) -> None:
    """Raise UniPicError if a path is an input, a link, a device, or an existing file without `overwrite`.

    inputs: files that the command reads; they are never overwritten, whatever their name.
    """
    inputs = list(inputs)
    for path in paths:
        check_output(path, inputs, overwrite)


def check_output(path: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Check one path like `check_outputs`."""
    try:
        path.lstat()
        if path.is_symlink():
            raise UniPicError(f"{path} is a link to {os.readlink(path)}; name the file itself, or remove the link")
        if path.is_dir():
            raise UniPicError(f"{path} is a folder; name a file in it")
        if not path.is_file():
            raise UniPicError(f"expected a file, {path} is a device or a pipe; choose another name")
        used = next((i for i in inputs if i.exists() and os.path.samefile(i, path)), None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UniPicError(f"{path} cannot be written: {error.strerror or error}") from error
    if used is not None:
        raise UniPicError(f"{path} is an input of this command and would be lost; choose another name for the output")
    if not overwrite:
        raise UniPicError(f"{path} already exists; choose another name, or replace it with --overwrite")


def free_path(path: Path) -> Path:
    """Return the path, or the first free one of NAME-2, NAME-3, ..., so that a finished picture is never lost."""
    number, free = 2, path
    while os.path.lexists(free):
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
