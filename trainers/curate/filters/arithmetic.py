"""Measurements in numpy and Pillow; each takes a decoded picture and returns plain numbers.

What each means beside the paper's section 4.1, with its default threshold: docs/curation.md.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from .picture import Decoded, box_of, luma_of

EDGE = 0.06
"""Gradient of luma (0..1) per pixel from which a pixel counts as an edge."""

JPEG_QUALITY = 75
COLOUR_STEP = 16
HASH_WIDTH, HASH_HEIGHT, COLOUR_CELLS = 9, 8, 4
UNIFORM = 0.03
"""Largest difference of luma within a bar."""

PAPER = 0.9
"""Luma above which plain sides are paper."""

LEAST_CONTRAST = 1.0
"""Grey levels; less is the rounding of 8 bits."""


def pixels(picture: Decoded) -> float:
    """Width times height."""
    return float(picture.size[0] * picture.size[1])


def aspect(picture: Decoded) -> float:
    """Longer over shorter side."""
    return max(picture.size) / min(picture.size)


def sharpness(picture: Decoded) -> float:
    """Variance of the Laplacian of luma (0..255), in the subject's box, at a short side of 256 pixels."""
    grey = picture.subject * 255
    if min(grey.shape) < 3:
        return 0.0
    middle = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
    return _rounded(float(laplacian.var()))


def detail(picture: Decoded) -> float:
    """Contrast of the finest octave over that two octaves below, at native size: low if enlarged or blurred."""
    image = _opaque(picture).convert("L")
    if min(image.size) < 32:
        return 0.0
    fine, coarse = (_octave(image.reduce(factor)) for factor in (1, 4))
    return _rounded(fine / max(coarse, LEAST_CONTRAST))


def _octave(image: Image.Image) -> float:
    """Root mean square of what halving the picture loses, in grey levels."""
    again = image.reduce(2).resize(image.size, Image.Resampling.BICUBIC)
    return float(np.sqrt(np.mean((np.asarray(image, np.float32) - np.asarray(again, np.float32)) ** 2)))


def exposure(picture: Decoded) -> float:
    """Mean luma of the subject, 0..1."""
    return _rounded(float(picture.luma[picture.mask].mean() if picture.mask is not None else picture.luma.mean()))


def contrast(picture: Decoded) -> float:
    """Range of luma from the 5th to the 95th percentile, 0..1."""
    low, high = np.percentile(picture.luma, (5, 95))
    return _rounded(float(high - low))


def flat(picture: Decoded) -> float:
    """Share of the pixels in the most frequent colour, of 16 steps per channel."""
    steps = np.asarray(picture.small, np.uint8) // COLOUR_STEP
    colours = steps[..., 0].astype(np.int32) << 8 | steps[..., 1].astype(np.int32) << 4 | steps[..., 2]
    return _rounded(float(np.bincount(colours.ravel()).max() / colours.size))


def border(picture: Decoded) -> float:
    """Share of the height or width in bars of one colour at two opposite sides; white ones are paper, not bars."""
    return _rounded(max(_bars(picture.luma), _bars(picture.luma.T)))


def _bars(luma: np.ndarray) -> float:
    """Share of the height in bars at the top and at the bottom, 0 unless both are there."""
    shares = []
    for side in (luma, luma[::-1]):
        colour = float(side[0].mean())
        differs = np.flatnonzero(np.abs(side - colour).max(axis=1) > UNIFORM)
        if colour > PAPER or not len(differs) or not differs[0]:
            return 0.0
        shares.append(differs[0] / len(side))
    return float(sum(shares))


def occupancy(picture: Decoded) -> float | None:
    """Area of the subject's box over the picture's; None without transparency."""
    if picture.mask is None:
        return None
    left, top, right, bottom = box_of(picture.mask)
    return _rounded((right - left) * (bottom - top) / picture.mask.size)


def inside(picture: Decoded) -> float | None:
    """Share of the picture's edge that the subject does not touch, the lower one aside; None without transparency."""
    if picture.mask is None:
        return None
    mask = picture.mask
    edge = np.concatenate([mask[0], mask[:, 0], mask[:, -1]])
    return _rounded(float(1 - edge.mean()))


def clutter(picture: Decoded) -> dict[str, float]:
    """Edge density and JPEG bits per pixel of the ground around the subject; ranked within the corpus afterwards."""
    if picture.mask is not None:
        return {"edges": 0.0, "bits": 0.0}  # a cut-out has no ground
    luma = picture.luma
    across, down = np.abs(np.diff(luma, axis=1))[:-1], np.abs(np.diff(luma, axis=0))[:, :-1]
    edges = float((np.hypot(across, down) > EDGE).mean())
    buffer = io.BytesIO()
    picture.small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return {"edges": _rounded(edges), "bits": _rounded(8 * buffer.tell() / luma.size)}


def fingerprint(picture: Decoded) -> dict[str, str]:
    """64-bit difference hash of luma, and the mean colours of 4 x 4 cells, in hex."""
    tiny = luma_of(picture.small.resize((HASH_WIDTH, HASH_HEIGHT), Image.Resampling.BOX))
    bits = np.packbits(tiny[:, 1:] > tiny[:, :-1])
    cells = picture.small.resize((COLOUR_CELLS, COLOUR_CELLS), Image.Resampling.BOX)
    return {"hash": bits.tobytes().hex(), "colours": cells.tobytes().hex()}


def _opaque(picture: Decoded) -> Image.Image:
    """Picture at native size, of a cut-out the subject's box."""
    if picture.alpha is None or not (picture.alpha >= 128).any():
        return picture.rgb
    return picture.rgb.crop(box_of(picture.alpha >= 128))


def _rounded(value: float) -> float:
    """Round to six digits, which are the same on every machine's arithmetic."""
    return float(f"{value:.6g}")
