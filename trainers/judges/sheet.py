"""A picture sheet: each row shows the instruction, the numbered inputs, the truth, and what each system made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..data.render import Sample

TEXT, THUMB, PICTURE, GAP, MARGIN = 260, 92, 192, 8, 20
HEAD, CAPTION, TITLE = 30, 22, 48
ROW = PICTURE + CAPTION + 2 * GAP
PAPER, INK, FAINT, LINE, BADGE = (252, 252, 250), (32, 34, 38), (120, 124, 130), (222, 222, 218), (38, 92, 168)
TASK_WORDS = {
    "replace_background": "new background",
    "pair": "two objects",
    **{f"compose{count}": f"compose {count}" for count in range(2, 7)},
}


@dataclass(frozen=True)
class Row:
    """One sample with the pictures of the systems by label, and a caption for each of them."""

    sample: Sample
    outputs: Mapping[str, Image.Image]
    captions: Mapping[str, str]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def wrapped(text: str, width: int, size: int) -> str:
    """The text with line breaks, so that no line is wider than ``width`` pixels (single long words excepted)."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def draw_sheet(rows: Sequence[Row], title: str) -> Image.Image:
    """The sheet of the given rows. Raises ValueError when there is none."""
    if not rows:
        raise ValueError("a sheet needs at least one row")
    columns = ["truth", *rows[0].outputs]
    inputs = 3 * THUMB + 2 * GAP
    width = 2 * MARGIN + TEXT + GAP + inputs + len(columns) * (2 * GAP + PICTURE)
    sheet = Image.new("RGB", (width, MARGIN + TITLE + HEAD + len(rows) * ROW + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, fill=INK, font=font(20))
    left = MARGIN + TEXT + GAP
    lefts = [left + inputs + 2 * GAP + slot * (2 * GAP + PICTURE) for slot in range(len(columns))]
    top = MARGIN + TITLE
    for x, label in zip([MARGIN, left, *lefts], ["instruction", "inputs", *columns], strict=True):
        pen.text((x, top), _fitted(label, TEXT if x == MARGIN else PICTURE, 14), fill=FAINT, font=font(14))
    for index, row in enumerate(rows):
        y = top + HEAD + index * ROW
        pen.line((MARGIN, y - GAP, width - MARGIN, y - GAP), fill=LINE)
        pen.text((MARGIN, y), TASK_WORDS.get(row.sample.task, row.sample.task), fill=BADGE, font=font(13))
        pen.multiline_text((MARGIN, y + 22), wrapped(row.sample.instruction, TEXT - GAP, 15), fill=INK, font=font(15))
        for slot, picture in enumerate(row.sample.references[:6]):
            corner = (left + slot % 3 * (THUMB + GAP), y + slot // 3 * (THUMB + GAP))
            _paste_input(sheet, picture, corner, slot + 1)
        captions = {"truth": "", **row.captions}
        pictures = {"truth": row.sample.target, **row.outputs}
        for x, label in zip(lefts, columns, strict=True):
            shown = pictures[label].convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            sheet.paste(shown, (x, y))
            pen.text((x, y + PICTURE + 4), captions.get(label, ""), fill=FAINT, font=font(12))
    return sheet


def _paste_input(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], number: int) -> None:
    """A reference, fitted into its square and framed, with the number that the instruction calls it by."""
    pen = ImageDraw.Draw(sheet)
    small = picture.convert("RGB")
    scale = THUMB / max(small.size)
    small = small.resize((round(small.width * scale), round(small.height * scale)), Image.Resampling.LANCZOS)
    left, top = corner[0] + (THUMB - small.width) // 2, corner[1] + (THUMB - small.height) // 2
    sheet.paste(small, (left, top))
    pen.rectangle((left - 1, top - 1, left + small.width, top + small.height), outline=LINE)
    pen.rounded_rectangle((corner[0] + 3, corner[1] + 3, corner[0] + 19, corner[1] + 19), 4, fill=BADGE)
    pen.text((corner[0] + 11, corner[1] + 11), str(number), fill="white", font=font(12), anchor="mm")


def _fitted(text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis where it is too wide."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
