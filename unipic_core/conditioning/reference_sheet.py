"""Contact sheet of a run's references as the model sees them, and the size of the new picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .influence import GRID, NEUTRAL, Influence, Region
from .reference_sizes import Size

LEAST_SIDE = 256
"""Pixels of the longest side on a sheet; smaller sheets are magnified by a whole number."""

_ROW = 3072
_GAP, _FONT = 16, 14
_GROUND, _INK, _FRAME = (32, 32, 36), (235, 235, 235), (120, 120, 128)
_HATCH, _CLEAR = (208, 64, 128), (250, 240, 245)


@dataclass(frozen=True)
class Seen:
    """A reference in a run. picture: RGB at the size seen; given: its size before; masked: "L", 255 = left out, of any
    size, or None; influence: its strength and region, which the sheet shows where they change something."""

    picture: Image.Image
    given: Size
    masked: Image.Image | None = None
    influence: Influence = NEUTRAL


def reference_sheet(references: Sequence[Seen], new: Size) -> Image.Image:
    """Draw the numbered references at one scale with their sizes, masked parts hatched, and a small frame of the shape
    of the new picture, whose size (w, h) is `new`."""
    longest = max((max(r.picture.size) for r in references), default=max(new))
    scale = max(LEAST_SIDE // longest, 1)
    font = _font(longest * scale)
    tiles = [_reference_tile(number, reference, scale, font) for number, reference in enumerate(references, start=1)]
    shrink = longest * scale / 2 / max(new)
    frame = _framed(Image.new("RGB", (max(round(new[0] * shrink), 4), max(round(new[1] * shrink), 4)), _GROUND))
    for number, reference in enumerate(references, start=1):
        if reference.influence.region is not None:
            _draw_region(frame, reference.influence.region, str(number), font)
    tiles.append(_tile(frame, ["new picture", f"{new[0]}x{new[1]}"], font))
    return _rows(tiles)


def hatched(picture: Image.Image, masked: Image.Image | None) -> Image.Image:
    """Hatch the masked parts of an RGB picture. masked: "L", 255 = left out, stretched to the picture's size."""
    if masked is None:
        return picture
    width, height = picture.size
    period = max(min(width, height) // 16, 6)
    stripes = np.add.outer(np.arange(height), np.arange(width)) // (period // 2) % 2 == 0
    colours = np.where(stripes[..., None], _HATCH, _CLEAR).astype(np.uint8)
    return Image.composite(Image.fromarray(colours), picture, masked.resize(picture.size, Image.Resampling.BILINEAR))


def masked_share(masked: Image.Image | None) -> float:
    """Share of a picture that its mask leaves out, from 0 to 1."""
    return 0.0 if masked is None else float(np.asarray(masked).mean()) / 255


def _reference_tile(number: int, reference: Seen, scale: int, font: Any) -> Image.Image:
    picture = hatched(_magnified(reference.picture, scale), reference.masked)
    (width, height), (wide, high) = reference.given, reference.picture.size
    lines = [f"image {number}", f"{width}x{height} seen at {wide}x{high}"]
    if share := masked_share(reference.masked):
        lines.append(f"{share:.0%} masked")
    if reference.influence.strength != 1:
        lines.append(f"strength {reference.influence.strength:g}")
    return _tile(picture, lines, font)


def _magnified(picture: Image.Image, scale: int) -> Image.Image:
    width, height = picture.size
    return picture.resize((width * scale, height * scale), Image.Resampling.NEAREST) if scale > 1 else picture.copy()


def _framed(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    ImageDraw.Draw(picture).rectangle((0, 0, width - 1, height - 1), outline=_FRAME, width=2)
    return picture


def _draw_region(frame: Image.Image, region: Region, label: str, font: Any) -> None:
    """Draw a reference's box and its number into the frame of the new picture."""
    width, height = frame.size
    box = [region.left * width, region.top * height, region.right * width, region.bottom * height]
    left, top, right, bottom = (round(side / GRID) for side in box)
    draw = ImageDraw.Draw(frame)
    draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=_INK, width=2)
    draw.text((left + 5, top + 3), label, fill=_INK, font=font)


def _font(longest: int) -> Any:
    """Font that stays readable when a sheet with pictures of this longest side is shown small."""
    try:
        return ImageFont.load_default(max(longest // 24, _FONT))
    except (TypeError, ImportError, OSError):  # Pillow before 10.1, or built without FreeType: one small bitmap font
        return ImageFont.load_default()


def _tile(picture: Image.Image, lines: Sequence[str], font: Any) -> Image.Image:
    """A picture with lines of text below it."""
    text = "\n".join(lines)
    *_, right, bottom = ImageDraw.Draw(picture).multiline_textbbox((0, picture.height + 4), text, font=font)
    tile = Image.new("RGB", (max(picture.width, int(right) + 1), int(bottom) + 2), _GROUND)
    tile.paste(picture, (0, 0))
    ImageDraw.Draw(tile).multiline_text((0, picture.height + 4), text, fill=_INK, font=font)
    return tile


def _rows(tiles: Sequence[Image.Image]) -> Image.Image:
    """Tiles in rows of at most `_ROW` pixels, a wider tile in a row of its own."""
    rows: list[list[Image.Image]] = [[]]
    for tile in tiles:
        if rows[-1] and sum(t.width + _GAP for t in rows[-1]) + tile.width > _ROW:
            rows.append([])
        rows[-1].append(tile)
    widths = [sum(t.width + _GAP for t in row) + _GAP for row in rows]
    heights = [max(t.height for t in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (max(widths), sum(heights) + _GAP), _GROUND)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        left = _GAP
        for tile in row:
            sheet.paste(tile, (left, top))
            left += tile.width + _GAP
        top += height
    return sheet
