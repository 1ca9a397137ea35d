"""Lessons: closed scenes in plain words, which teach one after the other what a pair asks for at once.

    choose       one of two or three alike references is shown, and only its number tells which
    plain_pair   two things, each by its number alone, in the same words for every scene of a relation
    plain_three  a person and a thing, in such words
    plain_four   a person and two things, in such words

In the words of the composition set a pair asks for the number of a reference, for the meaning of the relation and for
the reading of hundreds of paraphrases at once, and a network learns none of them from it. Lessons are not in that set
(``scenes.TASKS``): training mixtures name them. In lessons of persons any object is worn: the few hats are soon known
by sight, without a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .backgrounds import sample_background
from .catalogue import Split
from .emoji import Bank
from .layout import ALONE, OBJECT, PERSON
from .scene import Item, Scene
from .scenes import Draw, compose3, compose4, pair, scene_rng

LESSON_CODE = 200
"""Of the first lesson, in the seed of a scene: closed and open tasks come before."""

THREE, LARGE = 0.3, 0.4
"""Shares of scenes with three to choose from, and of large objects among those."""

PLAIN_PLACES = {"centre": "in the middle", "left": "on the left", "right": "on the right"}
PLAIN_PAIRS = {
    "left": "{o} on the left and {p} on the right",
    "right": "{p} on the left and {o} on the right",
    "front": "{o} in front of {p}",
    "behind": "{p} in front of {o}",
    "top": "{o} on top of {p}",
}
PLAIN_AROUND = {
    "hold": "holding {o}",
    "wear": "wearing {o}",
    "left": "with {o} on the left",
    "right": "with {o} on the right",
    "front": "with {o} in front",
    "behind-left": "with {o} behind on the left",
    "behind-right": "with {o} behind on the right",
}
"""By relation; as in ``wording``, ``o`` is the thing that has it, and ``p`` the other one."""


def choose(draw: Draw) -> list[Item]:
    """Two or three objects of different families in one place; the first is shown."""
    where = draw.choice(["centre", "left", "right"])
    count = 3 if draw.rng.random() < THREE else 2
    anchor = replace(ALONE[where], size=PERSON if draw.rng.random() < LARGE else OBJECT)
    items: list[Item] = []
    for _ in range(count):
        items.append(draw.item(draw.object("", [item.asset for item in items]), where, anchor))
    return items


def any_around(compose: Callable[[Draw], list[Item]]) -> Callable[[Draw], list[Item]]:
    """Compose a person with things, and put any objects of different families in the things' stead."""

    def composed(draw: Draw) -> list[Item]:
        items = compose(draw)
        options, taken = draw.bank.objects(draw.split), set[str]()
        for index, item in enumerate(items[1:], start=1):
            left = [asset for asset in options if asset.family not in taken]
            asset = left[int(draw.rng.integers(len(left)))]
            taken.add(asset.family)
            items[index] = draw.item(asset, item.relation, item.anchor)
        return items

    return composed


LESSONS: dict[str, Callable[[Draw], list[Item]]] = {
    "choose": choose,
    "plain_pair": pair,
    "plain_three": any_around(compose3),
    "plain_four": any_around(compose4),
}


def make_lesson(bank: Bank, split: Split, seed: int, index: int, *, task: str, size: int = 128) -> Scene:
    """Scene ``index`` of the endless list of a seed, split and lesson. Raises ValueError for an unknown split."""
    state, rng = scene_rng(split, seed, index, LESSON_CODE + list(LESSONS).index(task))
    draw = Draw(bank, split, rng)
    background = sample_background(rng)
    items = tuple(LESSONS[task](draw))
    shown = 1 if task == "choose" else len(items)
    scene = Scene(items[:shown], background, (), "", task=task, size=size, seed=state, spares=items[shown:])
    return plainly_reworded(scene, rng)


def plainly_reworded(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same picture with a new order of the references."""
    order = tuple(int(source) for source in rng.permutation(len(scene.items) + 1 + len(scene.spares)))
    return replace(scene, order=order, instruction=plain_words(scene.task, scene.items, order))


def plain_words(task: str, items: Sequence[Item], order: Sequence[int]) -> str:
    """The instruction of a lesson: kinds and numbers in place of names, and one sentence for each relation."""
    first, *others = [f"the {item.asset.kind} from image {order.index(i) + 1}" for i, item in enumerate(items)]
    relations = [item.relation for item in items]
    if task == "choose":
        things = f"{first} {PLAIN_PLACES[relations[0]]}"
    elif task == "plain_pair":
        things = PLAIN_PAIRS[relations[1]].format(p=first, o=others[0])
    else:
        around = [PLAIN_AROUND[r].format(o=name) for r, name in zip(relations[1:], others, strict=True)]
        things = ", ".join([first, *around])
    return f"Show {things}, in the scene of image {order.index(len(items)) + 1}."
