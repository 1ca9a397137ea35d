"""Picture grids with row labels and column captions, for previews and sheets."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL = 4, 14


def picture_grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """Draw rows of pictures, each below its label; `captions` are drawn below the columns."""
    cell_w = max(p.width for row in rows for p in row) + MARGIN
    cell_h = max(p.height for row in rows for p in row) + MARGIN
    head = LABEL if labels else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * cell_w + MARGIN, len(rows) * (cell_h + head) + (LABEL if captions else 0) + MARGIN), "white"
    )
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for r, row in enumerate(rows):
        top = r * (cell_h + head) + MARGIN
        if labels:
            write.text((MARGIN, top - 2), labels[r], fill="black", font=font)
        for c, picture in enumerate(row):
            sheet.paste(picture, (c * cell_w + MARGIN, top + head))
    for c, caption in enumerate(captions):
        write.text((c * cell_w + MARGIN, sheet.height - LABEL), caption[: cell_w // 5], fill="black", font=font)
    return sheet
