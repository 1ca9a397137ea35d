"""Every kind of picture a user may bring; sizes; tensors."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from unipic_core.conditioning import picture_files
from unipic_core.conditioning.images import (
    MAX_ASPECT,
    load_image,
    output_size,
    resize_for_vision,
    resize_references,
    to_images,
    to_rgb,
    to_tensor,
)
from unipic_core.conditioning.reference_sizes import vision_size
from unipic_core.errors import UniPicError


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    file.seek(0)
    return file


def colour(image: Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_greyscale_and_bilevel() -> None:
    assert colour(load_image(saved(Image.new("L", (3, 2), 128)))) == (128,) * 3
    assert colour(load_image(saved(Image.new("1", (3, 2), 1)))) == (255,) * 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(kind: str) -> None:
    deep = Image.fromarray(np.full((2, 3), 32896, dtype=np.uint16))
    assert deep.mode.startswith("I;16")
    assert colour(load_image(saved(deep, kind))) == (128,) * 3


def test_32_bit_and_float() -> None:
    assert colour(to_rgb(Image.fromarray(np.full((2, 3), 65535, dtype=np.int32)))) == (255,) * 3
    assert colour(to_rgb(Image.fromarray(np.full((2, 3), 77, dtype=np.int32)))) == (77,) * 3
    assert colour(load_image(saved(Image.fromarray(np.full((2, 3), 0.5, dtype=np.float32)), "TIFF"))) == (128,) * 3
    assert colour(to_rgb(Image.fromarray(np.full((2, 3), np.nan, dtype=np.float32)))) == (0,) * 3


def test_cmyk() -> None:
    red = load_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red.getpixel((4, 4))[0] > 200
    assert max(red.getpixel((4, 4))[1:]) < 60


def test_palette_with_and_without_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    plain = load_image(saved(palette))
    assert [colour(plain, (x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    clear = load_image(saved(palette, transparency=1))
    assert [colour(clear, (x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_alpha_is_composited_on_white() -> None:
    assert colour(load_image(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 0))))) == (255,) * 3
    half = colour(load_image(saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))))
    assert half[0] == 255
    assert half[1] == pytest.approx(127, abs=1)
    assert colour(load_image(saved(Image.new("LA", (2, 2), (0, 0))))) == (255,) * 3
    assert colour(load_image(saved(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9)))) == (255,) * 3


def test_exif_rotation() -> None:
    picture = Image.new("RGB", (4, 2), "black")
    picture.paste("white", (0, 0, 1, 2))  # the left column
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    upright = load_image(saved(picture, "PNG", exif=exif))
    assert upright.size == (2, 4)
    assert colour(upright, (0, 0)) == (255,) * 3
    assert colour(upright, (0, 3)) == (0,) * 3


def test_animation_gives_its_first_frame_with_a_warning() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    file = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="animated; its first frame of 2"):
        assert colour(load_image(file)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content = saved(Image.fromarray(noise), kind).getvalue()
    path = tmp_path / "cut.img"
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UniPicError, match=r"cut.img is (damaged or truncated|not a picture)") as caught:
            load_image(path)
    assert "\n" not in str(caught.value)


def test_not_pictures(tmp_path: Path) -> None:
    text = tmp_path / "words.png"
    text.write_text("these are words")
    with pytest.raises(UniPicError, match=r"words.png is not a picture"):
        load_image(text)
    with pytest.raises(UniPicError, match="no such picture"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(UniPicError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.touch(mode=0)
    with pytest.raises(UniPicError, match="may not be read"):
        load_image(path)


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 10)
    with pytest.raises(UniPicError, match="million pixels"):
        load_image(saved(Image.new("RGB", (4, 4))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # Pillow's own limit, at twice this
    with pytest.raises(UniPicError, match="million pixels"):
        load_image(saved(Image.new("RGB", (4, 4))))


@pytest.mark.parametrize("size", [(1, 1), (2000, 10), (10, 2000)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    (picture,) = resize_references([load_image(saved(Image.new("RGB", size)))], 256)
    assert all(side % 32 == 0 and side >= 32 for side in picture.size)
    assert resize_for_vision(picture).size == vision_size(picture.size)
    assert all(side % 28 == 0 for side in vision_size(picture.size))


# --- sizes ---


def test_default_output_size() -> None:
    assert output_size(None) == (1024, 1024)
    assert output_size(None, 128) == (128, 128)
    assert output_size((300, 400)) == (896, 1184)
    assert output_size((1, 20000), 128)[0] == 32


@given(st.integers(1, 20000), st.integers(1, 20000), st.sampled_from([32, 48, 64, 100, 128, 512, 1024]))
@example(20000, 10, 1024)
@example(20000, 1, 1024)
@example(1, 20000, 128)
def test_a_default_size_is_within_the_budget_and_may_be_asked_for(w: int, h: int, budget: int) -> None:
    size = output_size((w, h), budget)
    assert min(size) >= 32
    assert size[0] * size[1] <= budget**2 + 16.5 * sum(size)  # each side rounded to pixels, then to 32
    assert max(size) <= budget * MAX_ASPECT**0.5 + 16.5
    assert output_size(None, budget, *size) == size


def test_extreme_aspects() -> None:
    assert output_size((20000, 10)) == output_size((20000, 1)) == (2880, 352)
    assert output_size((20000, 1), width=1024) == (1024, 128)
    with pytest.raises(UniPicError, match=r"over this model's 1024x1024 pixels; use"):
        output_size(None, 1024, 65536, 32)


@pytest.mark.parametrize("side", [64.0, np.int64(64), np.uint8(64), np.float32(64)])
def test_a_whole_number_of_any_type_is_a_side(side: Any) -> None:
    for size in (
        output_size(None, 128, side, 32),
        output_size((2, 1), 128, side),
        output_size((1, 2), 128, None, side),
    ):
        assert sorted(size) == [32, 64]
        assert {type(n) for n in size} == {int}


def test_one_side_takes_the_other_from_the_aspect() -> None:
    assert output_size((200, 100), 1024, width=512) == (512, 256)
    assert output_size((200, 100), 1024, height=256) == (512, 256)
    assert output_size(None, 1024, height=256) == (256, 256)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((1000, 768), "multiples of 16, got 1000x768; use 992x768"),
        ((1023, 1024), "multiples of 16, got 1023x1024; use 1024x1024"),
        ((2048, 1024), "over this model's 1024x1024 pixels; use 1440x720"),
        ((1040, 1024), "over this model's 1024x1024 pixels; use 1024x1008"),
        ((100000, 16), "use 65536x16"),
        ((-64, 64), "output width must be positive whole pixels, got -64; try 1024x1024"),
        ((64, 0), "output height must be positive whole pixels, got 0; try"),
        ((None, -16), "output height must be positive whole pixels, got -16; try"),
        ((64.5, 64), "output width must be positive whole pixels, got 64.5; try"),
        ((float("nan"), None), "output width must be positive whole pixels, got nan; try"),
        ((64, float("inf")), "output height must be positive whole pixels, got inf; try"),
        (("64", 64), "output width must be positive whole pixels, got '64'; try"),
        ((None, True), "output height must be positive whole pixels, got True; try"),
    ],
)
def test_wrong_output_sizes_name_one_to_use(asked: tuple[int, int], message: str) -> None:
    with pytest.raises(UniPicError, match=message) as caught:
        output_size((3, 4), 1024, *asked)
    suggestion = str(caught.value).rpartition(" ")[2]
    width, height = map(int, suggestion.split("x"))
    assert output_size(None, 1024, width, height) == (width, height)


# --- tensors ---


def test_tensors_and_back() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([values, values.T, 255 - values], -1))
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 16, 16)
    assert tensor.min() == -1
    assert tensor.max() == 1
    (back,) = to_images(tensor[None])
    assert np.array_equal(np.asarray(back), np.asarray(picture))
    assert colour(to_images(torch.full((1, 3, 2, 2), 7.0))[0]) == (255,) * 3
    assert colour(to_images(torch.full((1, 3, 2, 2), -7.0).bfloat16())[0]) == (0,) * 3
