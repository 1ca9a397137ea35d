"""The contact sheet of the references: pictures as seen, captions, masks, the new picture's frame."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from unipic_core.conditioning import reference_sheet as sheets
from unipic_core.conditioning.reference_sheet import Seen, hatched, masked_share, reference_sheet


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def left_half(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def contains(sheet: Image.Image, tile: Image.Image) -> bool:
    whole, part = np.asarray(sheet), np.asarray(tile)
    rows, columns = np.nonzero((whole[..., :3] == part[0, 0]).all(-1))
    height, width = part.shape[:2]
    return any(np.array_equal(whole[y : y + height, x : x + width], part) for y, x in zip(rows, columns, strict=True))


def test_pictures_stand_unchanged_at_the_size_seen() -> None:
    large, small = picture(320, 192), picture(32, 32, 1)
    sheet = reference_sheet([Seen(large, (3200, 1920)), Seen(small, (40, 40))], (320, 192))
    assert contains(sheet, large)
    assert contains(sheet, small)
    assert sheet.height < 192 + 90


def test_small_pictures_are_magnified_without_smoothing() -> None:
    seen = picture(64, 64)
    sheet = reference_sheet([Seen(seen, (256, 256))], (128, 128))
    assert contains(sheet, seen.resize((256, 256), Image.Resampling.NEAREST))


def test_six_pictures_take_several_rows() -> None:
    sheet = reference_sheet([Seen(picture(608, 320, i), (999, 999)) for i in range(6)], (1024, 1024))
    assert sheet.width <= sheets._ROW
    assert sheet.height > 320 * 2


def test_masked_parts_are_hatched_and_the_rest_is_not() -> None:
    seen = picture(64, 64)
    shown = np.asarray(hatched(seen, left_half(128, 128)))
    assert np.array_equal(shown[:, 33:], np.asarray(seen)[:, 33:])
    assert {tuple(c) for c in shown[:, :31].reshape(-1, 3)} == {sheets._HATCH, sheets._CLEAR}
    assert masked_share(left_half(10, 10)) == 0.5
    assert masked_share(None) == 0


def test_without_references_the_frame_alone() -> None:
    assert reference_sheet([], (512, 256)).size[0] >= 256


def test_without_freetype_the_small_font_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ImageFont.load_default

    def without(size: float | None = None) -> object:
        if size is not None:
            raise ImportError("The _imagingft C module is not installed")
        return plain()

    monkeypatch.setattr(ImageFont, "load_default", without)
    assert reference_sheet([Seen(picture(256, 256), (9, 9))], (256, 256)).width > 400
