"""Instructions of open scenes: as the closed ones', but silent about one thing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backgrounds import Background
from ..scene import Item
from ..wording import ALONE_SCENES, FRAMES, PAIR_SCENES, SCENES, numbered_names, numbered_place, pick, sentence

BESIDE = ("{p} with {o} beside it", "{o} next to {p}", "{p} and {o} side by side", "{p} beside {o}")
PLACES = {
    "left-half": ("{o} somewhere in the left half", "{o} at any place in the left half"),
    "right-half": ("{o} somewhere in the right half", "{o} at any place in the right half"),
    "anywhere": ("{o} somewhere in the picture", "{o} at any place in the picture"),
}
WAYS = ("{scene}, facing either way", "{scene}, turned to any side")
LIGHT = ("{scene}, in any light", "{scene}, at any time of the day")
NAMED = {
    "room": "in a room",
    "field": "in a field",
    "beach": "on a beach",
    "sea": "on the open sea",
    "sky": "above the clouds",
    "table": "on a table",
    "city": "in a city",
    "snow": "in the snow",
    "desert": "in a desert",
    "forest": "in a forest",
    "stage": "on a stage",
    "garden": "in a garden",
}
"""Places without a reference."""

NAMED_FRAMES = ("Show {scene}, {place}.", "Draw {scene}, {place}.", "{place}, show {scene}.", "{scene}, {place}.")


def open_instruction(
    task: str,
    items: Sequence[Item],
    background: Background,
    order: Sequence[int],
    generic: bool,
    rng: np.random.Generator,
) -> str:
    """One sentence in which every source that has a reference carries its number, counted from 1."""
    names = numbered_names(items, order, generic, rng)
    scene = _scene(task, items, names, rng)
    if task == "open_background":
        return sentence(pick(NAMED_FRAMES, rng).format(scene=scene, place=NAMED[background.kind]))
    ground, place = numbered_place(background, order.index(len(items)) + 1, generic, rng)
    return sentence(pick(FRAMES, rng).format(scene=scene, place=place, ground=ground))


def _scene(task: str, items: Sequence[Item], names: Sequence[str], rng: np.random.Generator) -> str:
    """A noun phrase: what is there, and where as far as the task tells."""
    if task == "open_side":
        return pick(BESIDE, rng).format(p=names[0], o=names[1])
    relation = items[-1].relation
    if task == "open_region":
        return pick(PLACES[relation], rng).format(o=names[0])
    if len(items) == 1:
        text = pick(ALONE_SCENES[relation], rng).format(o=names[0])
    else:
        told = SCENES if items[0].asset.kind == "person" else PAIR_SCENES
        text = pick(told[relation], rng).format(p=names[0], o=names[1])
    endings = {"open_mirror": WAYS, "open_light": LIGHT}.get(task, ("{scene}",))
    return pick(endings, rng).format(scene=text)
