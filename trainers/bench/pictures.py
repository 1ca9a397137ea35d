"""Thumbnails, and the first cases of a run as one picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from ..judges.vlm import AnswerError, load_picture, side_by_side
from .cases import Plan
from .make import result_path
from .score import Rows

THUMB = 160
SHEET_ROWS = 12


def thumbnail(path: Path) -> Image.Image | None:
    """RGB of at most THUMB pixels a side; None when there is none that can be read."""
    try:
        return load_picture(path, THUMB).image
    except AnswerError:
        return None


def sheet(plan: Plan, rows: Rows, out: Path) -> Image.Image:
    """The first cases as one picture: sources, truth, each system with its scores below."""
    strips = []
    blank = Image.new("RGB", (THUMB, THUMB), (235, 235, 235))
    for case in plan.cases[:SHEET_ROWS]:
        paths = [Path(one) for one in [*case.sources, *([case.truth] if case.truth else [])]]
        captions = [""] * len(paths)
        for label in plan.systems:
            paths.append(result_path(out, label, case))
            found = [
                row["score"]
                for (s, i, _), row in rows.items()
                if (s, i) == (label, case.id) and row["score"] is not None
            ]
            captions.append(f"{label[:16]} " + " ".join(f"{one:.1f}" for one in found[:2]))
        cells = []
        for path, caption in zip(paths, captions, strict=True):
            cell = Image.new("RGB", (THUMB, THUMB + 18), (255, 255, 255))
            cell.paste((thumbnail(path) or blank).resize((THUMB, THUMB)), (0, 0))
            ImageDraw.Draw(cell).text((2, THUMB + 3), caption, fill=(40, 40, 40))
            cells.append(cell)
        strips.append(side_by_side(cells))
    whole = Image.new("RGB", (max(one.width for one in strips), sum(one.height for one in strips)), (255, 255, 255))
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole
