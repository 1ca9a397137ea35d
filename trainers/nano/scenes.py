"""Random scenes: assets, places, relations, the order of the references, and the instruction, from a seed.

Pixels are drawn by ``render.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import wording
from .backgrounds import CANONICAL, Background, Colour, sample_background
from .catalogue import Asset, Split
from .emoji import Bank
from .layout import ALONE, OBJECT, PAIRS, PERSON, ROWS, SMALL, Anchor, around, composable, person_anchor, portable
from .scene import SQUARE, Edit, Item, Look, Scene, Shape

TASKS: dict[str, float] = {
    "compose3": 0.38,
    "compose2": 0.20,
    "pair": 0.12,
    "compose4": 0.11,
    "compose5": 0.025,
    "compose6": 0.025,
    "move": 0.04,
    "remove": 0.03,
    "recolour": 0.03,
    "replace_background": 0.04,
}
EDITS = ("move", "remove", "recolour", "replace_background")
SPLIT_CODES: dict[Split, int] = {"train": 0, "heldout": 1, "all": 2}

GENERIC_SHARE = 0.3  # instructions that say "object" and "person" only
OTHER_SHAPE_SHARE = 0.12  # background references that are 4:3 or 3:4
PLAIN_PAPER_SHARE = 0.25  # references on a pastel colour instead of white

# Colours that an edit names.
COLOURS: dict[str, Colour] = {
    "red": (235, 40, 45),
    "orange": (255, 140, 30),
    "yellow": (255, 220, 40),
    "green": (50, 190, 70),
    "blue": (50, 110, 245),
    "purple": (150, 70, 225),
    "pink": (255, 120, 190),
    "white": (250, 250, 250),
}
COLOUR_WORDS = frozenset(COLOURS) | {"black", "brown", "gold", "silver", "bronze", "blond", "polar"}


class Draw:
    """The random choices of one scene."""

    def __init__(self, bank: Bank, split: Split, rng: np.random.Generator) -> None:
        self.bank, self.split, self.rng = bank, split, rng

    def choice(self, options: Sequence[str], weights: Sequence[float] | None = None) -> str:
        p = None if weights is None else np.asarray(weights) / np.sum(weights)
        return options[int(self.rng.choice(len(options), p=p))]

    def person(self, relations: Sequence[str] = ()) -> Asset:
        """Draw a person that fits the relations: a design first, then one of its skin tones."""
        designs = [
            tones
            for tones in self.bank.designs("person", self.split)
            if composable(tones[0])
            and (tones[0].can_hold or "hold" not in relations)
            and (tones[0].can_wear or "wear" not in relations)
        ]
        tones = designs[self.rng.integers(len(designs))]
        return tones[self.rng.integers(len(tones))]

    def object(self, relation: str = "", taken: Sequence[Asset] = ()) -> Asset:
        """Draw an object that fits the relation: hats for heads only, and no family twice."""
        families = {asset.family for asset in taken}
        options = [
            asset
            for asset in self.bank.objects(self.split)
            if asset.is_hat == (relation == "wear")
            and (relation != "hold" or portable(asset))
            and asset.family not in families
        ]
        return options[self.rng.integers(len(options))]

    def look(self, asset: Asset) -> Look:
        """Draw an augmentation, milder for persons; no new hue if the name states a colour, none outside training."""
        if self.split != "train":
            return Look()
        rng = self.rng
        hue_share = 0.3 if asset.kind == "person" else 0.6
        recoloured = rng.random() < hue_share and not COLOUR_WORDS & set(asset.name.replace("-", " ").split())
        return Look(
            hue=float(rng.random()) if recoloured else 0.0,
            saturation=float(rng.uniform(0.8, 1.2)),
            brightness=float(rng.uniform(0.9, 1.08)),
            stretch=float(rng.uniform(0.88, 1.14)),
        )

    def item(self, asset: Asset, relation: str, anchor: Anchor) -> Item:
        rng = self.rng
        paper: Colour = (255, 255, 255)
        if rng.random() < PLAIN_PAPER_SHARE:
            red, green, blue = rng.integers(215, 250, 3).tolist()
            paper = (red, green, blue)
        return Item(asset, self.look(asset), relation, anchor, paper, float(rng.uniform(0.91, 0.95)))

    def items_around_person(self, relations: Sequence[str], size: float = OBJECT) -> list[Item]:
        """A person as item 0 and one object per relation."""
        # A person steps aside for one thing beside or before them.
        shift = {"left": 0.64, "right": 0.36, "front": 0.4}.get(relations[0], 0.5) if len(relations) == 1 else 0.5
        person = self.person(relations)
        # A head alone leaves room for its hat.
        height = OBJECT if person.pose == "head" and "wear" in relations else PERSON
        items = [self.item(person, "centre", person_anchor(height, shift))]
        for relation in relations:
            taken = [item.asset for item in items]
            items.append(self.item(self.object(relation, taken), relation, around(relation, size)))
        return items


def compose2(draw: Draw) -> list[Item]:
    where = draw.choice(["centre", "left", "right"], [2, 1, 1])
    if draw.rng.random() < 0.55:
        return [draw.item(draw.person(), where, person_anchor(x=ALONE[where].x))]
    return [draw.item(draw.object(), where, replace(ALONE[where], size=PERSON))]


def compose3(draw: Draw) -> list[Item]:
    relations = ["hold", "wear", "left", "right", "front", "behind-left", "behind-right"]
    relation = draw.choice(relations, [0.28, 0.14, 0.16, 0.16, 0.12, 0.07, 0.07])
    return draw.items_around_person([relation])


def pair(draw: Draw) -> list[Item]:
    """Two objects; the second is the one with the relation: 'the cup left of the guitar' gives guitar, cup."""
    relation = draw.choice(list(PAIRS))
    first, second = PAIRS[relation]
    base = draw.item(draw.object(), "base", first)
    return [base, draw.item(draw.object("", [base.asset]), relation, second)]


def compose4(draw: Draw) -> list[Item]:
    side = draw.choice(["left", "right"])
    options = [["wear", "hold"], ["wear", side], ["hold", side], ["left", "right"], ["wear", "front"]]
    relations = options[int(draw.rng.choice(5, p=[0.3, 0.2, 0.2, 0.2, 0.1]))]
    return draw.items_around_person(relations, SMALL if relations == ["left", "right"] else OBJECT)


def compose5(draw: Draw) -> list[Item]:
    if draw.rng.random() < 0.25:
        return rows(draw, 4)
    options = [["left", "right", "front"], ["left", "right", "hold"], ["wear", "left", "right"]]
    return draw.items_around_person(options[draw.rng.integers(3)], SMALL)


def compose6(draw: Draw) -> list[Item]:
    if draw.rng.random() < 0.4:
        return rows(draw, 5)
    chest = draw.choice(["hold", "front"])
    return draw.items_around_person(["wear", chest, "left", "right"], SMALL)


def rows(draw: Draw, count: int) -> list[Item]:
    """Objects only, in a back and a front row."""
    items: list[Item] = []
    for relation, anchor in ROWS[count].items():
        taken = [item.asset for item in items]
        items.append(draw.item(draw.object("", taken), relation, anchor))
    return items


COMPOSERS = {
    "compose2": compose2,
    "compose3": compose3,
    "pair": pair,
    "compose4": compose4,
    "compose5": compose5,
    "compose6": compose6,
}


def edit_items(draw: Draw, task: str) -> list[Item]:
    """Items before an edit: one item, or a person and an object beside them."""
    if draw.rng.random() < 0.35 and task != "remove":
        where = draw.choice(["left", "centre", "right"])
        if task == "recolour" or draw.rng.random() < 0.5:
            return [draw.item(draw.object(), where, ALONE[where])]
        return [draw.item(draw.person(), where, person_anchor(x=ALONE[where].x))]
    person = draw.item(draw.person(), "centre", person_anchor())
    side = draw.choice(["left", "right"])
    return [person, draw.item(draw.object(), side, around(side))]


def draw_edit(draw: Draw, task: str, items: Sequence[Item], background: Background) -> Edit:
    """Draw the change: of the object, of a lone item, or for removal of either."""
    last = len(items) - 1
    if task == "remove":
        return Edit("remove", int(draw.rng.integers(len(items))))
    if task == "recolour":
        return Edit("recolour", last, colour=draw.choice(list(COLOURS)))
    if task == "replace_background":
        others = [phrase for phrase, there in CANONICAL.items() if there.kind != background.kind]
        return Edit("replace_background", background=CANONICAL[draw.choice(others)])
    item = items[last]
    places = [place for place in (ALONE if last == 0 else ("left", "right")) if place != item.relation]
    place = draw.choice(places)
    x = ALONE[place].x if last == 0 else around(place).x
    return Edit("move", last, replace(item.anchor, x=x))


def scene_rng(split: Split, seed: int, index: int, task_code: int) -> tuple[int, np.random.Generator]:
    """Seed of a scene and its generator. Raises ValueError for an unknown split."""
    if split not in SPLIT_CODES:
        raise ValueError(f"split must be one of {sorted(SPLIT_CODES)}, got {split!r}")
    state = np.random.SeedSequence([seed, index, SPLIT_CODES[split], task_code]).generate_state(1, np.uint64)
    return int(state[0]), np.random.default_rng(int(state[0]))


def make_scene(bank: Bank, split: Split, seed: int, index: int, *, task: str | None = None, size: int = 128) -> Scene:
    """Scene ``index`` of the endless list that ``seed`` and ``split`` define; ``task`` overrides the drawn one.

    Raises ValueError for an unknown task or split.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {task!r}")
    state, rng = scene_rng(split, seed, index, list(TASKS).index(task) + 1 if task else 0)
    draw = Draw(bank, split, rng)
    drawn = draw.choice(list(TASKS), list(TASKS.values()))
    task = task or drawn
    background = sample_background(rng)
    generic = bool(rng.random() < GENERIC_SHARE)
    common: dict[str, Any] = {"task": task, "size": size, "seed": state}
    if task in EDITS:
        items = edit_items(draw, task)
        edit = draw_edit(draw, task, items, background)
        words = wording.edit_instruction(items, edit, generic, rng)
        return Scene(tuple(items), background, (), words, edit=edit, **common)
    items = COMPOSERS[task](draw)
    order = tuple(int(source) for source in rng.permutation(len(items) + 1))
    shapes = ((4, 3), (3, 4))
    shape = shapes[rng.integers(2)] if rng.random() < OTHER_SHAPE_SHARE else (1, 1)
    words = wording.compose_instruction(task, items, background, order, generic, rng)
    return Scene(tuple(items), background, order, words, background_shape=shape, **common)


def reworded(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same picture with a new order of the references and a new instruction."""
    generic = bool(rng.random() < GENERIC_SHARE)
    if scene.edit:
        return replace(scene, instruction=wording.edit_instruction(scene.items, scene.edit, generic, rng))
    order = tuple(int(source) for source in rng.permutation(len(scene.items) + 1))
    words = wording.compose_instruction(scene.task, scene.items, scene.background, order, generic, rng)
    return replace(scene, order=order, instruction=words)


def shaped(scene: Scene, shape: Shape) -> Scene:
    """The scene in a picture of this shape; in one of two, the background's reference has it too."""
    if shape == SQUARE:
        return scene
    return replace(scene, shape=shape, background_shape=scene.background_shape if scene.seed % 2 else shape)


def corpus(bank: Bank, n: int, seed: int) -> Iterator[str]:
    """``n`` instructions of the training split, for a tokenizer."""
    return (make_scene(bank, "train", seed, index).instruction for index in range(n))
