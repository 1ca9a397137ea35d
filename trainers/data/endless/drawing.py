"""Endless scenes, each a pure function of (seed, index): drawing and encoding, with the source of every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unipic_core.model.vae import ImageVAE

from ...nano.emoji import Bank
from ...nano.open_scenes.drawing import make_any_scene
from ...nano.render import Sample, render
from ...nano.scene import Scene
from ...nano.scenes import TASKS
from ..encoding import encode_pictures
from ..rows import Row, make_row
from .token_sources import owners_of, token_sources

TASK_SALT, SHAPE_SALT = 8191, 131071

SHAPE_GROUP = 32
"""Consecutive scenes whose targets have one shape."""


@dataclass(frozen=True)
class EncodedScene:
    """Encoded scene as arrays, which pass between processes without files.

    target, sources: bfloat16 latents [C, h, w] as int16; vision: uint8 [H, W, 3] per source; owners: int8 [target
    tokens], the source (the index of an item, or the number of items for the background) or AMBIGUOUS; token_sources:
    float32 [target tokens, 3], see there. An edit has one source, the picture before, and only ambiguous owners.
    """

    scene: Scene
    target: np.ndarray
    sources: tuple[np.ndarray, ...]
    vision: tuple[np.ndarray, ...]
    owners: np.ndarray
    token_sources: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Image tokens of target and references."""
        return sum(latents.shape[1] * latents.shape[2] // 4 for latents in (self.target, *self.sources))


def draw_scene(
    bank: Bank,
    seed: int,
    index: int,
    size: int,
    mixture: Mapping[str, float],
    shapes: Mapping[str, float] | None = None,
) -> Scene:
    """Make scene `index` of the training split with a task drawn from the mixture (task -> weight; empty: TASKS).

    shapes: aspect ratio of the target, width x height, as "3x4", -> weight; empty: square. Each group of SHAPE_GROUP
    consecutive scenes has one shape, so that batches can have one.
    """
    task = weighted_choice(mixture or TASKS, TASK_SALT, seed, index)
    wide, high = weighted_choice(shapes or {"1x1": 1.0}, SHAPE_SALT, seed, index // SHAPE_GROUP).split("x")
    return make_any_scene(bank, "train", seed, index, task=task, size=size, shape=(int(wide), int(high)))


def weighted_choice(weights: Mapping[str, float], *seed: int) -> str:
    """Draw one of the names by weight."""
    share = np.array(list(weights.values())) / sum(weights.values())
    return list(weights)[np.random.default_rng(seed).choice(len(share), p=share)]


def encode_scenes(vae: ImageVAE, bank: Bank, scenes: Sequence[Scene], reference_budget: int) -> list[EncodedScene]:
    """Render and encode scenes in one VAE batch."""
    samples = [render(bank, scene) for scene in scenes]
    rows = [make_row(s.target, list(s.references), s.instruction, reference_budget) for s in samples]
    latents = iter(encode_pictures(vae, [picture for row in rows for picture in (row.target, *row.references)]))
    encoded = []
    for scene, sample, row in zip(scenes, samples, rows, strict=True):
        target, *references = (next(latents).view(torch.int16).numpy() for _ in range(1 + len(row.references)))
        encoded.append(_by_source(bank, scene, sample, row, target, references))
    return encoded


def _by_source(
    bank: Bank, scene: Scene, sample: Sample, row: Row, target: np.ndarray, references: Sequence[np.ndarray]
) -> EncodedScene:
    """Reorder references from the scene's display order to source order."""
    places = [scene.order.index(source) for source in range(len(scene.order))] or [0]
    sources = tuple(references[place] for place in places)
    vision = tuple(np.array(row.vision[place]) for place in places)  # Pillow's arrays cannot be written to
    owners = owners_of(scene, sample)
    shown = token_sources(bank, scene, sample, owners)
    return EncodedScene(scene, target, sources, vision, owners, shown)
