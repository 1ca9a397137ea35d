"""Thumbnails of the template browser: a workflow's result above its input pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from .graph import Workflow

FOLDER = Path(__file__).parents[1] / "pictures"
WIDTH, STRIP, GAP = 384, 96, 8
PAPER = (246, 242, 232)


def thumbnail(workflow: Workflow, result: Image.Image) -> Image.Image:
    """The result, enlarged to 384 pixels wide, above a strip of its references."""
    names = [node.values["picture"] for node in workflow.nodes if node.kind_name == "UniPicSampleImages"]
    side = min(STRIP, (WIDTH - GAP * (len(names) + 1)) // len(names))
    height = round(result.height * WIDTH / result.width)
    sheet = Image.new("RGB", (WIDTH, height + side + 2 * GAP), PAPER)
    sheet.paste(result.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS), (0, 0))
    left = (WIDTH - len(names) * (side + GAP) + GAP) // 2
    for i, name in enumerate(names):
        with Image.open(FOLDER / f"{name}.png") as picture:
            small = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + i * (side + GAP), height + GAP))
    return sheet
