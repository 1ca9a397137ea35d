"""The pictures that a command writes: their names, and that none of them replaces what the user did not name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import UniPicError


def output_paths(out: Path, seed: int, count: int) -> list[Path]:
    """Where each picture goes: `out` itself, or OUT-SEED with its ending where there are several."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{seed + i}") for i in range(count)]


def check_outputs(paths: Iterable[Path], inputs: Iterable[Path], overwrite: bool) -> None:
    """UniPicError if one of the paths is an input, a link, a device, or a file that may not be replaced.

    inputs: files that the command reads; they are never written over, under whatever name.
    """
    inputs = list(inputs)
    for path in paths:
        check_output(path, inputs, overwrite)


def check_output(path: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """UniPicError, as `check_outputs`, for one path."""
    try:
        path.lstat()
        if path.is_symlink():
            raise UniPicError(f"{path} is a link to {os.readlink(path)}; name the file itself, or remove the link")
        if path.is_dir():
            raise UniPicError(f"{path} is a folder; name a file in it")
        if not path.is_file():
            raise UniPicError(f"{path} is a device or a pipe, expected a file; choose another name")
        used = next((i for i in inputs if i.exists() and os.path.samefile(i, path)), None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UniPicError(f"{path} cannot be written: {error.strerror or error}") from error
    if used is not None:
        raise UniPicError(f"{path} is read by this command and would be lost; choose another name for the output")
    if not overwrite:
        raise UniPicError(f"{path} already exists; choose another name, or replace it with --overwrite")


def free_path(path: Path) -> Path:
    """The path, or the first of NAME-2, NAME-3, ... that is free: for a picture that took minutes to make."""
    number, free = 2, path
    while os.path.lexists(free):
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
