"""Small caches by content, so that a second seed encodes nothing again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from PIL import Image
from torch import nn

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


def image_key(image: Image.Image) -> str:
    """Digest of a picture's mode, size and pixels."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def weights_key(module: nn.Module) -> tuple[int, int]:
    """Changes with the module and when its weights are changed in place (an optimizer step, load_state_dict)."""
    versions = (0 if p.is_inference() else p._version for p in module.parameters())
    return id(module), sum(versions)
