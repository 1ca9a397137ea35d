"""Array functions shared by the judges. Pictures are float32 [H, W, 3] in 0..1."""

from __future__ import annotations

import numpy as np
from PIL import Image

MAX_PSNR = 50.0  # dB of equal pictures, about the error of rounding to 8 bits
MAX_PICTURE_PSNR = 99.0  # dB of files that are equal bit by bit, as other programs print it


def to_array(picture: Image.Image) -> np.ndarray:
    """Convert a picture to float32 [H, W, 3] in 0..1."""
    return np.asarray(picture.convert("RGB"), np.float32) / 255


def box_blur(values: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a square of side ``2 radius + 1`` of [H, W] or [H, W, C]; the border is repeated."""
    for axis in (0, 1):
        pad = [(0, 0)] * values.ndim
        pad[axis] = (radius + 1, radius)
        sums = np.cumsum(np.pad(values, pad, mode="edge"), axis=axis, dtype=np.float64)
        width = 2 * radius + 1
        high, low = np.arange(width, sums.shape[axis]), np.arange(sums.shape[axis] - width)
        values = (sums.take(high, axis) - sums.take(low, axis)) / width
    return values.astype(np.float32)


def psnr(error: float) -> float:
    """PSNR in dB of a mean squared error of values in 0..1, at most ``MAX_PSNR``."""
    return min(MAX_PSNR, float(-10 * np.log10(max(error, 1e-12))))


def picture_psnr(picture: Image.Image, truth: Image.Image, mask: np.ndarray | None = None) -> float:
    """PSNR in dB of two RGB pictures of one size, at most ``MAX_PICTURE_PSNR``. mask: bool [H, W], what counts."""
    squares = (np.asarray(truth, np.float64) - np.asarray(picture, np.float64)) ** 2
    mean = float((squares if mask is None else squares[mask]).mean())
    return float(min(MAX_PICTURE_PSNR, 10 * np.log10(255**2 / max(mean, 1e-9))))


def weighted_psnr(picture: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> float:
    """PSNR over the pixels of ``weight`` [H, W]; NaN if it is empty."""
    total = float(weight.sum())
    if total <= 0:
        return float("nan")
    return psnr(float((((picture - truth) ** 2).mean(axis=2) * weight).sum()) / total)


def area_matrix(start: float, stop: float, cells: int, length: int) -> np.ndarray:
    """Overlap of each pixel with each of the equal cells of an interval, per cell size: float32 [cells, length].

    A row sums to 1 if its cell lies inside 0..length, else to less, so ``M @ x`` is the mean over the cell with zeros
    around the picture.
    """
    edges = np.linspace(start, stop, cells + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) / ((stop - start) / cells)).astype(np.float32)
