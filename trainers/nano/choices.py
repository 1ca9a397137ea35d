"""Scenes of the task `choose`: one of two or three alike references is shown, and only its number tells which.

Two things of a pair are told apart by number and relation at once. Here the relation plays no part, so that a network
learns first which one "image 2" is. The task is not in the composition set (``scenes.TASKS``): mixtures name it.
"""

from __future__ import annotations

from dataclasses import replace

from .backgrounds import sample_background
from .catalogue import Split
from .emoji import Bank
from .layout import ALONE, OBJECT, PERSON
from .scene import Item, Scene
from .scenes import Draw, reworded, scene_rng

CHOOSE = "choose"
CHOICE_CODE = 200
"""In the seed of a scene: closed and open tasks come before."""

THREE, LARGE = 0.3, 0.4
"""Shares of scenes with three to choose from, and of large objects."""


def make_choice(bank: Bank, split: Split, seed: int, index: int, *, size: int = 128) -> Scene:
    """Choice scene ``index`` of the endless list of a seed and a split. Raises ValueError for an unknown split."""
    state, rng = scene_rng(split, seed, index, CHOICE_CODE)
    draw = Draw(bank, split, rng)
    background = sample_background(rng)
    item, *spares = _alike(draw)
    scene = Scene((item,), background, (), "", task=CHOOSE, size=size, seed=state, spares=tuple(spares))
    return reworded(scene, rng)


def _alike(draw: Draw) -> list[Item]:
    """Two or three objects of different families in one place; the first is shown."""
    where = draw.choice(["centre", "left", "right"])
    count = 3 if draw.rng.random() < THREE else 2
    anchor = replace(ALONE[where], size=PERSON if draw.rng.random() < LARGE else OBJECT)
    items: list[Item] = []
    for _ in range(count):
        items.append(draw.item(draw.object("", [item.asset for item in items]), where, anchor))
    return items
