"""Boxes as JSON, as people write them for FLUX 3: rows with "bbox" [top, left, bottom, right] on a grid of 1000."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UniPicError
from .influence import GRID, Region
from .picture_numbers import named_pictures

MAX_TEXT, MAX_ROWS = 20_000, 64
"""Most characters and rows of a text."""

NAMES = ("image", "id", "label", "desc")
"""Keys of a row that may name its picture, the first one first."""

BOXES = ("bbox", "box_2d")
"""Keys of a row that may hold its box."""

EXAMPLE = '[{"id": "image_2", "bbox": [500, 100, 900, 400]}]'


def parse_boxes(text: str, count: int) -> dict[int, Region]:
    """Read boxes from JSON: number of a picture, from 1 -> its region. count: number of references.

    text: a list of rows, or one row. Raises UniPicError for a text that is no such JSON, and as `regions_of`.
    """
    if not text.strip():
        return {}
    if len(text) > MAX_TEXT:
        raise UniPicError(f"boxes must be at most {MAX_TEXT} characters, got {len(text)}; leave out the descriptions")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UniPicError(f"boxes must be JSON such as {EXAMPLE}, got {str(error)[:80]}") from None
    return regions_of(rows, count)


def regions_of(rows: object, count: int) -> dict[int, Region]:
    """Regions from parsed rows: number of a picture, from 1 -> its region. count: number of references.

    A row names its picture by a number in one of NAMES, such as "image_2"; rows that name none are those of image 1,
    image 2, ... in order. Raises UniPicError for a picture that is absent or has two boxes, a mixture of both kinds,
    and a wrong box.
    """
    rows = [rows] if isinstance(rows, Mapping) else rows
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(isinstance(row, Mapping) for row in rows):
        raise UniPicError(f"boxes must be a list of rows such as {EXAMPLE}, got {json_of(rows)}")
    if len(rows) > MAX_ROWS:
        raise UniPicError(f"there may be at most {MAX_ROWS} boxes, got {len(rows)}")
    numbers = [_number(row) for row in rows]
    if None in numbers and any(number is not None for number in numbers):
        unnamed = numbers.index(None) + 1
        raise UniPicError(f'box {unnamed} names no picture, and others do; add "image": a number to each')
    regions: dict[int, Region] = {}
    for place, (row, named) in enumerate(zip(rows, numbers, strict=True), start=1):
        number = place if named is None else named
        if not 1 <= number <= count:
            raise UniPicError(f"box {place} is of image {number}, and there are {count} pictures; name one of them")
        if number in regions:
            raise UniPicError(f"image {number} has two boxes; leave one out")
        regions[number] = _region(row, place)
    return regions


def json_of(value: object) -> str:
    """Beginning of a value as JSON, for a message."""
    try:
        return json.dumps(value)[:80]
    except (TypeError, ValueError):
        return type(value).__name__


def _number(row: Mapping[str, Any]) -> int | None:
    """Number of the picture that a row names; None if it names none, or several."""
    for name in NAMES:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        named = named_pictures(value, 0) if isinstance(value, str) else set()
        if len(named) == 1:
            return named.pop()
    return None


def _region(row: Mapping[str, Any], place: int) -> Region:
    box = next((row[name] for name in BOXES if name in row), None)
    numbers = box if isinstance(box, Sequence) and not isinstance(box, str) else ()
    if len(numbers) != 4 or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        raise UniPicError(
            f'box {place} must have "bbox": [top, left, bottom, right], numbers from 0 to {GRID}, got {json_of(row)}'
        )
    top, left, bottom, right = numbers
    try:
        return Region(left, top, right, bottom)
    except UniPicError as error:
        raise UniPicError(f"box {place}: {error}") from None
