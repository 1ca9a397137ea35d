"""Write safetensors files with one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..replacing import replacing, write_errors
from .formats.safetensors_file import safetensors_header

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)."""

TensorLayout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of each tensor of a file to be written."""


def write_safetensors(
    path: Path,
    tensors: TensorLayout,
    data: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Write a safetensors file from a stream of tensors.

    The safetensors library needs all tensors in memory, 41 GB for this network; this function needs one. tensors: the
    layout of the file. data: (name, tensor) pairs in any order. overwrite: as for `replacing`. Raises CheckpointError
    when the disk is full or the folder cannot be written; on any failure, Ctrl-C included, the partial file is removed
    and an older one at `path` stays.
    """
    size = file_size(tensors, metadata)
    with write_errors(path, size), replacing(path, size, overwrite=overwrite) as partial:
        write_tensors(partial, tensors, data, metadata, progress)


def file_size(tensors: TensorLayout, metadata: Mapping[str, str]) -> int:
    """Compute the size in bytes of a safetensors file of these tensors."""
    return safetensors_header(tensors, metadata)[2]


def write_tensors(
    path: Path,
    tensors: TensorLayout,
    data: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write like `write_safetensors`, but straight to `path`: for files in a folder that is replaced as a whole."""
    header, starts, size = safetensors_header(tensors, metadata)
    done = len(header)
    with open(path, "wb") as f:
        f.write(header)
        unwritten = dict(starts)
        for name, tensor in data:
            if (tensor.dtype, tuple(tensor.shape)) != tensors[name]:
                raise AssertionError(f"{name}: expected {tensors[name]}, got {tensor.dtype} {tuple(tensor.shape)}")
            f.seek(unwritten.pop(name))
            f.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            done += tensor.nbytes
            if progress:
                progress(done, size)
        if unwritten:
            raise AssertionError(f"expected {len(unwritten)} more tensors, first {next(iter(unwritten))}")
