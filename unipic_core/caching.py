"""Small caches keyed by content, so that further steps and seeds reuse earlier results."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

V = TypeVar("V")


class LRU(Generic[V]):
    """Cache of at most `size` values; evicts the least recently used."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], V]) -> V:
        """Return the value of `key`; compute and store it if it is absent."""
        if key not in self._values:
            value = compute()
            self._values[key] = value
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        self._values.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, eq=False)
class _Entry(Generic[V]):
    key: Hashable
    tensors: tuple[Tensor, ...]
    value: V


class TensorCache(Generic[V]):
    """Cache of at most `size` values, keyed by a key and the contents of tensors; evicts the least recently used.

    Tensors are compared value by value on their device, which is cheap beside a network's pass over them, and copied,
    so that later writes into them do not change the key.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: list[_Entry[V]] = []

    def get(self, key: Hashable, tensors: Sequence[Tensor], compute: Callable[[], V]) -> V:
        """Return the value of `key` and `tensors`; compute and store it if it is absent."""
        entry = next((e for e in self._entries if e.key == key and _same(e.tensors, tensors)), None)
        if entry is None:
            del self._entries[: max(len(self._entries) + 1 - self.size, 0)]  # evict first, to free the memory
            entry = _Entry(key, tuple(t.detach().clone() for t in tensors), compute())
        else:
            self._entries.remove(entry)
        self._entries.append(entry)
        return entry.value

    def values(self) -> list[V]:
        return [entry.value for entry in self._entries]

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def _same(cached: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    def equal(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

    return len(cached) == len(tensors) and all(equal(a, b) for a, b in zip(cached, tensors, strict=True))


def image_key(image: Image.Image) -> str:
    """Hash a picture's mode, size and pixels."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


class PictureCache(LRU[V]):
    """Cache of pictures' encodings, keyed by the pictures' contents and the encoder's state."""

    def encode(
        self,
        pictures: Sequence[Image.Image],
        encoder: Hashable,
        encode: Callable[[list[Image.Image]], Sequence[V]],
        together: bool = True,
    ) -> list[V]:
        """Return one encoding per picture; encode those that are absent.

        encoder: key of the encoder's state; equal keys mean equal results. encode: pictures -> their encodings.
        together: encode pictures of one size in one call; False = each in a separate call.
        """
        keys = [(encoder, image_key(picture)) for picture in pictures]
        missing = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self}
        batches: dict[Hashable, list[tuple[Hashable, str]]] = {}
        for key, picture in missing.items():
            batches.setdefault(picture.size if together else key, []).append(key)
        new: dict[tuple[Hashable, str], V] = {}
        for batch in batches.values():
            new |= zip(batch, encode([missing[key] for key in batch]), strict=True)
        known_first = sorted(keys, key=new.__contains__)  # so that no new encoding evicts one that is requested
        values = {key: self.get(key, partial(new.__getitem__, key)) for key in known_first}
        return [values[key] for key in keys]


SAMPLED_VALUES = 1024
"""Number of values of each tensor that enter a sampled `WeightsKey`."""

_SPREAD = -7046029254386353131
"""2^64 divided by the golden ratio, as int64: makes factors whose sums do not cancel where signs change."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightsKey:
    """Key of a module's weights: equal keys mean the same parameters with the same values, without reading the values.

    The key changes with other parameters (even at the same address), another dtype, and writes in place (an optimizer
    step, load_state_dict, a merged LoRA). It does not change with a move to another device, which is why it leaves out
    addresses of the values. Writes through `.data` or to inference tensors leave no trace: sampled=True notices them by
    a checksum over SAMPLED_VALUES evenly spaced values of each parameter and buffer, in milliseconds.
    """

    def __init__(self, module: nn.Module, sampled: bool = False) -> None:
        parameters = list(module.parameters())
        self._references = [weakref.ref(p) for p in parameters]  # an id may be reused after its object is freed
        self._state = tuple((id(p), 0 if p.is_inference() else p._version, p.dtype) for p in parameters)
        self._checksums = checksums([*parameters, *module.buffers()]) if sampled else ()

    def __hash__(self) -> int:
        return hash((self._state, self._checksums))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightsKey) or (self._state, self._checksums) != (other._state, other._checksums):
            return False
        pairs = zip(self._references, other._references, strict=True)
        return all((mine := a()) is not None and mine is b() for a, b in pairs)


def checksums(tensors: Sequence[Tensor], samples: int = SAMPLED_VALUES) -> tuple[int, ...]:
    """Checksum of the bits of `samples` or more evenly spaced values of each tensor; it depends on their order, not on
    the device."""
    sums = [_checksum(t.detach(), samples) for t in tensors if t.itemsize in _INTEGERS and not t.is_meta]
    by_device = {
        device: iter(torch.stack([s for s in sums if s.device == device]).tolist())  # one wait per device
        for device in {s.device for s in sums}
    }
    return tuple(next(by_device[s.device]) for s in sums)


def _checksum(tensor: Tensor, samples: int) -> Tensor:
    values = tensor.flatten()[:: max(tensor.numel() // samples, 1)].contiguous()
    bits = values.view(_INTEGERS[values.itemsize]).long()
    spread = torch.arange(1, len(bits) + 1, device=bits.device) * _SPREAD
    return (bits * ((spread ^ (spread >> 29)) * _SPREAD | 1)).sum()  # modulo 2^64
