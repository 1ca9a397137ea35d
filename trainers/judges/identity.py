"""Identity of the item in a box: the nearest asset of the whole bank, by colours in 12 x 12 cells.

Every asset is drawn into the box (stretched to fill it, also mirrored) in the scene's light over its true background
and compared with the picture. Pixels that show other items, or lie outside the picture, do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import area_matrix

CELLS = 12
SHIFTS = np.array([-4.0, -2.0, 0.0, 2.0, 4.0])  # tolerated offsets of the box, in 1/128 sides
Rect = tuple[float, float, float, float]  # left, top, width, height in pixels; may leave the picture


def describe(rgba: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descriptor of a uint8 RGBA picture: premultiplied colours [P, 3] and cover [P] in 0..1, means over P cells."""
    height, width = rgba.shape[:2]
    down, across = area_matrix(0, height, CELLS, height), area_matrix(0, width, CELLS, width)
    values = rgba.astype(np.float32) / 255
    values[..., :3] *= values[..., 3:]
    cells = np.einsum("ph,hwc,qw->pqc", down, values, across, optimize=True).reshape(-1, 4)
    return cells[:, :3], cells[:, 3]


class IdentityIndex:
    """Descriptors of N assets and their mirror images, computed once: ``colours`` [2N, P, 3], ``cover`` [2N, P]."""

    def __init__(self, rgba: Sequence[np.ndarray]) -> None:
        described = [describe(one) for one in rgba]
        described += [describe(one[:, ::-1]) for one in rgba]
        self.size = len(rgba)
        self.colours = np.stack([colours for colours, _ in described])
        self.cover = np.stack([cover for _, cover in described])

    def drawn(self, background: np.ndarray, tint: np.ndarray) -> np.ndarray:
        """Each asset, mapped by ``tint``, over ``background`` [P, 3], minus the background: float32 [2N, 3P]."""
        lit = np.clip(self.colours @ tint.T.astype(np.float32), 0, self.cover[..., None])
        return (lit - self.cover[..., None] * background).reshape(2 * self.size, -1)

    def distances(
        self, pictures: np.ndarray, background: np.ndarray, weight: np.ndarray, box: Rect, tint: np.ndarray
    ) -> np.ndarray:
        """Mean squared distances [V, N] of pictures [V, H, W, 3] in 0..1 to N assets, at the best shift and flip.

        ``background``: [H, W, 3]; ``weight``: [H, W] in 0..1; ``tint``: [3, 3], the light on (r, g, b).
        """
        pixels = SHIFTS * (pictures.shape[2] / 128)
        stack = np.concatenate([pictures - background, background[None]])
        cells, share = _cells(stack, weight, box, pixels)
        picture_cells, background_cells = (
            cells[:-1],
            cells[-1, len(pixels) ** 2 // 2],
        )  # unshifted box
        share = np.repeat(share / np.maximum(share.sum(axis=1, keepdims=True), 1e-6), 3, axis=1)  # [S, 3P], sums 3
        drawn = self.drawn(background_cells.reshape(-1, 3), tint)
        # |picture - drawn|^2 in the weighted norm, expanded into matrix products over all assets
        cross = np.einsum("vsp,ap->vsa", picture_cells * share, drawn, optimize=True)
        squares = (picture_cells**2 * share).sum(axis=2)[..., None] - 2 * cross + share @ (drawn**2).T
        return squares.min(axis=1).reshape(len(pictures), 2, self.size).min(axis=1) / 3

    def nearest(
        self, pictures: np.ndarray, background: np.ndarray, weight: np.ndarray, box: Rect, tint: np.ndarray
    ) -> np.ndarray:
        """Index of the nearest asset of each picture, int [V]. Arguments: see ``distances``."""
        return self.distances(pictures, background, weight, box, tint).argmin(axis=1)


def _cells(values: np.ndarray, weight: np.ndarray, box: Rect, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means of [V, H, W, 3] over the cells of the shifted box, [V, S, 3P], and the cells' weights [S, P].

    S: all pairs of a vertical and a horizontal shift.
    """
    left, top, width, height = box
    down = np.concatenate([area_matrix(top + s, top + s + height, CELLS, weight.shape[0]) for s in shifts])
    across = np.concatenate([area_matrix(left + s, left + s + width, CELLS, weight.shape[1]) for s in shifts])
    grid = (len(shifts), CELLS, len(shifts), CELLS)
    share = (down @ weight @ across.T).reshape(grid).transpose(0, 2, 1, 3).reshape(len(shifts) ** 2, -1)
    rows = np.tensordot(down, values * weight[..., None], axes=(1, 1))  # [s p, V, W, 3]
    sums = np.tensordot(rows, across, axes=(2, 1)).transpose(1, 2, 0, 3)  # [V, 3, s p, s q]
    cells = sums.reshape(len(values), 3, *grid).transpose(0, 2, 4, 3, 5, 1).reshape(len(values), *share.shape, 3)
    return (cells / np.maximum(share, 1e-3)[..., None]).reshape(len(values), len(share), -1), share
