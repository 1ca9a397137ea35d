"""Source of each target token of a scene, and the place of it that the token shows, by the geometry of the drawing."""

from __future__ import annotations

import numpy as np
from PIL import Image

from unipic_core.conditioning.sequence import PIXELS_PER_TOKEN

from ...nano.emoji import Bank
from ...nano.render import Box, Rectangle, Sample, backdrop_size, edited, hidden_of, in_square, place
from ...nano.scene import Scene

AMBIGUOUS = -1
"""Owner of a target token that shows several sources; source of a token whose place is not certain."""

ITEM_SHARE, BACKGROUND_SHARE = 0.5, 0.85
"""Smallest share of a token that its item, or the background, must cover to own it."""

SHADOW = 0.1
"""Margin around an item, relative to its width, that holds its shadow (`render.cast_shadow`)."""

Points = np.ndarray
"""float64 [N, 2], x and y."""


def owners_of(scene: Scene, sample: Sample) -> np.ndarray:
    """Source shown by each target token: int8 [target tokens], row by row."""
    shares = token_shares(sample)
    owners = np.full(shares.shape[1], AMBIGUOUS, np.int8)
    if scene.edit:
        return owners
    if len(scene.items) in scene.order:  # a background that has no reference has no tokens to point to
        owners[1 - shares.sum(0) >= BACKGROUND_SHARE] = len(scene.items)
    for source, share in enumerate(shares):
        owners[share >= ITEM_SHARE] = source
    return owners


def token_shares(sample: Sample) -> np.ndarray:
    """Share of each target token that each item covers: float [items, target tokens]."""
    high, wide = (side // PIXELS_PER_TOKEN for side in (sample.target.height, sample.target.width))
    masks = np.stack([placement.mask for placement in sample.placements])
    pixels = masks.reshape(len(masks), high, PIXELS_PER_TOKEN, wide, PIXELS_PER_TOKEN)
    return pixels.mean((2, 4)).reshape(len(masks), -1)


def token_sources(bank: Bank, scene: Scene, sample: Sample, owners: np.ndarray) -> np.ndarray:
    """Source index, x and y of the place that each target token shows: float32 [target tokens, 3].

    x and y: shares of the width and height of the source's picture, at the token's centre. The source is AMBIGUOUS
    where `owners` are, those of `owners_of`; an edit's one source, 0, is the picture before. `sample`: the scene drawn
    by `render`.
    """
    centres = token_centres(scene)
    sources = np.full((len(centres), 3), AMBIGUOUS, np.float32)
    if scene.edit:
        _fill_edit(sources, bank, scene, sample, centres)
    else:
        _fill_composition(sources, bank, scene, owners, centres)
    sources[:, 1:] = sources[:, 1:].clip(0, 1)
    return sources


def token_centres(scene: Scene) -> Points:
    """Centres of the target's tokens in pixels, row by row."""
    wide, high = (side // PIXELS_PER_TOKEN for side in scene.canvas)
    rows, columns = np.divmod(np.arange(high * wide), wide)
    return (np.stack([columns, rows], axis=1) + 0.5) * PIXELS_PER_TOKEN


def _fill_composition(sources: np.ndarray, bank: Bank, scene: Scene, owners: np.ndarray, centres: Points) -> None:
    """Each item in the square of its reference, and the background in the middle of its picture."""
    sources[:, 0] = owners
    hidden = hidden_of(scene, None)
    boxes = place(bank, scene, hidden)
    for index, item in enumerate(scene.items):
        mine = owners == index
        x, y = _within(boxes[index], centres[mine]).T
        left, top, width, height = in_square(bank, item, 1.0)
        sources[mine, 1] = left + width * (1 - x if hidden[index].flip else x)
        sources[mine, 2] = top + height * y
    whole = np.array(backdrop_size(scene.background_shape, scene.canvas))
    mine = owners == len(scene.items)
    sources[mine, 1:] = (centres[mine] + (whole - scene.canvas) // 2) / whole


def _fill_edit(sources: np.ndarray, bank: Bank, scene: Scene, sample: Sample, centres: Points) -> None:
    """The same place of the picture before, but for a moved item and what the picture before does not show."""
    edit, canvas = scene.edit, np.array(scene.canvas)
    assert edit is not None
    sources[:, 0], sources[:, 1:] = 0, centres / canvas
    if edit.background is not None:
        sources[token_shares(sample).max(0) < ITEM_SHARE, 0] = AMBIGUOUS
    elif edit.item is not None and edit.colour is None:  # removed or moved
        hidden = hidden_of(scene, None)
        before = place(bank, scene, hidden)[edit.item]
        sources[_near(before, centres), 0] = AMBIGUOUS
        if edit.anchor is None:
            return
        moved, *_ = edited(scene, Image.new("RGB", (1, 1)), [np.eye(3)] * len(scene.items))
        after = place(bank, moved, hidden)[edit.item]
        sources[_near(after, centres), 0] = AMBIGUOUS
        mine = token_shares(sample)[edit.item] >= ITEM_SHARE
        left, top, width, height = _pixels(before)
        sources[mine, 0] = 0
        sources[mine, 1:] = (np.array([left, top]) + np.array([width, height]) * _within(after, centres[mine])) / canvas


def _pixels(box: Rectangle) -> Box:
    """Left, top, width and height in whole pixels, as `render.assemble` draws an item."""
    left, top, width, height = box
    return round(left), round(top), max(1, round(width)), max(1, round(height))


def _within(box: Rectangle, points: Points) -> Points:
    """Points as shares of a drawn box; a centre beside the item that covers most of its token goes to the edge."""
    left, top, width, height = _pixels(box)
    return ((points - (left, top)) / (width, height)).clip(0, 1)


def _near(box: Rectangle, centres: Points) -> np.ndarray:
    """Tokens that an item's box, with its shadow, touches: bool [N]."""
    left, top, width, height = box
    margin = SHADOW * width + PIXELS_PER_TOKEN / 2
    low, high = np.array([left, top]) - margin, np.array([left + width, top + height]) + margin
    return np.all((centres > low) & (centres < high), axis=1)
