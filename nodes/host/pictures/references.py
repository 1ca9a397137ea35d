"""The pictures of Multi-Image Compose: which of its sockets' are used, in which order, and what to say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ....unipic_core.conditioning.reference_sizes import MAX_REFERENCES
from ....unipic_core.errors import UniPicError
from .images import to_pictures

IMAGES = tuple(f"image_{i + 1}" for i in range(MAX_REFERENCES))
MASKS = tuple(f"mask_{i + 1}" for i in range(MAX_REFERENCES))

FIRST, ALL = "first", "all"
BATCHES = (FIRST, ALL)
"""What counts of a batch at one socket: its first picture, or each as a reference of its own."""


@dataclass(frozen=True)
class Socket:
    """A connected socket: its number from 1, its pictures that are used, and how many it was given."""

    number: int
    pictures: Sequence[Image.Image]
    given: int


def connected(images: Mapping[str, Tensor], masks: Mapping[str, Tensor], batches: str = FIRST) -> list[Socket]:
    """The connected sockets in their order. UniPicError for a mask without a picture, and for too many pictures."""
    alone = [m for i, m in zip(IMAGES, MASKS, strict=True) if masks.get(m) is not None and images.get(i) is None]
    if alone:
        raise UniPicError(f"{alone[0]} has no picture; connect {alone[0].replace('mask', 'image')} or remove the mask")
    sockets = []
    for number, (image, mask) in enumerate(zip(IMAGES, MASKS, strict=True), start=1):
        if images.get(image) is not None:
            batch, cut = images[image], masks.get(mask)
            given = len(batch) if batch.ndim == 4 else 1
            if batches == FIRST and given > 1:
                batch, cut = batch[:1], cut[:1] if cut is not None and cut.ndim > 2 else cut
            sockets.append(Socket(number, to_pictures(batch, cut), given))
    _check_count(sockets)
    return sockets


def _check_count(sockets: Sequence[Socket]) -> None:
    total = sum(len(socket.pictures) for socket in sockets)
    if total > MAX_REFERENCES:
        largest = max(sockets, key=lambda socket: len(socket.pictures))
        held = f"image_{largest.number} alone holds {len(largest.pictures)}"
        raise UniPicError(
            f"at most {MAX_REFERENCES} pictures can be composed, got {total}, of which {held}; leave some out, or set "
            f"batches to {FIRST}"
        )


def cautions(sockets: Sequence[Socket]) -> Iterator[str]:
    """Which pictures of a batch are left out, and where the prompt's numbers are not those of the sockets."""
    connected = {socket.number for socket in sockets}
    empty = [f"image_{i}" for i in range(1, max(connected, default=1)) if i not in connected]
    if empty:
        verb = "is" if len(empty) == 1 else "are"
        yield f"{', '.join(empty)} {verb} empty, muted or bypassed, so later pictures move up"
    number = 0
    for socket in sockets:
        first, number = number + 1, number + len(socket.pictures)
        if (first, number) != (socket.number, socket.number):
            numbers = f"image {first}" if first == number else f"image {first} to image {number}"
            yield f"image_{socket.number} is {numbers} in the prompt"
        if socket.given > len(socket.pictures):
            yield f"image_{socket.number} holds {socket.given} pictures, the first is used (batches: {ALL} uses each)"
