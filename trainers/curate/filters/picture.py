"""A decoded picture in the forms that the filters measure."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageOps

from unipic_core.conditioning.images import to_rgb
from unipic_core.conditioning.picture_files import open_picture
from unipic_core.errors import UniPicError

SHORT_SIDE = 256
"""Pixels of the short side at which content is measured, so that pictures of all sizes compare."""

MOST_PIXELS = 100_000_000
MOST_BYTES = 1 << 30
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
SOLID = 128
"""Alpha from which a pixel belongs to the subject."""


@dataclass(frozen=True)
class Decoded:
    """Upright picture. rgb: on white; alpha: transparency [H, W] uint8, None for opaque pictures."""

    rgb: Image.Image
    alpha: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.rgb.size

    @cached_property
    def small(self) -> Image.Image:
        """RGB at a short side of SHORT_SIDE (larger pictures are reduced, smaller ones enlarged)."""
        return self.rgb.resize(_small_size(self.size), Image.Resampling.LANCZOS, reducing_gap=3.0)

    @cached_property
    def luma(self) -> np.ndarray:
        """float32 [h, w] in 0..1, of `small`."""
        return luma_of(self.small)

    @cached_property
    def mask(self) -> np.ndarray | None:
        """bool [h, w] of `small`: the subject; None without transparency."""
        if self.alpha is None:
            return None
        alpha = Image.fromarray(self.alpha).resize(self.small.size, Image.Resampling.BOX)
        mask = np.asarray(alpha) >= SOLID
        return mask if mask.any() else None

    @cached_property
    def subject(self) -> np.ndarray:
        """`luma` inside the subject's box, the whole picture without transparency."""
        if self.mask is None:
            return self.luma
        left, top, right, bottom = box_of(self.mask)
        return self.luma[top:bottom, left:right]


def luma_of(picture: Image.Image) -> np.ndarray:
    """float32 [H, W] in 0..1."""
    return np.asarray(picture, np.float32) @ (LUMA / 255)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the true pixels (at least one)."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _small_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = SHORT_SIDE / min(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def read_bytes(path: str) -> bytes:
    """Content of a regular file. Raises UniPicError in one sentence."""
    try:
        with open_picture(path):  # refuses folders, devices, pipes and unknown formats before reading
            pass
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UniPicError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise UniPicError(f"{path} is larger than {MOST_BYTES >> 30} GiB; make it smaller first")
    return data


def decode(data: bytes, name: str) -> Decoded:
    """Decode a picture. Raises UniPicError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_picture(io.BytesIO(data))
            if image.width * image.height > MOST_PIXELS:
                raise UniPicError(f"{name} has more than {MOST_PIXELS // 10**6} million pixels; make it smaller first")
            image.load()
            return Decoded(to_rgb(image), _alpha(image))
    except UniPicError as error:
        raise UniPicError(str(error).replace("the picture", name, 1)) from None
    except MemoryError:
        raise UniPicError(f"{name} does not fit into memory; make it smaller first") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        detail = " ".join(str(error).split())[:100] or type(error).__name__
        raise UniPicError(f"{name} is damaged or truncated ({detail}); save or download it again") from None


def _alpha(image: Image.Image) -> np.ndarray | None:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))
    return alpha if alpha.min() < SOLID else None


def content_id(data: bytes) -> str:
    """Digest of a file's bytes, 32 hex digits."""
    return hashlib.sha256(data).hexdigest()[:32]
