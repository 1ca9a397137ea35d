"""Thumbnails of the template browser: a workflow's result above its input pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .graph import Workflow

FOLDER = Path(__file__).parents[1] / "pictures"
WIDTH, STRIP, GAP, LINE = 384, 96, 8, 22
PAPER = (246, 242, 232)
INK = (70, 66, 58)
MADE_BY = "Made by the bundled model, unipic-nano"
NOT_HERE = "For the released weights: no picture yet"


def thumbnail(workflow: Workflow, result: Image.Image | None) -> Image.Image:
    """The result, enlarged to 384 pixels wide, above its references and the name of the model that made it.

    None: a workflow that the bundled model cannot run.
    """
    names = [node.values["picture"] for node in workflow.nodes if node.kind_name == "UniPicSampleImages"]
    side = min(STRIP, (WIDTH - GAP * (len(names) + 1)) // len(names))
    height = round(result.height * WIDTH / result.width) if result else 0
    sheet = Image.new("RGB", (WIDTH, height + side + 2 * GAP + LINE), PAPER)
    if result:
        sheet.paste(result.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS), (0, 0))
    text = MADE_BY if result else NOT_HERE
    ImageDraw.Draw(sheet).text((GAP, sheet.height - LINE), text, INK, ImageFont.load_default(14))
    left = (WIDTH - len(names) * (side + GAP) + GAP) // 2
    for i, name in enumerate(names):
        with Image.open(FOLDER / f"{name}.png") as picture:
            small = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + i * (side + GAP), height + GAP))
    return sheet
