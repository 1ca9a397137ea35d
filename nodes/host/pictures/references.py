"""The sockets of Multi-Image Compose: the pictures used, their order and their numbers in the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ....unipic_core.conditioning.boxes import parse_boxes, regions_of
from ....unipic_core.conditioning.influence import GRID, NEUTRAL, Influence
from ....unipic_core.conditioning.reference_sizes import MAX_REFERENCES
from ....unipic_core.errors import UniPicError
from ..wires import check_tensors
from .images import to_masks, to_pictures

IMAGES = tuple(f"image_{i + 1}" for i in range(MAX_REFERENCES))
MASKS = tuple(f"mask_{i + 1}" for i in range(MAX_REFERENCES))
REFERENCES = tuple(f"reference_{i + 1}" for i in range(MAX_REFERENCES))

FIRST, ALL = "first", "all"
BATCHES = (FIRST, ALL)
"""Of a batch at one socket: use its first picture, or each as a separate reference."""

ReferenceSocket = io.Custom("UNIPIC_REFERENCE")
"""Type of the wire from Reference (UniPic): one `Reference`."""


@dataclass(frozen=True)
class Reference:
    """A picture with its mask, weight, switch and influence.

    image: ComfyUI's IMAGE; mask: the MASK of parts to leave out; weight: multiplies its share of the reference budget;
    enabled: False = the picture is left out, and later ones are renumbered; influence: strength, region, time range.
    """

    image: Tensor
    mask: Tensor | None = None
    weight: float = 1.0
    enabled: bool = True
    influence: Influence = NEUTRAL


@dataclass(frozen=True)
class Socket:
    """A connected socket: its kind and number, the pictures of it that are used, and the size of its batch.

    weight: of each of its pictures; enabled: False = no pictures, since its Reference node is switched off; masks: of
    each picture, "L" with 255 = left out, or None; influence: of each of its pictures.
    """

    kind: str
    number: int
    pictures: Sequence[Image.Image]
    batch_size: int
    weight: float = 1.0
    enabled: bool = True
    masks: Sequence[Image.Image | None] = ()
    influence: Influence = NEUTRAL

    @property
    def name(self) -> str:
        """Name of the socket on the node."""
        return f"{self.kind}_{self.number}"


def connected(
    images: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    references: Mapping[str, object],
    batches: str = FIRST,
) -> list[Socket]:
    """The connected sockets: pictures with their masks in order, then references in order.

    UniPicError for a mask without a picture, another wire at a reference's socket, and too many pictures.
    """
    unpaired = [m for i, m in zip(IMAGES, MASKS, strict=True) if masks.get(m) is not None and images.get(i) is None]
    if unpaired:
        image = unpaired[0].replace("mask", "image")
        raise UniPicError(f"{unpaired[0]} is connected, but {image} is not; connect the picture, or remove the mask")
    if batches not in BATCHES:
        raise UniPicError(f"batches must be one of {', '.join(BATCHES)}, got {batches!r}")
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
        raise UniPicError(f"{name} must come from Reference (UniPic), got {type(given).__name__}; connect that node")
    return given


def _socket(kind: str, number: int, reference: Reference, batches: str) -> Socket:
    batch, mask = reference.image, reference.mask
    check_tensors({f"{kind}_{number}": batch}, {f"the mask of {kind}_{number}": mask})
    size = len(batch) if batch.ndim == 4 else 1
    if not reference.enabled:
        return Socket(kind, number, (), size, enabled=False)
    if batches == FIRST and size > 1:
        batch, mask = batch[:1], mask[:1] if mask is not None and mask.ndim > 2 else mask
    pictures = to_pictures(batch, mask)
    masks = to_masks(batch, mask)
    return Socket(kind, number, pictures, size, reference.weight, masks=masks, influence=reference.influence)


def _check_count(sockets: Sequence[Socket]) -> None:
    total = sum(len(socket.pictures) for socket in sockets)
    if total > MAX_REFERENCES:
        largest = max(sockets, key=lambda socket: len(socket.pictures))
        raise UniPicError(
            f"at most {MAX_REFERENCES} pictures can be composed, got {total}, {len(largest.pictures)} of them from "
            f"{largest.name}; leave some out, or set batches to {FIRST}"
        )


def reference_weights(sockets: Sequence[Socket]) -> list[float]:
    """Weights of the pictures, in order."""
    return [socket.weight for socket in sockets for _ in socket.pictures]


def reference_influences(sockets: Sequence[Socket], boxes: object) -> list[Influence]:
    """Influences of the pictures, in order.

    boxes: JSON, or its rows, as from Create Bounding Boxes. UniPicError for a picture with a box of its own too.
    """
    influences = [socket.influence for socket in sockets for _ in socket.pictures]
    count = len(influences)
    regions = parse_boxes(boxes, count) if isinstance(boxes, str) else regions_of(boxes, count)
    for number, region in regions.items():
        if influences[number - 1].region is not None:
            raise UniPicError(
                f"image {number} has a box in boxes and in Reference (UniPic); leave one of them out, there by x and y "
                f"0, width and height {GRID}"
            )
        influences[number - 1] = replace(influences[number - 1], region=region)
    return influences


def cautions(sockets: Sequence[Socket]) -> Iterator[str]:
    """Warnings for pictures that are left out, and for numbers in the prompt that differ from the sockets'."""
    for kind in ("image", "reference"):
        yield from _gaps(kind, {socket.number: socket.enabled for socket in sockets if socket.kind == kind})
    number = 0
    for socket in sockets:
        if not socket.enabled:
            continue
        first, number = number + 1, number + len(socket.pictures)
        if (first, number) != (socket.number, socket.number):
            names = f"image {first}" if first == number else f"image {first} to image {number}"
            yield f"{socket.name} is {names} in the prompt"
        if socket.batch_size > len(socket.pictures):
            yield (
                f"{socket.name} has {socket.batch_size} pictures, and only the first is used; set batches to {ALL} to "
                "use each"
            )


def _gaps(kind: str, enabled: Mapping[int, bool]) -> Iterator[str]:
    """Warnings for sockets without a picture before the last one. enabled: socket number -> switched on."""
    before = range(1, max(enabled, default=1))
    empty = [f"{kind}_{i}" for i in before if i not in enabled]
    off = [f"{kind}_{i}" for i, on in enabled.items() if not on]
    renumbered = ", so later pictures are renumbered"
    if empty:
        verb = "is" if len(empty) == 1 else "are"
        yield f"{', '.join(empty)} {verb} empty, muted or bypassed{renumbered}"
    if off:
        verb = "is" if len(off) == 1 else "are"
        later = any(on and i > int(off[0].rpartition("_")[2]) for i, on in enabled.items())
        yield f"{', '.join(off)} {verb} switched off{renumbered if later else ''}"
