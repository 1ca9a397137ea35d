"""Pictures as 8-bit RGB, resized as in the release, and as tensors."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import whole
from ..errors import UniPicError
from .picture_files import Source, name_of, open_picture, picture_errors
from .reference_sizes import (
    DEFAULT_BUDGET,
    REFERENCE_MULTIPLE,
    RELEASE,
    Size,
    scaled_sizes,
    to_multiple,
    vision_size,
)
from .sequence import PIXELS_PER_TOKEN, nearest_multiple

MAX_ASPECT = 8.0
"""Largest aspect ratio of the default output, whatever the first reference's."""

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
"""Formats whose pictures of Pillow's mode I have 16 bits."""
_BRIGHTER_THAN_WHITE = 16.0
"""Largest value of a float picture whose white is 1 (high dynamic range); in others white is 255 or 65535."""
_BAND = 4_000_000
"""Pixels converted at a time."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that turns a picture upright (CIPA DC-008, section 4.6.4)."""
_EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Places in which Pillow looks for an orientation; removed once it is applied."""


# --- opening -------------------------------------------------------------------------------------------------------


def load_image(source: Source) -> Image.Image:
    """Open any picture as 8-bit RGB: upright (EXIF), alpha composited on white, first frame of an animation.

    Raises UniPicError if the file is missing, truncated, not a picture, or larger than MAX_PIXELS. Needs at most
    BYTES_PER_PIXEL of memory per pixel.
    """
    image, name = open_picture(source), name_of(source)
    with picture_errors(name), image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # MPO: a JPEG with a thumbnail or a second eye, no animation
            warnings.warn(f"{name} is animated; its first frame of {frames} is used", stacklevel=2)
            image.seek(0)
        image.load()
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow picture to 8-bit RGB: EXIF rotation applied, 16 bits scaled, alpha composited on white."""
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _DEEP_MODES:
        return _by_bands(image, partial(_from_deep_grey, top=_deep_white(image), clear=image.info.get("transparency")))
    return _by_bands(image, _on_white) if _has_transparency(image) else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and remove the tag. With damaged EXIF, warn and return the picture as stored."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # Pillow raises nearly anything on damaged EXIF
        warnings.warn("the EXIF of a picture is damaged; its orientation is ignored", stacklevel=3)
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _EXIF_KEYS:
        turned.info.pop(key, None)
    return turned


def _has_transparency(image: Image.Image) -> bool:
    palette = image.palette if image.mode == "P" else None
    return image.mode.endswith(("A", "a")) or "transparency" in image.info or bool(palette and palette.mode == "RGBA")


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert a picture to RGB in bands of rows, so that no copy of the whole in a wider type is needed."""
    rgb = Image.new("RGB", image.size)
    for box in _bands(image.size):
        rgb.paste(convert(image.crop(box)), box[:2])
    return rgb


def _bands(size: Size) -> Iterator[tuple[int, int, int, int]]:
    """Divide a picture into boxes of whole rows."""
    width, height = size
    rows = max(_BAND // width, 1)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _deep_white(image: Image.Image) -> float:
    """Value of white in a greyscale picture of more than 8 bits."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        return 65535.0
    most = 0.0
    for box in _bands(image.size):
        values = np.asarray(image.crop(box))
        most = max(most, float(values[np.isfinite(values)].max(initial=0)))
    if image.mode == "F" and most <= _BRIGHTER_THAN_WHITE:
        return 1.0
    return 255.0 if most <= 255 else 65535.0


def _from_deep_grey(image: Image.Image, top: float, clear: object = None) -> Image.Image:
    """Scale greyscale of more than 8 bits to "L"; Pillow's conversion clips at 255 instead.

    top: value of white. clear: value of transparent pixels, which become white.
    """
    values = np.asarray(image).astype(np.float64)
    hidden = values == clear if isinstance(clear, int) else None
    grey = np.clip(np.nan_to_num(values, nan=0.0, posinf=top) / top * 255, 0, 255).round().astype(np.uint8)
    if hidden is not None:
        grey[hidden] = 255
    return Image.fromarray(grey)


# --- sizes ---------------------------------------------------------------------------------------------------------


def resize_references(
    images: Sequence[Image.Image],
    budget: int = DEFAULT_BUDGET,
    share: str = RELEASE,
    weights: Sequence[float] | None = None,
) -> list[Image.Image]:
    """Resize references for the VAE: RGB, twice bicubic as in the release. share, weights: as for `reference_sizes`."""
    images = [to_rgb(image) for image in images]
    scaled = scaled_sizes([image.size for image in images], budget, share, weights)
    once = [
        _bicubic(image, (max(width, 1), max(height, 1))) for image, (width, height) in zip(images, scaled, strict=True)
    ]
    return [_bicubic(image, to_multiple(size)) for image, size in zip(once, scaled, strict=True)]


def resize_for_vision(image: Image.Image) -> Image.Image:
    """Resize a reference from `resize_references` for the vision encoder (the release's third bicubic resize)."""
    return _bicubic(image, vision_size(image.size))


def _bicubic(image: Image.Image, size: Size) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)


def output_size(
    first_reference: Size | None, budget: int = DEFAULT_BUDGET, width: int | None = None, height: int | None = None
) -> Size:
    """Size (width, height) of the output in pixels: as requested, or the first reference's aspect at the budget.

    first_reference: (w, h) of the first picture before resizing, None for a square; its aspect counts up to MAX_ASPECT.
    budget: side of the largest square. Default sides are rounded to 32, so a default may slightly exceed the budget;
    such sizes are accepted when requested. With one side given, the other follows from the aspect. Raises UniPicError
    with a size to use.
    """
    width, height = _whole_side("width", width, budget), _whole_side("height", height, budget)
    widest = _widest(budget)
    aspect = min(max(first_reference[0] / first_reference[1], 1 / widest), widest) if first_reference else 1.0
    if width is None and height is None:
        root = math.sqrt(aspect)
        return to_multiple((round(budget * root), round(budget / root)))
    if width is None and height is not None:
        width = nearest_multiple(height * aspect, PIXELS_PER_TOKEN)
    elif height is None and width is not None:
        height = nearest_multiple(width / aspect, PIXELS_PER_TOKEN)
    assert width is not None
    assert height is not None
    return _checked_size(width, height, budget)


ASPECTS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21")
"""Aspects that interfaces offer; `aspect_size` reads others too."""


def aspect_size(aspect: str) -> Size:
    """Read an aspect such as "16:9" as (16, 9). Raises UniPicError for other texts, and beyond MAX_ASPECT."""
    parts = re.fullmatch(r"\s*(\d{1,5})\s*[:/x]\s*(\d{1,5})\s*", aspect) if isinstance(aspect, str) else None
    width, height = (int(part) for part in parts.groups()) if parts else (0, 0)
    if not width or not height or max(width / height, height / width) > MAX_ASPECT:
        raise UniPicError(
            f"the aspect must be two whole numbers such as 16:9, at most {MAX_ASPECT:g}:1, got {aspect!r}"
        )
    return width, height


def _whole_side(name: str, side: object, budget: int) -> int | None:
    """Check a requested side and return it as an int; None if it was not requested."""
    pixels = whole(side)
    if side is not None and (pixels is None or pixels < 1):
        raise UniPicError(
            f"the output {name} must be positive whole pixels, got {side!r}; try {_shrunk(budget, budget, budget)}"
        )
    return pixels


def _checked_size(width: int, height: int, budget: int) -> Size:
    multiple = PIXELS_PER_TOKEN
    requested = f"{width}x{height}"
    if not within_budget(width, height, budget):
        fitting = _shrunk(width, height, budget)
        raise UniPicError(f"the output size {requested} is over this model's {budget}x{budget} pixels; use {fitting}")
    if width % multiple or height % multiple:
        near = [nearest_multiple(side, multiple) for side in (width, height)]
        if not within_budget(near[0], near[1], budget):
            near = [max(side // multiple, 1) * multiple for side in (width, height)]
        raise UniPicError(f"the output size must be multiples of {multiple}, got {requested}; use {near[0]}x{near[1]}")
    return width, height


def _shrunk(width: int, height: int, budget: int) -> str:
    """Largest size within the budget, in multiples of 16, of about this aspect."""
    multiple = PIXELS_PER_TOKEN
    shrink = budget / math.sqrt(width * height)
    short = max(int(min(width, height) * shrink) // multiple, 1) * multiple
    long = min(int(max(width, height) * shrink), budget**2 // short) // multiple * multiple
    return f"{short}x{long}" if width < height else f"{long}x{short}"


def within_budget(width: int, height: int, budget: int) -> bool:
    """True for at most budget^2 pixels, and for a default size that rounding to 32 lifted above the budget."""
    if width * height <= budget**2:
        return True
    if width % REFERENCE_MULTIPLE or height % REFERENCE_MULTIPLE:
        return False
    # a default is (budget r, budget / r), rounded to pixels and then to 32; is there such an r?
    most = REFERENCE_MULTIPLE / 2 + 0.5
    root = math.sqrt(_widest(budget))
    least_r, most_r = max((width - most) / budget, 1 / root), min(budget / (height - most), root)
    return least_r <= most_r * (1 + 1e-9)


def _widest(budget: int) -> float:
    """Largest aspect of a default output: MAX_ASPECT, or less if the short side would fall below 32."""
    return max(min(MAX_ASPECT, (budget / REFERENCE_MULTIPLE) ** 2), 1.0)


# --- tensors -------------------------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a picture to a tensor [3, H, W] float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(to_rgb(image), dtype=np.uint8))
    return values.permute(2, 0, 1).float() / 127.5 - 1


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Convert tensors [B, 3, H, W] in [-1, 1] to pictures; values are clamped and rounded."""
    values = ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(row) for row in values.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
