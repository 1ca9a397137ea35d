"""A picture of a run: numbered inputs, the prompt below them, and the results beside them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

RESULT, INPUT, COLUMNS = 384, 144, 3
"""Sides of the squares of results and inputs in pixels, and inputs in a row."""

GAP, BADGE, TEXT = 12, 22, 18
PAPER, INK, BLUE = (252, 252, 250), (32, 34, 38), (38, 92, 168)
LEFT = COLUMNS * INPUT + (COLUMNS - 1) * GAP
"""Width of the inputs and of the prompt."""


def picture_sheet(inputs: Sequence[Image.Image], prompt: str, results: Sequence[Image.Image]) -> Image.Image:
    """Draw up to six inputs in rows of three, the prompt, and the results from left to right."""
    rows = -(-len(inputs) // COLUMNS)
    words = wrapped(prompt, LEFT)
    top = GAP + rows * (INPUT + GAP)
    height = max(top + len(words) * (TEXT + 6), GAP + RESULT) + GAP
    sheet = Image.new("RGB", (GAP + LEFT + len(results) * (GAP + RESULT) + GAP, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, picture in enumerate(inputs):
        row, column = divmod(index, COLUMNS)
        corner = (GAP + column * (INPUT + GAP), GAP + row * (INPUT + GAP))
        paste_fitted(sheet, picture, corner, INPUT)
        pen.rectangle((*corner, corner[0] + BADGE, corner[1] + BADGE), fill=BLUE)
        middle = (corner[0] + BADGE / 2, corner[1] + BADGE / 2)
        pen.text(middle, str(index + 1), fill="white", font=ImageFont.load_default(14), anchor="mm")
    pen.multiline_text((GAP, top), "\n".join(words), fill=INK, font=ImageFont.load_default(TEXT), spacing=6)
    for index, picture in enumerate(results):
        paste_fitted(sheet, picture, (2 * GAP + LEFT + index * (RESULT + GAP), GAP), RESULT)
    return sheet


def paste_fitted(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], side: int) -> None:
    """Paste a picture, scaled so that its longer side is `side` pixels, into the middle of a square."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(fitted, (corner[0] + (side - size[0]) // 2, corner[1] + (side - size[1]) // 2))


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    font = ImageFont.load_default(TEXT)
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
