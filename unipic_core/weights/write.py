"""Writing weights tensor by tensor, beside their place, and renaming them when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_file import safetensors_header

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)."""

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names, types and shapes of the tensors of a file that is to be written."""


def require_new(dst: Path, overwrite: bool) -> None:
    """CheckpointError if there is something at `dst` that may not be replaced."""
    if dst.exists() and not overwrite:
        raise CheckpointError(f"{dst} is there already; choose another name, or overwrite it with overwrite=True")


def write_safetensors(
    path: Path,
    tensors: Described,
    data: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write the announced tensors, given in any order and one at a time, so that one is in memory.

    Raises CheckpointError in one sentence when the disk is full or the folder cannot be written; whatever happens,
    Ctrl-C included, the half-written file is removed and an older file at `path` stays.
    """
    with written_aside(path, file_size(tensors, metadata)) as partial:
        write_tensors(partial, tensors, data, metadata, progress)


def file_size(tensors: Described, metadata: Mapping[str, str]) -> int:
    """Bytes of the safetensors file that will hold these tensors."""
    return safetensors_header(tensors, metadata)[2]


def write_tensors(
    path: Path,
    tensors: Described,
    data: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """As `write_safetensors`, straight to `path`: for files inside a folder that is itself written aside."""
    header, starts, size = safetensors_header(tensors, metadata)
    done = len(header)
    with open(path, "wb") as f:
        f.write(header)
        waiting = dict(starts)
        for name, tensor in data:
            if (tensor.dtype, tuple(tensor.shape)) != tensors[name]:
                raise AssertionError(
                    f"{name} was announced as {tensors[name]}, came {tensor.dtype} {tuple(tensor.shape)}"
                )
            f.seek(waiting.pop(name))
            f.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            done += tensor.nbytes
            if progress:
                progress(done, size)
        if waiting:
            raise AssertionError(f"{len(waiting)} announced tensors never came, first {next(iter(waiting))}")
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def written_aside(path: Path, size: int, *, folder: bool = False) -> Iterator[Path]:
    """A temporary file or folder beside `path`, renamed to it at the end, removed on any failure.

    size: bytes that are going to be written, checked against the free space. An older file or folder at `path` is
    replaced at the end and stays on any failure. OSErrors inside become CheckpointErrors of one sentence.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    older = path.with_name(f"{path.name}.replaced-{os.getpid()}")
    try:
        if not path.parent.is_dir():
            raise CheckpointError(f"there is no folder {path.parent}; make it first")
        if path.is_dir() and not folder:
            raise CheckpointError(f"{path} is a folder; name a file in it")
        if path.is_file() and folder:
            raise CheckpointError(f"{path} is a file; name a folder, or a file that ends in .safetensors")
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise CheckpointError(_full(path, size, free))
        if folder:
            partial.mkdir()
        yield partial
        _put_in_place(partial, path, older)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(_full(path, size, shutil.disk_usage(path.parent).free)) from error
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if path.exists():  # an interrupt between the two renames leaves the older one as the only copy
            _remove(older)
        _remove(partial)


def _put_in_place(partial: Path, path: Path, older: Path) -> None:
    """Rename; a folder cannot be renamed over another, so the older one steps aside first."""
    if not path.is_dir():
        os.replace(partial, path)
        return
    try:
        os.replace(path, older)
        os.replace(partial, path)
    except BaseException:
        if older.exists() and not path.exists():
            os.replace(older, path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _full(path: Path, size: int, free: int) -> str:
    return (
        f"not enough room for {path}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
        "free some space or choose another disk"
    )
