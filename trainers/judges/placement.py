"""Did something appear where it should, and nowhere else? Judged on |picture - background|, blind to what it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import box_blur, weighted_psnr

FLOOR = 0.07  # of the colour range: below it lie compression, a slight cast of the whole picture and grain
NOISE_QUANTILE, NOISE_FACTOR = 0.25, 3.0
MISSING = 0.5  # centre error, in sides, of an item of which nothing is found
SOLID = 0.5  # share of a pixel that an item must cover for its mask


def change(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """float32 [H, W] in 0..1: the root mean square over the channels of the smoothed difference."""
    return np.sqrt((box_blur(picture - background, 1) ** 2).mean(axis=2))


def changed(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """bool [H, W]: where the picture is not its background.

    The threshold is ``FLOOR``, or three times the first quartile of the difference where a picture misses its
    background everywhere: at least a quarter of each picture shows bare background.
    """
    difference = change(picture, background)
    return difference > max(FLOOR, NOISE_FACTOR * float(np.quantile(difference, NOISE_QUANTILE)))


def union(masks: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [H, W]: the share of each pixel that any item covers."""
    return np.clip(np.sum(masks, axis=0), 0, 1)


def placement_iou(found: np.ndarray, masks: Sequence[np.ndarray]) -> float:
    """Intersection over union of what changed and what the items cover together. 1 is best.

    Of edits: the background of ``changed`` and ``masks`` are those after the edit, so a thing that was not removed, or
    left behind when it was moved, costs as much as one that is missing.
    """
    wanted = union(masks) > SOLID
    return float((found & wanted).sum() / max((found | wanted).sum(), 1))


def owners(masks: Sequence[np.ndarray]) -> np.ndarray:
    """int [H, W]: the item to which a change at this pixel is counted.

    The item that covers it; elsewhere the nearest one, by distance from its centre relative to its spread.
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
    """Row and column of the centre of mass; NaN where the mask is empty."""
    total = float(mask.sum())
    if total <= 0:
        return float("nan"), float("nan")
    rows, columns = np.indices(mask.shape)
    return float((rows * mask).sum() / total), float((columns * mask).sum() / total)


def spread(mask: np.ndarray) -> tuple[float, float]:
    """Standard deviation of its rows and columns, at least one pixel."""
    (y, x), (rows, columns) = centre(mask), np.indices(mask.shape)
    total = max(float(mask.sum()), 1e-6)
    high = ((rows - y) ** 2 * mask).sum() / total
    wide = ((columns - x) ** 2 * mask).sum() / total
    return max(float(high) ** 0.5, 1.0), max(float(wide) ** 0.5, 1.0)


def centre_errors(found: np.ndarray, masks: Sequence[np.ndarray]) -> list[float]:
    """Per item: the distance, in sides of the picture, from the centre of its mask to that of the change counted to it.

    ``MISSING`` when nothing was found of it, and at most that.
    """
    owner = owners(masks)
    errors = []
    for index, mask in enumerate(masks):
        own = (found & (owner == index)).astype(np.float32)
        distance = np.hypot(*np.subtract(centre(own), centre((mask > SOLID).astype(np.float32))))
        error = distance / max(mask.shape)
        errors.append(min(float(error), MISSING) if np.isfinite(error) else MISSING)
    return errors


def background_psnr(picture: np.ndarray, target: np.ndarray, masks: Sequence[np.ndarray]) -> float:
    """PSNR (dB) against the true target, shadows included, over what no item covers."""
    return weighted_psnr(picture, target, 1 - union(masks))
