"""Appearance of an item: comparison with the true target inside the item's visible mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import box_blur, weighted_psnr

TOLERANCE = 4  # tolerated offset in pixels per direction, the range of the hidden offset
WINDOW = 3  # radius of the SSIM window
C1, C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for values in 0..1
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Appearance:
    """``psnr``: dB. ``ssim``: at most 1. ``colour``: root mean square difference of the mean colours, 0..255."""

    psnr: float
    ssim: float
    colour: float


def shifted(picture: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Shift a picture down by ``dy`` and right by ``dx`` pixels, repeating its border."""
    rows = np.clip(np.arange(picture.shape[0]) - dy, 0, picture.shape[0] - 1)
    columns = np.clip(np.arange(picture.shape[1]) - dx, 0, picture.shape[1] - 1)
    return picture[rows[:, None], columns]


def best_shift(
    picture: np.ndarray, target: np.ndarray, mask: np.ndarray, tolerance: int = TOLERANCE
) -> tuple[int, int]:
    """Find the shift (dy, dx) with the least error inside the mask: every second one, then its neighbours."""
    (height, width), weight = mask.shape, mask.ravel()
    padded = np.pad(picture, ((tolerance, tolerance), (tolerance, tolerance), (0, 0)), mode="edge")

    def error(shift: tuple[int, int]) -> float:
        top, left = tolerance - shift[0], tolerance - shift[1]
        difference = padded[top : top + height, left : left + width] - target
        return float(np.einsum("pc,pc,p->", *[difference.reshape(-1, 3)] * 2, weight))

    coarse = range(-tolerance, tolerance + 1, 2)
    dy, dx = min(((dy, dx) for dy in coarse for dx in coarse), key=error)
    near = [(dy + y, dx + x) for y in (0, -1, 1) for x in (0, -1, 1)]
    return min((one for one in near if max(map(abs, one)) <= tolerance), key=error)


def bounding_box(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Bounding box of the mask with a margin in pixels, as row and column slices."""
    rows, columns = np.flatnonzero(mask.max(axis=1) > 0), np.flatnonzero(mask.max(axis=0) > 0)
    if not len(rows):
        return slice(0, 1), slice(0, 1)
    return (
        slice(max(int(rows[0]) - margin, 0), int(rows[-1]) + 1 + margin),
        slice(max(int(columns[0]) - margin, 0), int(columns[-1]) + 1 + margin),
    )


def ssim_map(picture: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Structural similarity of the luma in windows of 7 x 7, float32 [H, W] (Wang et al. 2004, eq. 13)."""
    a, b = picture @ LUMA, target @ LUMA
    mean_a, mean_b = box_blur(a, WINDOW), box_blur(b, WINDOW)
    var_a = np.maximum(box_blur(a * a, WINDOW) - mean_a**2, 0)
    var_b = np.maximum(box_blur(b * b, WINDOW) - mean_b**2, 0)
    covariance = box_blur(a * b, WINDOW) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return luminance * (2 * covariance + C2) / (var_a + var_b + C2)


def colour_difference(picture: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    """Root mean square over the channels of the difference of the mean colours in the mask, in 0..255."""
    total = float(mask.sum())
    if total <= 0:
        return float("nan")
    difference = ((picture - target) * mask[..., None]).sum(axis=(0, 1)) / total
    return float(255 * np.sqrt((difference**2).mean()))


def appearance(picture: np.ndarray, target: np.ndarray, mask: np.ndarray) -> Appearance:
    """PSNR, SSIM and colour error inside ``mask`` [H, W] after the best shift; NaN for an empty mask."""
    window = bounding_box(mask, TOLERANCE + WINDOW)  # pixels farther away have no influence
    picture, target, mask = picture[window], target[window], mask[window]
    aligned = shifted(picture, *best_shift(picture, target, mask))
    total = float(mask.sum())
    similarity = float((ssim_map(aligned, target) * mask).sum() / total) if total > 0 else float("nan")
    return Appearance(weighted_psnr(aligned, target, mask), similarity, colour_difference(aligned, target, mask))
