"""Small caches by content, so that a second step or seed computes nothing again."""

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
    """At most `size` values; the one not used for longest goes first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of `key`, made if it is not there."""
        if key not in self._values:
            value = make()
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
    """At most `size` values by a key and the contents of tensors; the one not used for longest goes first.

    Tensors are compared value by value where they are, which costs next to nothing beside what a network does to them,
    and copied, so that what is written into them later does no harm.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: list[_Entry[V]] = []

    def get(self, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], V]) -> V:
        """The value of `key` and `tensors`, made if it is not there."""
        entry = next((e for e in self._entries if e.key == key and _same(e.tensors, tensors)), None)
        if entry is None:
            del self._entries[: max(len(self._entries) + 1 - self.size, 0)]  # first, so that its memory is free
            entry = _Entry(key, tuple(t.detach().clone() for t in tensors), make())
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


def _same(kept: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    def equal(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

    return len(kept) == len(given) and all(equal(a, b) for a, b in zip(kept, given, strict=True))


def image_key(image: Image.Image) -> str:
    """Digest of a picture's mode, size and pixels."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


class PictureCache(LRU[V]):
    """Encodings of pictures, by the pictures' contents and by a key of the encoder's state."""

    def encode(
        self,
        pictures: Sequence[Image.Image],
        encoder: Hashable,
        encode: Callable[[list[Image.Image]], Sequence[V]],
        together: bool = True,
    ) -> list[V]:
        """One encoding per picture; new ones are made, those of one size in one call, or each in its own.

        encoder: equal keys mean that the encoder would give the same values. encode: pictures -> their encodings.
        """
        keys = [(encoder, image_key(picture)) for picture in pictures]
        missing = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self}
        batches: dict[Hashable, list[tuple[Hashable, str]]] = {}
        for key, picture in missing.items():
            batches.setdefault(picture.size if together else key, []).append(key)
        new: dict[tuple[Hashable, str], V] = {}
        for batch in batches.values():
            new |= zip(batch, encode([missing[key] for key in batch]), strict=True)
        known_first = sorted(keys, key=new.__contains__)  # no new one may push out one that is asked for
        values = {key: self.get(key, partial(new.__getitem__, key)) for key in known_first}
        return [values[key] for key in keys]


class WeightsKey:
    """Equal keys mean the same parameters with the same values; costs no pass over the values.

    Noticed: other parameters (even at the same address), another type, and writing in place (an optimizer step,
    load_state_dict, a merged LoRA). Not noticed: writing through `.data` or to inference tensors; moving to another
    device, rightly. Addresses of the values are left out, because moving changes them.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        self._references = [weakref.ref(p) for p in parameters]  # an id may be given again when its owner is gone
        self._state = tuple((id(p), 0 if p.is_inference() else p._version, p.dtype) for p in parameters)

    def __hash__(self) -> int:
        return hash(self._state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightsKey) or self._state != other._state:
            return False
        pairs = zip(self._references, other._references, strict=True)
        return all((mine := a()) is not None and mine is b() for a, b in pairs)
