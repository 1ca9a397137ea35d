"""Picture files from anyone: formats, pipes, damaged EXIF, 16 bits, memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from tests.paths import ROOT
from unipic_core.conditioning.images import load_image, to_rgb
from unipic_core.conditioning.picture_files import BYTES_PER_PIXEL, ENDINGS, FORMATS, formats, open_picture
from unipic_core.errors import UniPicError


def saved(image: Image.Image, path: Path, kind: str, **options: object) -> Path:
    image.save(path, format=kind, **options)
    return path


@pytest.mark.parametrize("kind", [name for name in FORMATS if name not in ("MPO", "HEIF")])
def test_meant_formats_open_under_any_name(tmp_path: Path, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    picture = load_image(saved(Image.new("RGB", (16, 8), (200, 30, 30)), tmp_path / "a.png", kind))
    assert (picture.mode, picture.size) == ("RGB", (16, 8))
    assert np.abs(np.asarray(picture, dtype=int)[4, 8] - (200, 30, 30)).max() < 12


def test_every_format_has_an_ending_and_every_ending_a_format() -> None:
    formats()  # registers the readers
    kinds = {Image.EXTENSION[ending] for ending in ENDINGS if ending in Image.EXTENSION}
    assert {*kinds, "AVIF", "HEIF"} == set(FORMATS)


@pytest.mark.parametrize("kind", ["EPS", "SPIDER", "DDS", "ICO", "PCX", "TGA", "IM", "SGI"])
def test_other_formats_are_not_tried(tmp_path: Path, kind: str) -> None:
    mode = "F" if kind == "SPIDER" else "RGB"
    path = saved(Image.new(mode, (16, 16)), tmp_path / "a.other", kind).rename(tmp_path / "a.png")
    with pytest.raises(UniPicError, match=r"a\.png is not a picture that can be read; use PNG, JPEG or WebP"):
        load_image(path)


def test_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    path = saved(Image.new("RGB", (64, 64), (200, 30, 30)), tmp_path / "phone.heic", "HEIF")
    assert np.abs(np.asarray(load_image(path), dtype=int)[32, 32] - (200, 30, 30)).max() < 12


def test_heic_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    formats.cache_clear()
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99)
    try:
        with pytest.raises(UniPicError, match=r"phone\.heic is a HEIC picture; pip install \"pillow-heif\", or save"):
            load_image(tmp_path / "phone.heic")
    finally:
        formats.cache_clear()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path(os.devnull)):
        with pytest.raises(UniPicError, match="expected a picture file, .* is a device or a pipe"):
            load_image(path)
    with pytest.raises(UniPicError, match="no such picture"):
        load_image("a\0.png")


EXIF = {
    "no TIFF": b"Exif\0\0garbage garbage",
    "cut": b"Exif\0\0II*\0",
    "far offset": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "many entries": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x05\0\0\0\x01\0\0\0\0" * 9,
    "orientation 9": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
    "orientation as text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0A\0\0\0\0\0\0\0",
    "orientation over zero": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\x1a\0\0\0\0\0\0\0" + b"\0" * 8,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", EXIF)
def test_damaged_exif_leaves_the_picture_as_it_is(tmp_path: Path, exif: str, kind: str) -> None:
    path = saved(Image.new("RGB", (16, 8), (200, 30, 30)), tmp_path / "a.img", kind, exif=EXIF[exif])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(path).size == (16, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path: Path, orientation: int, kind: str) -> None:
    """Beside a tag that cannot be written again, over which the rotation used to fail."""
    values = np.zeros((16, 32, 3), dtype=np.uint8)
    values[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(values), tmp_path / "a.img", kind, exif=exif)
    once = load_image(path)
    assert once.size == ((32, 16) if orientation < 5 else (16, 32))
    bright = [at for at in ((0, 0), (once.width - 1, 0), (0, once.height - 1)) if once.getpixel(at)[0] > 128]
    corners = {1: (0, 0), 2: (31, 0), 4: (0, 15), 5: (0, 0), 6: (15, 0), 8: (0, 31)}
    assert bright == ([corners[orientation]] if orientation in corners else [])
    assert to_rgb(once).size == once.size
    assert np.array_equal(np.asarray(to_rgb(once)), np.asarray(once))


def test_dark_16_bit_pictures_stay_dark(tmp_path: Path) -> None:
    header = b"P5 4 2 65535\n"
    (tmp_path / "a.pgm").write_bytes(header + np.full(8, 255, dtype=">u2").tobytes())
    assert load_image(tmp_path / "a.pgm").getpixel((0, 0)) == (1, 1, 1)


def test_16_bit_transparency_is_white(tmp_path: Path) -> None:
    values = np.array([[500, 65535, 0]], dtype=np.uint16)
    path = saved(Image.fromarray(values), tmp_path / "a.png", "PNG", transparency=500)
    assert [load_image(path).getpixel((x, 0))[0] for x in range(3)] == [255, 255, 0]


def test_bright_floats(tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.array([[0.5, 1.5, np.inf]], dtype=np.float32)), tmp_path / "a.tif", "TIFF")
    assert [load_image(path).getpixel((x, 0))[0] for x in range(3)] == [128, 255, 255]


def test_bands_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 50, 4), dtype=np.uint8)
    picture = Image.fromarray(noise)
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    monkeypatch.setattr("unipic_core.conditioning.images._BAND", 120)
    whole = Image.alpha_composite(white, picture).convert("RGB")
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(whole))


MEASURE = """
import re, sys, warnings
from PIL import Image
from unipic_core.conditioning.images import load_image
warnings.simplefilter("ignore")
load_image(sys.argv[1])
def memory(name):  # ru_maxrss would begin with that of the process that started this one
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
image = load_image(sys.argv[2])
print((memory("VmHWM") - before) / image.width / image.height)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["I;16", "RGBA", "F", "turned"])
def test_memory_for_each_pixel(tmp_path: Path, mode: str) -> None:
    """As docs say, for the largest pictures; measured on one of 36 million pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kind, options = ("TIFF", {"compression": "tiff_lzw"}) if mode == "F" else ("PNG", {})
    if mode == "turned":
        options = {"exif": exif}
    for name, side in (("small", 16), ("large", 6000)):
        picture = Image.new("RGB" if mode == "turned" else mode, (side, side))
        saved(picture, tmp_path / name, kind, **options)
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) <= BYTES_PER_PIXEL, done.stdout


def test_bombs_are_refused_from_their_header() -> None:
    file = io.BytesIO()
    Image.new("1", (14000, 14000)).save(file, "PNG")
    with pytest.raises(UniPicError, match="more than 178 million pixels; make it smaller first"):
        open_picture(file)
