"""Write safetensors tensor by tensor, with one of them in memory."""

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
"""Name -> type and shape of each tensor of a file that is to be written."""


def write_safetensors(
    path: Path,
    tensors: TensorLayout,
    data: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write the tensors of `tensors`, which `data` gives in any order and one at a time.

    The safetensors library writes from a table of all tensors, 41 GB for this network; here one is in memory. Raises
    CheckpointError in one sentence when the disk is full or the folder cannot be written; whatever happens, Ctrl-C
    included, the half-written file is removed and an older file at `path` stays.
    """
    size = file_size(tensors, metadata)
    with write_errors(path, size), replacing(path, size) as partial:
        write_tensors(partial, tensors, data, metadata, progress)


def file_size(tensors: TensorLayout, metadata: Mapping[str, str]) -> int:
    """Bytes of the safetensors file that will hold these tensors."""
    return safetensors_header(tensors, metadata)[2]


def write_tensors(
    path: Path,
    tensors: TensorLayout,
    data: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write as `write_safetensors`, but straight to `path`: for files inside a folder that is itself `replacing`."""
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
