"""Open scenes: their words leave one thing about the picture open, so that several pictures are right.

A scene is one of its answers, which differ in nothing but what is left open. Each task leaves one thing open:

    open_side        two things beside each other: which side the second is on
    open_mirror      which way one or two things face
    open_region      the place of a thing in a half of the picture, or in the whole of it
    open_light       the light of the place
    open_background  which picture of a named place it is: no reference shows it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from ..backgrounds import WITH_MOOD, Background
from ..layout import PAIRS, SMALL, Anchor, around, person_anchor
from ..scene import LIGHTS, Item, Scene

OPEN_TASKS: dict[str, float] = {
    "open_side": 0.3,
    "open_mirror": 0.15,
    "open_region": 0.2,
    "open_light": 0.1,
    "open_background": 0.25,
}

REGIONS: dict[str, tuple[float, ...]] = {
    "left-half": (0.1875, 0.3125, 0.4375),
    "right-half": (0.5625, 0.6875, 0.8125),
    "anywhere": (0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125),
}
"""Places (x of the middle) of a small thing: one step of the lattice apart."""

MOODS = ("day", "day", "sunset", "night")
FIRST_SEED = 100
Answers = tuple[Scene, ...]


def answers(scene: Scene) -> Answers:
    """Every scene that the words and references of an open one allow, itself among them; of a closed one itself."""
    return ANSWERS[scene.task](scene) if scene.task in ANSWERS else (scene,)


def either_side(scene: Scene) -> Answers:
    return tuple(replace(scene, items=beside(scene.items, side)) for side in ("left", "right"))


def beside(items: Sequence[Item], side: str) -> tuple[Item, ...]:
    """A person or thing, and a second one on this side of it."""
    first, second = items
    if first.asset.kind == "person":
        person = person_anchor(first.anchor.size, 0.64 if side == "left" else 0.36)
        return replace(first, anchor=person), replace(second, anchor=around(side), relation=side)
    there, here = PAIRS[side]
    return replace(first, anchor=there), replace(second, anchor=here, relation=side)


def either_way(scene: Scene) -> Answers:
    ways = product((False, True), repeat=len(scene.items))
    return tuple(
        replace(scene, items=tuple(replace(item, mirror=m) for item, m in zip(scene.items, way, strict=True)))
        for way in ways
    )


def any_place(scene: Scene) -> Answers:
    (item,) = scene.items
    anchors = [Anchor(x, size=SMALL) for x in REGIONS[item.relation]]
    return tuple(replace(scene, items=(replace(item, anchor=anchor),)) for anchor in anchors)


def any_light(scene: Scene) -> Answers:
    return tuple(replace(scene, light=light) for light in LIGHTS)


def any_picture(scene: Scene) -> Answers:
    return tuple(replace(scene, background=one) for one in pictures_of(scene.background.kind))


def pictures_of(kind: str) -> tuple[Background, ...]:
    """The few pictures of a place that open scenes show: outdoors two by day, one at sunset and one at night."""
    moods = MOODS if kind in WITH_MOOD else ("day",) * len(MOODS)
    return tuple(Background(kind, FIRST_SEED + number, mood) for number, mood in enumerate(moods))


ANSWERS = {
    "open_side": either_side,
    "open_mirror": either_way,
    "open_region": any_place,
    "open_light": any_light,
    "open_background": any_picture,
}
