"""Place of a stored tensor in its file, and reading it from there."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor: dtype, shape, and the place of its bytes.

    offset: first byte of the tensor's storage in `file`. first: index of its first element in that storage; stride: in
    elements, None = contiguous.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int = 0
    first: int = 0
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Number of elements from the first to the last that the tensor touches in its storage."""
        if not prod(self.shape):
            return 0
        if self.stride is None:
            return prod(self.shape)
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def read(self) -> Tensor:
        """Read the tensor to newly allocated memory. Raises CheckpointError if the file has become shorter."""
        size = self.extent * self.dtype.itemsize
        buffer = torch.empty(size, dtype=torch.uint8)
        try:
            with open(self.file, "rb") as f:
                f.seek(self.offset + self.first * self.dtype.itemsize)
                count = f.readinto(buffer.numpy().data)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror or error}") from error
        if count != size:
            raise CheckpointError(
                f"{self.file} ends {size - count} bytes too early: it changed or is damaged; fetch it again"
            )
        return self._shaped(buffer.view(self.dtype))

    def mapped(self, area: mmap.mmap) -> Tensor:
        """Return the tensor as a view of its mapped file: no memory until touched; writes do not reach the file."""
        start = self.offset + self.first * self.dtype.itemsize
        if not self.extent or start % self.dtype.itemsize:
            return self.read()
        return self._shaped(torch.frombuffer(area, dtype=self.dtype, count=self.extent, offset=start))

    def _shaped(self, flat: Tensor) -> Tensor:
        if self.stride is None or not self.extent:
            return flat.reshape(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()


Table = dict[str, TensorSpec]
