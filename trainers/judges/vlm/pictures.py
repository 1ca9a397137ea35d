"""Pictures for a judge: upright RGB on white, limited in size, as PNG in a data URL."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from unipic_core.conditioning.images import to_rgb
from unipic_core.conditioning.picture_files import open_picture

from .errors import AnswerError, one_line

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before decoding."""

PictureSource = Path | bytes | Image.Image
"""Path, file content, or decoded picture."""


@dataclass(frozen=True)
class Picture:
    """``png``: bytes to send; ``size``: (width, height) in pixels; ``digest``: sha256 of size and pixels.

    The digest does not depend on the PNG encoder, so recordings stay valid after its updates.
    """

    png: bytes
    size: tuple[int, int]
    digest: str

    @cached_property
    def url(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def image(self) -> Image.Image:
        """RGB."""
        return Image.open(io.BytesIO(self.png), formats=("PNG",)).convert("RGB")


def load_picture(source: PictureSource, max_side: int | None = None, size: tuple[int, int] | None = None) -> Picture:
    """Load a picture; ``size`` resizes it to (width, height), ``max_side`` limits its longer side.

    The first frame of animations is used. Raises AnswerError (kind "picture") for missing, damaged or huge files.
    """
    image = _opened(source)
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if max_side is not None and max(image.size) > max_side:
        scale = max_side / max(image.size)
        smaller = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(smaller, Image.Resampling.LANCZOS)
    return encode_picture(image)


def encode_picture(image: Image.Image) -> Picture:
    """Encode an RGB picture as PNG."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()
    return Picture(png_of(image), image.size, digest)


def png_of(image: Image.Image) -> bytes:
    """PNG file of a picture; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _opened(source: PictureSource) -> Image.Image:
    """Upright RGB on white."""
    name = str(source) if isinstance(source, Path) else "a picture"
    if isinstance(source, Path) and not source.exists():
        raise AnswerError("picture", f"the picture {name} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = source if isinstance(source, Image.Image) else open_picture(_file(source))
            if image.width * image.height > MAX_PIXELS:
                raise AnswerError(
                    "picture", f"{name} is {image.width}x{image.height}; at most {MAX_PIXELS:,} pixels are read"
                )
            return to_rgb(image)
    except AnswerError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        detail = one_line(error, 100) or type(error).__name__
        raise AnswerError("picture", f"{name} cannot be read as a picture ({detail})") from None


def _file(source: Path | bytes) -> Path | io.BytesIO:
    return source if isinstance(source, Path) else io.BytesIO(source)


def side_by_side(images: Iterable[Image.Image], gap: int = 8) -> Image.Image:
    """Place pictures in a row on white, scaled to the smallest height. Raises ValueError without pictures."""
    images = list(images)
    if not images:
        raise ValueError("expected at least one picture to put side by side, got none")
    height = min(image.height for image in images)
    scaled = [
        image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
        for image in images
    ]
    row = Image.new("RGB", (sum(one.width for one in scaled) + gap * (len(scaled) - 1), height), (255, 255, 255))
    left = 0
    for one in scaled:
        row.paste(to_rgb(one), (left, 0))
        left += one.width + gap
    return row
