"""Open scenes from a seed, and scenes of either kind by their task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..backgrounds import sample_background
from ..catalogue import Asset, Split
from ..emoji import Bank
from ..layout import ALONE, PERSON, SMALL, Anchor
from ..lessons import LESSONS, make_lesson, plainly_reworded
from ..scene import SQUARE, Item, Scene, Shape
from ..scenes import GENERIC_SHARE, TASKS, Draw, compose2, compose3, make_scene, pair, reworded, scene_rng, shaped
from .answers import OPEN_TASKS, REGIONS, answers, pictures_of
from .wording import open_instruction

OPEN_CODE = 100
"""Of the first open task, in the seed of a scene: the closed ones come before."""

LEAST_ASYMMETRY = 0.16
"""Of things that face a side (`Bank.asymmetry`)."""

COMPOSERS: tuple[Callable[[Draw], list[Item]], ...] = (compose2, compose3, pair)
"""Of what stands in scenes whose light or background is open."""


ANY_TASK = (*TASKS, *OPEN_TASKS, *LESSONS)
"""Tasks of `make_any_scene`."""


def make_any_scene(
    bank: Bank, split: Split, seed: int, index: int, *, task: str | None = None, size: int = 128, shape: Shape = SQUARE
) -> Scene:
    """`make_scene`, whose `task` may be an open one or a lesson and whose target has any `shape`.

    Raises ValueError as `make_scene` does.
    """
    if task in LESSONS:
        return shaped(make_lesson(bank, split, seed, index, task=task, size=size), shape)
    make = make_open_scene if task in OPEN_TASKS else make_scene
    return shaped(make(bank, split, seed, index, task=task, size=size), shape)


def any_reworded(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same picture from a new order of the references and new words, whichever kind it is."""
    if scene.task in LESSONS:
        return plainly_reworded(scene, rng)
    return _worded(scene, rng) if scene.task in OPEN_TASKS else reworded(scene, rng)


def make_open_scene(
    bank: Bank, split: Split, seed: int, index: int, *, task: str | None = None, size: int = 128
) -> Scene:
    """Open scene `index` of the endless list that `seed` and `split` define: one of its answers, drawn at random.

    task: overrides the drawn one. Raises ValueError for an unknown task or split.
    """
    if task is not None and task not in OPEN_TASKS:
        raise ValueError(f"task must be one of {', '.join(OPEN_TASKS)}; got {task!r}")
    code = OPEN_CODE + (list(OPEN_TASKS).index(task) + 1 if task else 0)
    state, rng = scene_rng(split, seed, index, code)
    draw = Draw(bank, split, rng)
    drawn = draw.choice(list(OPEN_TASKS), list(OPEN_TASKS.values()))
    task = task or drawn
    background = sample_background(rng)
    if task == "open_background":
        background = pictures_of(background.kind)[0]
    elif task == "open_light":
        background = replace(background, mood="day")
    items = tuple(_items(draw, task))
    scene = Scene(items, background, (), "", task=task, size=size, seed=state)
    options = answers(scene)
    return _worded(options[int(rng.integers(len(options)))], rng)


def _worded(scene: Scene, rng: np.random.Generator) -> Scene:
    """With references in a drawn order, and words."""
    generic = bool(rng.random() < GENERIC_SHARE)
    shown = len(scene.items) + (scene.task != "open_background")
    order = tuple(int(source) for source in rng.permutation(shown))
    words = open_instruction(scene.task, scene.items, scene.background, order, generic, rng)
    return replace(scene, order=order, instruction=words)


def _items(draw: Draw, task: str) -> list[Item]:
    """The things of one answer."""
    if task == "open_side":
        return draw.items_around_person(["left"]) if draw.rng.random() < 0.5 else _two_things(draw)
    if task == "open_region":
        asset = draw.person() if draw.rng.random() < 0.4 else draw.object()
        region = draw.choice(list(REGIONS), [1, 1, 2])
        return [draw.item(asset, region, Anchor(REGIONS[region][0], size=SMALL))]
    if task == "open_mirror":
        return _facing(draw)
    return COMPOSERS[draw.rng.integers(len(COMPOSERS))](draw)


def _two_things(draw: Draw) -> list[Item]:
    first = draw.item(draw.object(), "base", Anchor())
    return [first, draw.item(draw.object("", [first.asset]), "left", Anchor())]


def _facing(draw: Draw) -> list[Item]:
    """One thing in the middle or on a side, or two beside each other; all of them face a side."""
    if draw.rng.random() < 0.5:
        where = draw.choice(["left", "centre", "right"])
        return [draw.item(_turned(draw), where, replace(ALONE[where], size=PERSON))]
    items = pair(draw)
    first = replace(items[0], asset=_turned(draw))
    return [first, replace(items[1], asset=_turned(draw, first.asset))]


def _turned(draw: Draw, *taken: Asset) -> Asset:
    """An object that faces a side; of a bank with few, the one that does most."""
    options = [one for one in draw.bank.objects(draw.split) if not one.is_hat]
    options = [one for one in options if one.family not in {other.family for other in taken}]
    facing = [one for one in options if draw.bank.asymmetry(one) >= LEAST_ASYMMETRY]
    facing = facing or [max(options, key=draw.bank.asymmetry)]
    return facing[int(draw.rng.integers(len(facing)))]
