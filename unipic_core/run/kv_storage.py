"""Storage of cached keys and values: on the device or in main memory, as computed or in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UniPicError
from ..model.blocks import KeyValue
from .memory import FreeMemory, beside_activations, fits, gigabytes

CACHE_PLACES = AUTO, GPU, CPU, OFF = "auto", "gpu", "cpu", "off"
"""Place of cached keys and values: the device if they fit there, else main memory; the device that samples; main
memory; no cache."""

CACHE_DTYPES = COMPUTED, INT8 = "auto", "int8"
"""Numbers of the cache: as computed; or 8-bit integers with one float32 scale per token and head."""

INT8_ERROR = "60 dB PSNR on the bundled nano"
"""Error of a picture with int8 storage; that of the keys and values is 0.6% (tests/benchmarks/cache_storage.py)."""

_LARGEST = 127


class NoRoom(Exception):
    """The keys and values fit neither on the device nor, where that is allowed, in main memory."""


@dataclass(frozen=True)
class CacheStorage:
    """Place and dtype of cached keys and values. Raises UniPicError for unknown names."""

    place: str = AUTO
    dtype: str = COMPUTED

    def __post_init__(self) -> None:
        if self.place not in CACHE_PLACES:
            raise UniPicError(f"condition_cache must be one of {', '.join(CACHE_PLACES)}, got {self.place!r}")
        if self.dtype not in CACHE_DTYPES:
            raise UniPicError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.dtype!r}")

    @property
    def on_device(self) -> bool:
        """True if the cache may take memory of the device."""
        return self.place in (AUTO, GPU)

    def itemsize(self, dtype: torch.dtype, head_dim: int) -> float:
        """Bytes of one stored number that was computed in `dtype`, its part of a scale included."""
        return 1 + torch.float32.itemsize / head_dim if self.dtype == INT8 else dtype.itemsize

    def resolve(self, size: int, device: torch.device, free: FreeMemory) -> str:
        """Choose GPU, CPU or OFF for `size` bytes of a network on `device`; auto tries both memories."""
        main = torch.device("cpu")
        if self.on_device and fits(size, free(device)):
            return GPU
        if self.place == CPU or (self.place == AUTO and device != main):
            return CPU if fits(size, free(main)) else OFF
        return OFF

    def no_room(self, size: int, device: torch.device, free: FreeMemory) -> str:
        """Sentence for the log about keys and values that are not cached."""
        room = free(torch.device("cpu") if self.place == CPU else device)
        known = "" if room is None else f", {gigabytes(beside_activations(room))} are free beside the activations"
        return self.computed_again(f"need {gigabytes(size)}{known}")

    def computed_again(self, why: str) -> str:
        """Sentence about keys and values that are not cached. why: with its verb."""
        smaller = "" if self.dtype == INT8 else ", or cache_dtype int8"
        elsewhere = ", or condition_cache cpu" if self.place == GPU else ""
        return (
            f"the keys and values of the condition {why}: they are computed again in every step, which is slower; use "
            f"a smaller reference budget{elsewhere}{smaller}"
        )


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in storage, and the device and dtype to restore it to. scale: of int8 numbers, else None."""

    data: Tensor
    scale: Tensor | None
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, place: torch.device, int8: bool) -> StoredTensor:
        """Store x [..., D]; with int8 one scale per row of D numbers."""
        data, scale = quantised(x) if int8 else (x, None)
        return cls(_moved(data, place), None if scale is None else _moved(scale, place), x.device, x.dtype)

    def restored(self) -> Tensor:
        """Return the tensor on its device; the stored tensor itself if nothing was changed."""
        data = self.data.to(self.device, non_blocking=True)
        if self.scale is None:
            return data
        return (data * self.scale.to(self.device, non_blocking=True)).to(self.dtype)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x [..., D] to int8 with a float32 scale [..., 1]; rows with NaN or infinity restore to NaN."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / _LARGEST
    return (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale


def _moved(x: Tensor, place: torch.device) -> Tensor:
    """Move to the place; main memory beside a GPU is pinned, so that copies back run at the bus's full speed."""
    moved = x.to(place)
    return moved.pin_memory() if place.type == "cpu" and x.device.type == "cuda" else moved


class StoredKeyValues:
    """Keys and values of some tokens in every block; each block's are restored when they are read.

    So beside the storage one block's keys and values are in the device's memory.
    """

    def __init__(self, place: torch.device, int8: bool = False) -> None:
        self.place = place
        self.int8 = int8
        self._blocks: list[tuple[StoredTensor, StoredTensor]] = []

    def append(self, kv: KeyValue) -> None:
        """Store the next block's keys and values, each [B or 1, N, H, D]."""
        k, v = kv
        self._blocks.append((StoredTensor.of(k, self.place, self.int8), StoredTensor.of(v, self.place, self.int8)))

    def __getitem__(self, index: int) -> KeyValue:
        k, v = self._blocks[index]
        return k.restored(), v.restored()

    def __iter__(self) -> Iterator[KeyValue]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes in storage."""
        tensors = (stored for block in self._blocks for stored in block)
        return sum(t.data.nbytes + (0 if t.scale is None else t.scale.nbytes) for t in tensors)
