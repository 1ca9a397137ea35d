"""Contact sheets: up to 32 kept and 32 dropped pictures of each filter, in the order of their scores."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from unipic_core.errors import UniPicError, printable

from ...judges.vlm import png_of
from ..filters.picture import decode, read_bytes
from ..manifest.shards import Row, write_bytes

PER_SIDE, COLUMNS, TILE, TEXT = 32, 8, 112, 14
PAPER, TILE_GREY = (255, 255, 255), (214, 214, 214)

Sample = list[tuple[str, float, str]]
"""(digest, score, path); the digests with the largest values are dropped first, so a sample is random but stable."""


class Sheets:
    """Samples of one stage's pictures by filter and verdict."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, bool], Sample] = {}

    def add(self, row: Row) -> None:
        """Consider one row for the sheets of its filters."""
        for name, verdict in row.get("filters", {}).items():
            if verdict["keep"] is not None:
                sample = self.samples.setdefault((name, verdict["keep"]), [])
                sample.append((row["id"], verdict["score"], row["path"]))
                if len(sample) >= 4 * PER_SIDE:
                    sample[:] = heapq.nsmallest(PER_SIDE, sample)

    def write(self, folder: Path, out: Path) -> list[Path]:
        """Write FILTER.png for each filter."""
        paths = []
        for name in dict.fromkeys(name for name, _ in self.samples):
            kept, dropped = (
                sorted(heapq.nsmallest(PER_SIDE, self.samples.get((name, keep), [])), key=lambda one: (one[1], one[0]))
                for keep in (True, False)
            )
            path = folder / f"{name}.png"
            write_bytes(path, png_of(sheet(name, kept, dropped, out)))
            paths.append(path)
        return paths


def sheet(name: str, kept: Sample, dropped: Sample, out: Path) -> Image.Image:
    """Draw two blocks of thumbnails, each with its score below."""
    blocks = [(f"{name}: kept", kept), (f"{name}: dropped", dropped)]
    rows = sum(max(1, -(-len(sample) // COLUMNS)) for _, sample in blocks)
    page = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + TEXT) + len(blocks) * 2 * TEXT), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    top = 0
    for title, sample in blocks:
        pen.text((4, top + 4), title if sample else f"{title}: none", fill="black", font=font)
        top += 2 * TEXT
        for at, (_, score, path) in enumerate(sample):
            left, upper = at % COLUMNS * TILE, top + at // COLUMNS * (TILE + TEXT)
            page.paste(thumbnail(out / path), (left + 2, upper))
            pen.text((left + 4, upper + TILE - 3), printable(f"{score:.4g}"), fill="black", font=font)
        top += max(1, -(-len(sample) // COLUMNS)) * (TILE + TEXT)
    return page


def thumbnail(path: Path) -> Image.Image:
    """Picture in a square of TILE - 4 pixels; a transparent one on grey."""
    side = TILE - 4
    tile = Image.new("RGB", (side, side), TILE_GREY)
    try:
        picture = decode(read_bytes(str(path)), str(path))
    except UniPicError:
        return tile
    image = picture.rgb
    if picture.alpha is not None:
        image = image.copy()
        image.putalpha(Image.fromarray(picture.alpha))
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    corner = ((side - image.width) // 2, (side - image.height) // 2)
    tile.paste(image, corner, image if image.mode == "RGBA" else None)
    return tile


def sheets_of(rows: Iterable[Row], folder: Path, out: Path) -> list[Path]:
    """Write the sheets of a stage."""
    sheets = Sheets()
    for row in rows:
        sheets.add(row)
    return sheets.write(folder, out)
