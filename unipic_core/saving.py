"""Writing a safetensors file tensor by tensor, beside its place, and renaming it when it is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .tensor_files import safetensors_header

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)."""


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    data: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write the announced tensors, given in any order and one at a time, so that one is in memory.

    Raises CheckpointError in one sentence when the disk is full or the folder cannot be written; whatever happens,
    Ctrl-C included, the half-written file is removed and an older file at `path` stays.
    """
    header, starts, size = safetensors_header(tensors, metadata)
    done = len(header)
    with _written_aside(path, size) as partial, open(partial, "wb") as f:
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
def _written_aside(path: Path, size: int) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end, removed on any failure."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        if not path.parent.is_dir():
            raise CheckpointError(f"there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; name a file in it")
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise CheckpointError(_full(path, size, free))
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(_full(path, size, shutil.disk_usage(path.parent).free)) from error
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _full(path: Path, size: int, free: int) -> str:
    return (
        f"not enough room for {path}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
        "free some space or choose another disk"
    )
