"""Boxes as JSON, as people write them for FLUX 3: rows with "bbox" [top, left, bottom, right] on a grid of 1000."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import whole
from ..errors import UniPicError
from .influence import GRID, Region
from .picture_numbers import PICTURE_WORD, named_pictures

MAX_TEXT, MAX_ROWS = 20_000, 64
"""Most characters and rows of a text."""

_PICTURE_KEY = re.compile(rf"{PICTURE_WORD}(?:[\s_-]*(?:id|index|number|no))?", re.IGNORECASE)
"""Keys of a row that name its picture, such as "image" or "image_id"; they come before those of NAMES."""

NAMES = ("id", "index", "number", "label", "desc")
"""Keys of a row that may name its picture, the first one first. "id", "label" and "desc" may also be a thing's."""

_BARE = re.compile(r"[\s#<(\[]*(\d{1,4})(?:\.0+)?[\s>)\]]*")
_PICTURE = re.compile(rf"\W*{PICTURE_WORD}", re.IGNORECASE)

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

    A row names its picture by a number, such as 2, "#2" or "image_2"; rows that name none are those of image 1, image
    2, ... in order. Raises UniPicError for a picture that is absent, has two boxes or cannot be read, a mixture of both
    kinds, and a wrong box.
    """
    rows = [rows] if isinstance(rows, Mapping) else rows
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(isinstance(row, Mapping) for row in rows):
        raise UniPicError(f"boxes must be a list of rows such as {EXAMPLE}, got {json_of(rows)}")
    if len(rows) > MAX_ROWS:
        raise UniPicError(f"there may be at most {MAX_ROWS} boxes, got {len(rows)}")
    numbers = [_number(row, place, count) for place, row in enumerate(rows, start=1)]
    if None in numbers and any(number is not None for number in numbers):
        unnamed = numbers.index(None) + 1
        raise UniPicError(f'box {unnamed} names no picture, and others do; add "image": a number to each')
    regions: dict[int, Region] = {}
    for place, (row, named) in enumerate(zip(rows, numbers, strict=True), start=1):
        number = place if named is None else named
        if not 1 <= number <= count:
            raise UniPicError(
                f"box {place} is of image {json_of(number)}, and there are {count} pictures; name one of them"
            )
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


def _number(row: Mapping[str, Any], place: int, count: int) -> int | None:
    """Number of the picture that a row names; None if it names none. place: of the row, for messages."""
    for name in (*(key for key in row if isinstance(key, str) and _PICTURE_KEY.fullmatch(key)), *NAMES):
        value = row.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if (number := _read(value, count)) is not None:
            return number
        if not _of_a_thing(name, value):
            raise UniPicError(
                f'box {place} has "{name[:20]}": {json_of(value)}; expected the number of one picture, such as 2 or '
                '"image_2"'
            )
    return None


def _read(value: object, count: int) -> int | None:
    """Number of the one picture that a value names: 2, 2.0, "2", "#2", "ref 2"; None for none and for several."""
    if not isinstance(value, str):
        return whole(value)
    if bare := _BARE.fullmatch(value):
        return int(bare[1])
    named = named_pictures(value, count)
    return named.pop() if len(named) == 1 else None


def _of_a_thing(name: str, value: object) -> bool:
    """True for a value that may name the thing in the box: any label and description, an id such as "cat_1"."""
    return name in ("label", "desc") or (name == "id" and isinstance(value, str) and not _PICTURE.match(value))


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
