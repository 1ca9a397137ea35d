"""Placement: changes where items should be and nowhere else, from |picture - background| regardless of identity.

Of pairs also the binding: which of the two things stands in which of the two places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import box_blur, weighted_psnr

FLOOR = 0.07  # of the colour range; compression, slight colour casts and grain stay below it
NOISE_QUANTILE, NOISE_FACTOR = 0.25, 3.0
MISSING = 0.5  # centre error, in sides, of a missing item
SOLID = 0.5  # share of a pixel that an item must cover for its mask


def change(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Root mean square over channels of the smoothed difference, float32 [H, W] in 0..1."""
    return np.sqrt((box_blur(picture - background, 1) ** 2).mean(axis=2))


def changed(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Pixels where the picture differs from its background, bool [H, W].

    The threshold is ``FLOOR``, or three times the first quartile of the difference if the whole background is off: at
    least a quarter of each picture shows bare background.
    """
    difference = change(picture, background)
    return difference > max(FLOOR, NOISE_FACTOR * float(np.quantile(difference, NOISE_QUANTILE)))


def union(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Share of each pixel that any item covers, float32 [H, W]."""
    return np.clip(np.sum(masks, axis=0), 0, 1)


def placement_iou(changed: np.ndarray, masks: Sequence[np.ndarray]) -> float:
    """Intersection over union of the changed pixels and the union of the items' masks; 1 is best.

    For edits, the background of ``changed`` and ``masks`` are those after the edit, so an item that was not removed or
    not moved costs as much as a missing one.
    """
    covered = union(masks) > SOLID
    return float((changed & covered).sum() / max((changed | covered).sum(), 1))


def owners(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Item to which a change at each pixel is counted, int [H, W].

    It is the item that covers the pixel, else the nearest one by distance from its centre relative to its spread.
    """
    rows, columns = np.indices(masks[0].shape)
    distances = []
    for mask in masks:
        (y, x), (high, wide) = centre(mask), spread(mask)
        distances.append(((rows - y) / high) ** 2 + ((columns - x) / wide) ** 2)
    nearest = np.argmin(distances, axis=0)
    cover = np.stack(masks)
    return np.where(cover.max(axis=0) > SOLID, cover.argmax(axis=0), nearest)


def centre(mask: np.ndarray) -> tuple[float, float]:
    """Row and column of the centre of mass; NaN for an empty mask."""
    total = float(mask.sum())
    if total <= 0:
        return float("nan"), float("nan")
    rows, columns = np.indices(mask.shape)
    return float((rows * mask).sum() / total), float((columns * mask).sum() / total)


def spread(mask: np.ndarray) -> tuple[float, float]:
    """Standard deviation of the mask's rows and columns, at least one pixel."""
    (y, x), (rows, columns) = centre(mask), np.indices(mask.shape)
    total = max(float(mask.sum()), 1e-6)
    high = ((rows - y) ** 2 * mask).sum() / total
    wide = ((columns - x) ** 2 * mask).sum() / total
    return max(float(high) ** 0.5, 1.0), max(float(wide) ** 0.5, 1.0)


def centre_errors(changed: np.ndarray, masks: Sequence[np.ndarray]) -> list[float]:
    """Distance per item between the centre of its mask and of the changes counted to it, in sides of the picture.

    At most ``MISSING``, the value of an item without any change.
    """
    owner = owners(masks)
    errors = []
    for index, mask in enumerate(masks):
        item_changes = (changed & (owner == index)).astype(np.float32)
        distance = np.hypot(*np.subtract(centre(item_changes), centre((mask > SOLID).astype(np.float32))))
        error = distance / max(mask.shape)
        errors.append(min(float(error), MISSING) if np.isfinite(error) else MISSING)
    return errors


def not_exchanged(picture: np.ndarray, target: np.ndarray, exchanged: np.ndarray) -> float:
    """1 if a picture is nearer to the truth than to the truth with its two things exchanged, else 0; all [H, W, 3].

    By mean squared error: what both show alike counts equally for both. Chance is one half.
    """
    return float(((picture - target) ** 2).mean() < ((picture - exchanged) ** 2).mean())


def background_psnr(picture: np.ndarray, target: np.ndarray, masks: Sequence[np.ndarray]) -> float:
    """PSNR (dB) against the true target, shadows included, over pixels that no item covers."""
    return weighted_psnr(picture, target, 1 - union(masks))
