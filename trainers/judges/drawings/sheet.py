"""Picture sheet: rows of instruction, numbered inputs, truth and each system's output.

With several systems, their scores over all scenes are at the foot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ...nano.render import Sample
from ..comparison import judge_lines, label_lines, reported_judges, spread_lines, time_lines
from ..retention import Report
from ..summary import format_value

TEXT, THUMB, PICTURE, GAP, MARGIN = 260, 92, 192, 8, 20
HEAD, HEAD_LINE, CAPTION, TITLE = 30, 19, 22, 48
FOOT_HEAD, FOOT_LINE, FOOT_VALUE = 32, 26, 66
ROW = PICTURE + CAPTION + 2 * GAP
PAPER, INK, FAINT, LINE, BADGE = (252, 252, 250), (32, 34, 38), (120, 124, 130), (222, 222, 218), (38, 92, 168)
BAND = (242, 243, 241)
TASK_WORDS = {
    "replace_background": "new background",
    "open_side": "either side",
    "open_mirror": "either way",
    "open_region": "any place",
    "open_light": "any light",
    "open_background": "a named place",
    "pair": "two objects",
    **{f"compose{count}": f"compose {count}" for count in range(2, 7)},
}

FootLine = tuple[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Row:
    """One sample with the systems' outputs and captions by label."""

    sample: Sample
    outputs: Mapping[str, Image.Image]
    captions: Mapping[str, str]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def wrapped(text: str, width: int, size: int) -> str:
    """Insert line breaks so that no line is wider than ``width`` pixels, except single long words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


@dataclass(frozen=True)
class Layout:
    """Layout of the columns in pixels: ``inputs`` and ``pictures`` are left edges, ``head`` is a height."""

    columns: tuple[str, ...]
    heads: tuple[str, ...]

    @classmethod
    def of(cls, labels: Sequence[str]) -> Layout:
        columns = ("truth", *labels)
        return cls(columns, tuple(_head(label) for label in columns))

    @property
    def head(self) -> int:
        return HEAD + HEAD_LINE * max(text.count("\n") for text in self.heads)

    @property
    def inputs(self) -> int:
        return MARGIN + TEXT + GAP

    @property
    def pictures(self) -> list[int]:
        first = self.inputs + 3 * THUMB + 4 * GAP
        return [first + slot * (2 * GAP + PICTURE) for slot in range(len(self.columns))]

    @property
    def width(self) -> int:
        return self.pictures[-1] + PICTURE + 2 * GAP + MARGIN


def draw_sheet(rows: Sequence[Row], title: str, block: Mapping[str, object] | None = None) -> Image.Image:
    """Draw the sheet of the given rows; with a ``comparison`` its scores at the foot, below each system's pictures.

    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("expected at least one row for the sheet, got none")
    layout = Layout.of(list(rows[0].outputs))
    lines = foot_lines(block) if block else []
    top = MARGIN + TITLE + layout.head
    foot = top + len(rows) * ROW
    height = foot + (FOOT_HEAD + FOOT_LINE * len(lines) if lines else 0) + MARGIN
    sheet = Image.new("RGB", (layout.width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, fill=INK, font=font(20))
    heads = zip([MARGIN, layout.inputs, *layout.pictures], ["instruction", "inputs", *layout.heads], strict=True)
    for x, text in heads:
        pen.multiline_text((x, MARGIN + TITLE), text, fill=FAINT, font=font(14))
    for index, row in enumerate(rows):
        _draw_row(sheet, row, layout, top + index * ROW)
    if lines:
        _draw_foot(pen, lines, layout, foot)
    return sheet


def _draw_row(sheet: Image.Image, row: Row, layout: Layout, y: int) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.line((MARGIN, y - GAP, layout.width - MARGIN, y - GAP), fill=LINE)
    pen.text((MARGIN, y), TASK_WORDS.get(row.sample.task, row.sample.task), fill=BADGE, font=font(13))
    pen.multiline_text((MARGIN, y + 22), wrapped(row.sample.instruction, TEXT - GAP, 15), fill=INK, font=font(15))
    for slot, picture in enumerate(row.sample.references[:6]):
        corner = (layout.inputs + slot % 3 * (THUMB + GAP), y + slot // 3 * (THUMB + GAP))
        _paste_input(sheet, picture, corner, slot + 1)
    captions = {"truth": "", **row.captions}
    pictures = {"truth": row.sample.target, **row.outputs}
    for x, label in zip(layout.pictures, layout.columns, strict=True):
        picture = _in_square(pictures[label], PICTURE)
        sheet.paste(picture, (x + (PICTURE - picture.width) // 2, y + (PICTURE - picture.height) // 2))
        pen.text((x, y + PICTURE + 4), captions.get(label, ""), fill=FAINT, font=font(12))


def foot_lines(block: Report) -> list[FootLine]:
    """Lines of a ``comparison``: title, then (value, retained quality) of the truth and of each system."""
    systems, lines = block["systems"], []
    for judge in reported_judges(block):
        truth = (format_value(judge, block["truth"][judge.name]), "")
        lines.append((judge.title, [truth, *(judge_lines(judge, block, row) for row in systems)]))
    if "spread" in systems[0]:
        truth = (f"{block['truth']['spread']:.4f}", "")
        lines.append(("spread between seeds, 0-1 (truth: drawn again)", [truth, *map(spread_lines, systems)]))
    lines.append(("seconds per picture", [("", ""), *(time_lines(block, row) for row in systems)]))
    return lines


def _draw_foot(pen: ImageDraw.ImageDraw, lines: Sequence[FootLine], layout: Layout, y: int) -> None:
    pen.line((MARGIN, y - GAP, layout.width - MARGIN, y - GAP), fill=INK)
    legend = "over all scenes: the value; the ratio retained of the first system (inverted for errors, dB: difference)"
    legend += ", in brackets the lower end of its 95% interval"
    pen.text((MARGIN, y), legend, fill=FAINT, font=font(14))
    y += FOOT_HEAD
    for index, (title, cells) in enumerate(lines):
        top = y + index * FOOT_LINE
        if index % 2 == 0:
            pen.rectangle((MARGIN, top - 4, layout.width - MARGIN, top + FOOT_LINE - 5), fill=BAND)
        pen.text((MARGIN + 4, top), title, fill=INK, font=font(15))
        for x, (value, quality) in zip(layout.pictures, cells, strict=True):
            pen.text((x, top), value, fill=INK, font=font(15))
            pen.text((x + FOOT_VALUE, top), quality, fill=BADGE, font=font(15))


def _paste_input(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], number: int) -> None:
    """Draw a reference into its square with a frame and its number in the instruction."""
    pen = ImageDraw.Draw(sheet)
    small = _in_square(picture, THUMB)
    left, top = corner[0] + (THUMB - small.width) // 2, corner[1] + (THUMB - small.height) // 2
    sheet.paste(small, (left, top))
    pen.rectangle((left - 1, top - 1, left + small.width, top + small.height), outline=LINE)
    pen.rounded_rectangle((corner[0] + 3, corner[1] + 3, corner[0] + 19, corner[1] + 19), 4, fill=BADGE)
    pen.text((corner[0] + 11, corner[1] + 11), str(number), fill="white", font=font(12), anchor="mm")


def _in_square(picture: Image.Image, side: int) -> Image.Image:
    """RGB, its longer side ``side`` pixels."""
    scale = side / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _head(label: str) -> str:
    """Wrap a column's label without cutting its end, which often tells systems apart."""
    lines = label_lines(label, lambda text: wrapped(text, PICTURE, 14).splitlines())
    return "\n".join(_fitted(line, PICTURE, 14) for line in lines)


def _fitted(text: str, width: int, size: int) -> str:
    """Shorten text that is too wide, with an ellipsis."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
