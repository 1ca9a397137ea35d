"""The pictures of Multi-Image Compose: which of its sockets' are used, in which order, and the remarks on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ....unipic_core.conditioning.reference_sizes import MAX_REFERENCES
from ....unipic_core.errors import UniPicError
from .images import to_pictures

IMAGES = tuple(f"image_{i + 1}" for i in range(MAX_REFERENCES))
MASKS = tuple(f"mask_{i + 1}" for i in range(MAX_REFERENCES))
REFERENCES = tuple(f"reference_{i + 1}" for i in range(MAX_REFERENCES))

FIRST, ALL = "first", "all"
BATCHES = (FIRST, ALL)
"""What counts of a batch at one socket: its first picture, or each as a reference of its own."""

ReferenceSocket = io.Custom("UNIPIC_REFERENCE")
"""The wire from Reference (UniPic): one `Reference`."""


@dataclass(frozen=True)
class Reference:
    """A picture with everything that belongs to it, so that none of it can come apart.

    image: ComfyUI's IMAGE; mask: the MASK of what to leave out; weight: multiplies its share of the reference budget;
    enabled: False = it is left out, and the prompt's numbers close up.
    """

    image: Tensor
    mask: Tensor | None = None
    weight: float = 1.0
    enabled: bool = True


@dataclass(frozen=True)
class Socket:
    """A connected socket: its kind and number, its pictures that are used, and how many it was given.

    weight: of each of its pictures; enabled: False = it has no pictures, since its node is switched off.
    """

    kind: str
    number: int
    pictures: Sequence[Image.Image]
    given: int
    weight: float = 1.0
    enabled: bool = True

    @property
    def name(self) -> str:
        """As the node shows it."""
        return f"{self.kind}_{self.number}"


def connected(
    images: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    references: Mapping[str, object],
    batches: str = FIRST,
) -> list[Socket]:
    """The connected sockets: pictures with their masks in order, then references in order.

    UniPicError for a mask without a picture, something else at a reference's socket, and too many pictures.
    """
    alone = [m for i, m in zip(IMAGES, MASKS, strict=True) if masks.get(m) is not None and images.get(i) is None]
    if alone:
        raise UniPicError(f"{alone[0]} has no picture; connect {alone[0].replace('mask', 'image')} or remove the mask")
    if batches not in BATCHES:
        raise UniPicError(f"batches is one of {', '.join(BATCHES)}, got {batches!r}")
    sockets = []
    for number, (image, mask) in enumerate(zip(IMAGES, MASKS, strict=True), start=1):
        if images.get(image) is not None:
            sockets.append(_socket("image", number, Reference(images[image], masks.get(mask)), batches))
    for number, name in enumerate(REFERENCES, start=1):
        if references.get(name) is not None:
            sockets.append(_socket("reference", number, _checked(name, references[name]), batches))
    _check_count(sockets)
    return sockets


def _checked(name: str, given: object) -> Reference:
    if not isinstance(given, Reference):
        raise UniPicError(f"{name} takes the wire of Reference (UniPic), got {type(given).__name__}; connect that node")
    return given


def _socket(kind: str, number: int, reference: Reference, batches: str) -> Socket:
    batch, mask = reference.image, reference.mask
    for what, tensor in ((f"{kind}_{number}", batch), (f"the mask of {kind}_{number}", mask)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise UniPicError(f"{what} takes a picture's tensor, got {type(tensor).__name__}; connect Load Image")
    given = len(batch) if batch.ndim == 4 else 1
    if not reference.enabled:
        return Socket(kind, number, (), given, enabled=False)
    if batches == FIRST and given > 1:
        batch, mask = batch[:1], mask[:1] if mask is not None and mask.ndim > 2 else mask
    return Socket(kind, number, to_pictures(batch, mask), given, reference.weight)


def _check_count(sockets: Sequence[Socket]) -> None:
    total = sum(len(socket.pictures) for socket in sockets)
    if total > MAX_REFERENCES:
        largest = max(sockets, key=lambda socket: len(socket.pictures))
        held = f"{largest.name} alone holds {len(largest.pictures)}"
        raise UniPicError(
            f"at most {MAX_REFERENCES} pictures can be composed, got {total}, of which {held}; leave some out, or set "
            f"batches to {FIRST}"
        )


def reference_weights(sockets: Sequence[Socket]) -> list[float]:
    """The weight of each picture, in their order."""
    return [socket.weight for socket in sockets for _ in socket.pictures]


def cautions(sockets: Sequence[Socket]) -> Iterator[str]:
    """Which pictures are left out, and where the prompt's numbers are not those of the sockets."""
    for kind in ("image", "reference"):
        yield from _gaps(kind, {socket.number: socket.enabled for socket in sockets if socket.kind == kind})
    number = 0
    for socket in sockets:
        if not socket.enabled:
            continue
        first, number = number + 1, number + len(socket.pictures)
        if (first, number) != (socket.number, socket.number):
            numbers = f"image {first}" if first == number else f"image {first} to image {number}"
            yield f"{socket.name} is {numbers} in the prompt"
        if socket.given > len(socket.pictures):
            yield f"{socket.name} holds {socket.given} pictures, the first is used (batches: {ALL} uses each)"


def _gaps(kind: str, enabled: Mapping[int, bool]) -> Iterator[str]:
    """Sockets of a kind before its last one that give no picture. enabled: by the numbers of the connected ones."""
    before = range(1, max(enabled, default=1))
    empty = [f"{kind}_{i}" for i in before if i not in enabled]
    off = [f"{kind}_{i}" for i, on in enabled.items() if not on]
    moves = ", so later pictures move up"
    if empty:
        verb = "is" if len(empty) == 1 else "are"
        yield f"{', '.join(empty)} {verb} empty, muted or bypassed{moves}"
    if off:
        verb = "is" if len(off) == 1 else "are"
        later = any(on and i > int(off[0].rpartition("_")[2]) for i, on in enabled.items())
        yield f"{', '.join(off)} {verb} switched off{moves if later else ''}"
