"""Grounded mode: ask for boxes of changes, then show their crops beside the whole pictures (as SpatialReward)."""

from __future__ import annotations

from collections.abc import Sequence

from .client import Asker, object_schema
from .parse import parse_boxes
from .pictures import Picture, encode_picture
from .question import Part, Question

ASK = (
    "Compare the picture to judge with its source. Mark up to three regions that differ, or that the instruction is "
    'about. Answer with JSON only: {"boxes": [[x1, y1, x2, y2]]}, whole numbers on a grid from 0 to 1000, the origin '
    "in the upper left corner."
)
MAX_BOXES = 3
MARGIN = 0.05  # of the picture, around a box
Box = tuple[float, float, float, float]


def changed_parts(asker: Asker, sources: Sequence[Picture], output: Picture, seed: int) -> tuple[Part, ...]:
    """Labels and crops of the first source and the output at the boxes that the judge returns. Raises AnswerError."""
    source: list[Part] = ["The source picture:", sources[0]] if sources else []
    boxes = {"boxes": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}}
    question = Question((*source, "The picture to judge:", output, ASK), object_schema(boxes))
    changes = parse_boxes(asker.ask(question, seed).text, MAX_BOXES)
    parts: list[Part] = []
    for number, box in enumerate(changes[: room_for_boxes(len(sources), asker.config.max_images)], 1):
        if sources:
            parts += [f"Region {number} of the source:", crop(sources[0], box)]
        parts += [f"Region {number} of the picture to judge:", crop(output, box)]
    return tuple(parts)


def room_for_boxes(sources: int, max_images: int) -> int:
    """Number of boxes whose two crops fit beside the sources and the output in one request."""
    return max(0, (max_images - 1 - sources) // 2)


def crop(picture: Picture, box: Box) -> Picture:
    """Crop a box (0..1) with a margin."""
    left, top, right, bottom = box
    width, height = picture.size
    edges = (
        int(max(0.0, left - MARGIN) * width),
        int(max(0.0, top - MARGIN) * height),
        max(1, round(min(1.0, right + MARGIN) * width)),
        max(1, round(min(1.0, bottom + MARGIN) * height)),
    )
    return encode_picture(picture.image.crop(edges))
