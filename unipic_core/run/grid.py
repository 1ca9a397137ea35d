"""Labelled grid of pictures: a comparison of runs that differ in one or two settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_GAP = 4
_INK, _GROUND = (16, 16, 16), (255, 255, 255)
_TEXT_SHARE, _LEAST_TEXT = 14, 12
"""Height of the labels: one part in 14 of a picture's shorter side, at least 12 pixels."""


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str] = (), lines: Sequence[str] = (), title: str = ""
) -> Image.Image:
    """Draw pictures of one size in rows, with a label above each column and left of each row.

    columns, lines: labels of columns and of rows, empty for none. title: a line above all. The pictures' pixels are
    unchanged. Raises ValueError if sizes or numbers of pictures and labels differ.
    """
    _check(rows, columns, lines)
    width, height = rows[0][0].size
    font = _font(max(min(width, height) // _TEXT_SHARE, _LEAST_TEXT))
    fitted = [_fitted(label, width, font) for label in columns]
    left = max((_size(line, font)[0] for line in lines), default=0) + (2 * _GAP if any(lines) else 0)
    heading, top = _band([title], font), _band(fitted, font)
    across = left + len(rows[0]) * (width + _GAP) - _GAP
    grid = Image.new("RGB", (across, heading + top + len(rows) * (height + _GAP) - _GAP), _GROUND)
    draw = ImageDraw.Draw(grid)
    draw.text((_GAP, _GAP), _fitted(title, across, font), fill=_INK, font=font)
    for i, label in enumerate(fitted):
        space = (width - _size(label, font)[0]) // 2
        draw.text((left + i * (width + _GAP) + space, heading + _GAP), label, fill=_INK, font=font)
    for j, row in enumerate(rows):
        y = heading + top + j * (height + _GAP)
        if lines:
            draw.text((_GAP, y + (height - _size(lines[j], font)[1]) // 2), lines[j], fill=_INK, font=font)
        for i, picture in enumerate(row):
            grid.paste(picture, (left + i * (width + _GAP), y))
    return grid


def _check(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], lines: Sequence[str]) -> None:
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"expected rows of equal length, got {[len(row) for row in rows]}")
    if (columns and len(columns) != len(rows[0])) or (lines and len(lines) != len(rows)):
        raise ValueError(
            f"expected a label for each of {len(rows[0])} columns and {len(rows)} rows, got {len(columns)} and "
            f"{len(lines)}"
        )
    sizes = {picture.size for row in rows for picture in row}
    if len(sizes) > 1:
        raise ValueError(f"expected pictures of one size, got {sorted(sizes)}")


def _font(size: int) -> Any:
    """Pillow's built-in font; one small size where Pillow is older than 10.1 or built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):
        return ImageFont.load_default()


def _size(text: str, font: Any) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text)
    return round(right - min(left, 0)), round(bottom - min(top, 0))


def _band(labels: Sequence[str], font: Any) -> int:
    """Height of a line of labels with its margins; 0 for none."""
    return max((_size(label, font)[1] for label in labels), default=0) + 2 * _GAP if any(labels) else 0


def _fitted(text: str, width: int, font: Any) -> str:
    """The text, cut with dots where it is wider than `width` pixels."""
    if _size(text, font)[0] <= width:
        return text
    while text and _size(f"{text}...", font)[0] > width:
        text = text[:-1]
    return f"{text}..." if text else ""
