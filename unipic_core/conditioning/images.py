"""Pictures in and out: opening files safely, the reference sizes of the release, and tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..checks import whole
from ..errors import UniPicError, one_line
from .sequence import PIXELS_PER_TOKEN, nearest_multiple

Size = tuple[int, int]
"""(width, height) in pixels, in Pillow's order."""

MAX_REFERENCES = 6
"""References that the release takes."""

REFERENCE_MULTIPLE = 32
"""Sides of the resized references, and of the default output, are multiples of this."""

DEFAULT_BUDGET = 1024
"""Side of the square whose pixels all references share."""

MAX_ASPECT = 8.0
"""The default output is at most this many times as long as it is wide, whatever the first reference."""

MAX_PIXELS = 178_956_970
"""Pictures of more pixels are refused (Pillow's own limit against decompression bombs)."""

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


# --- opening -------------------------------------------------------------------------------------------------------


def load_image(source: str | PathLike[str] | IO[bytes]) -> Image.Image:
    """Open any picture as 8-bit RGB: upright (EXIF), alpha composited on white, the first frame of an animation.

    Raises UniPicError in one line when the file is missing, truncated, not a picture, or has more than MAX_PIXELS.
    """
    name = source if isinstance(source, (str, PathLike)) else getattr(source, "name", "the picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
        return _decode(image, str(name))
    except UnidentifiedImageError:
        raise UniPicError(f"{name} is not a picture that can be read; use PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except FileNotFoundError:
        raise UniPicError(f"no such picture: {name}") from None
    except IsADirectoryError:
        raise UniPicError(f"{name} is a folder, not a picture; name the picture inside it") from None
    except PermissionError:
        raise UniPicError(f"{name} may not be read; check its permissions") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError) as error:
        if isinstance(error, UniPicError):
            raise
        # Pillow's decoders raise any of these on damaged files
        raise UniPicError(f"{name} is damaged or truncated ({one_line(error)}); save or download it again") from None


def _decode(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a JPEG with a thumbnail or a second eye, no animation
        warnings.warn(f"{name} is animated; its first frame of {frames} is used", stacklevel=3)
        image.seek(0)
    image.load()
    return to_rgb(image)


def _too_large(name: object) -> UniPicError:
    return UniPicError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels; make it smaller first")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any Pillow picture: EXIF rotation applied, 16-bit scaled, transparency composited on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _DEEP_MODES:
        return _from_deep_grey(image).convert("RGB")
    if _has_transparency(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    palette = image.palette if image.mode == "P" else None
    return image.mode.endswith(("A", "a")) or "transparency" in image.info or bool(palette and palette.mode == "RGBA")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greyscale -> "L". Pillow's own conversion clips at 255 instead of scaling."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0)
    if image.mode == "F":
        top = 1.0 if values.max() <= 1 else 255.0
    else:
        top = 255.0 if image.mode == "I" and values.max() <= 255 else 65535.0
    grey = np.clip(values / top * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(grey)


# --- sizes ---------------------------------------------------------------------------------------------------------


def reference_sizes(sizes: Sequence[Size], budget: int = DEFAULT_BUDGET) -> list[Size]:
    """Sizes (w, h) for the VAE: multiples of 32 that together hold about budget^2 pixels, relative areas kept.

    r = budget / sqrt(sum of w h); each picture (round(w r), round(h r)), then the nearest multiple of 32, at least 32.
    """
    return [_to_multiple(size) for size in _scaled_sizes(sizes, budget)]


def vision_size(size: Size) -> Size:
    """Size for the vision encoder, of an already twice-resized picture: round(28/32 of each side), a multiple of 28."""
    width, height = size
    return round(28 / 32 * width), round(28 / 32 * height)


def _scaled_sizes(sizes: Sequence[Size], budget: int) -> list[Size]:
    if budget < REFERENCE_MULTIPLE:
        raise UniPicError(f"the reference budget must be at least {REFERENCE_MULTIPLE} pixels, got {budget}")
    if len(sizes) > MAX_REFERENCES:
        raise UniPicError(f"at most {MAX_REFERENCES} pictures can be composed, got {len(sizes)}; leave some out")
    if any(w < 1 or h < 1 for w, h in sizes):
        raise UniPicError(f"every picture must be at least 1x1 pixels, got {list(sizes)}")
    if not sizes:
        return []
    r = budget / math.sqrt(sum(w * h for w, h in sizes))
    return [(round(w * r), round(h * r)) for w, h in sizes]


def _to_multiple(size: Size) -> Size:
    return nearest_multiple(size[0], REFERENCE_MULTIPLE), nearest_multiple(size[1], REFERENCE_MULTIPLE)


def resize_references(images: Sequence[Image.Image], budget: int = DEFAULT_BUDGET) -> list[Image.Image]:
    """The pictures as the VAE sees them: RGB, resized twice by bicubic interpolation as in the release."""
    images = [to_rgb(image) for image in images]
    sizes = [image.size for image in images]
    scaled = [(max(width, 1), max(height, 1)) for width, height in _scaled_sizes(sizes, budget)]
    once = [_bicubic(image, size) for image, size in zip(images, scaled, strict=True)]
    return [_bicubic(image, size) for image, size in zip(once, reference_sizes(sizes, budget), strict=True)]


def resize_for_vision(image: Image.Image) -> Image.Image:
    """A twice-resized reference as the vision encoder sees it (the third bicubic resize)."""
    return _bicubic(image, vision_size(image.size))


def _bicubic(image: Image.Image, size: Size) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)


def output_size(
    first_reference: Size | None, budget: int = DEFAULT_BUDGET, width: int | None = None, height: int | None = None
) -> Size:
    """(width, height) of the output: as asked, checked; by default the first reference's aspect at the budget.

    first_reference: (w, h) of the first picture as given, or None for a square; its aspect is taken up to MAX_ASPECT.
    budget: side of the largest square. A default side is rounded to 32, so a default may be a little over the budget;
    such sizes are accepted when asked for. One side given alone takes the other from the aspect.
    Raises UniPicError naming a size to use.
    """
    width, height = _whole_side("width", width, budget), _whole_side("height", height, budget)
    widest = _widest(budget)
    aspect = min(max(first_reference[0] / first_reference[1], 1 / widest), widest) if first_reference else 1.0
    if width is None and height is None:
        root = math.sqrt(aspect)
        return _to_multiple((round(budget * root), round(budget / root)))
    if width is None and height is not None:
        width = nearest_multiple(height * aspect, PIXELS_PER_TOKEN)
    elif height is None and width is not None:
        height = nearest_multiple(width / aspect, PIXELS_PER_TOKEN)
    assert width is not None
    assert height is not None
    return _checked_size(width, height, budget)


def _whole_side(name: str, side: Any, budget: int) -> int | None:
    """A side that was asked for, as a whole number; None where none was."""
    pixels = whole(side)
    if side is not None and (pixels is None or pixels < 1):
        raise UniPicError(
            f"the output {name} must be positive whole pixels, got {side!r}; try {_shrunk(budget, budget, budget)}"
        )
    return pixels


def _checked_size(width: int, height: int, budget: int) -> Size:
    multiple = PIXELS_PER_TOKEN
    asked = f"{width}x{height}"
    if not _within_budget(width, height, budget):
        fitting = _shrunk(width, height, budget)
        raise UniPicError(f"the output size {asked} is over this model's {budget}x{budget} pixels; use {fitting}")
    if width % multiple or height % multiple:
        near = [nearest_multiple(side, multiple) for side in (width, height)]
        if not _within_budget(near[0], near[1], budget):
            near = [max(side // multiple, 1) * multiple for side in (width, height)]
        raise UniPicError(f"the output size must be multiples of {multiple}, got {asked}; use {near[0]}x{near[1]}")
    return width, height


def _shrunk(width: int, height: int, budget: int) -> str:
    """The largest size of about this aspect, in multiples of 16, that is within the budget."""
    multiple = PIXELS_PER_TOKEN
    shrink = budget / math.sqrt(width * height)
    short = max(int(min(width, height) * shrink) // multiple, 1) * multiple
    long = min(int(max(width, height) * shrink), budget**2 // short) // multiple * multiple
    return f"{short}x{long}" if width < height else f"{long}x{short}"


def _within_budget(width: int, height: int, budget: int) -> bool:
    """At most budget^2 pixels, or a size that rounding an aspect at the budget to 32 can give."""
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
    """The largest aspect of a default output: MAX_ASPECT, or where the short side would fall below 32."""
    return max(min(MAX_ASPECT, (budget / REFERENCE_MULTIPLE) ** 2), 1.0)


# --- tensors -------------------------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(to_rgb(image), dtype=np.uint8))
    return values.permute(2, 0, 1).float() / 127.5 - 1


def to_images(pictures: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] (clamped, rounded) -> pictures."""
    values = ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(row) for row in values.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
