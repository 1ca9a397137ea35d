"""Thumbnails, and a picture of a run's first cases."""

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
    """RGB thumbnail of at most THUMB pixels per side; None for an unreadable picture."""
    try:
        return load_picture(path, THUMB).image
    except AnswerError:
        return None


def sheet(plan: Plan, rows: Rows, out: Path) -> Image.Image:
    """Draw the first cases: sources, truth, and each system with its scores below."""
    strips = []
    blank = Image.new("RGB", (THUMB, THUMB), (235, 235, 235))
    for case in plan.cases[:SHEET_ROWS]:
        paths = [Path(one) for one in [*case.sources, *([case.truth] if case.truth else [])]]
        captions = [""] * len(paths)
        for label in plan.systems:
            paths.append(result_path(out, label, case))
            scores = [
                row["score"]
                for (s, i, _), row in rows.items()
                if (s, i) == (label, case.id) and row["score"] is not None
            ]
            captions.append(f"{label[:16]} " + " ".join(f"{one:.1f}" for one in scores[:2]))
        cells = []
        for path, caption in zip(paths, captions, strict=True):
            cell = Image.new("RGB", (THUMB, THUMB + 18), (255, 255, 255))
            cell.paste((thumbnail(path) or blank).resize((THUMB, THUMB)), (0, 0))
            ImageDraw.Draw(cell).text((2, THUMB + 3), caption, fill=(40, 40, 40))
            cells.append(cell)
        strips.append(side_by_side(cells))
    result = Image.new("RGB", (max(one.width for one in strips), sum(one.height for one in strips)), (255, 255, 255))
    top = 0
    for strip in strips:
        result.paste(strip, (0, top))
        top += strip.height
    return result
