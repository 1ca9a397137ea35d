"""Sources out of the composition set: persons, things and backgrounds with transparency, and drawn photographs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from ...digests import digest
from ...judges.vlm import png_of
from ...nano.backgrounds import Background, draw, sample_background
from ...nano.catalogue import Asset, Split
from ...nano.emoji import Bank
from ...nano.layout import composable, person_anchor, portable
from ...nano.render import Sample, in_square, look_matrix, render, sprite_at
from ...nano.scene import Item, Look, Scene
from ...nano.scenes import COLOUR_WORDS, make_scene
from ..config import IngestConfig
from .listing import Entry

SCENE_TASKS = ("compose2", "compose3", "compose4", "compose5", "compose6")
SALT = 4111


@lru_cache(maxsize=2)
def bank_of(size: int) -> Bank:
    """Pictures of the composition set, sharp up to this size."""
    return Bank.open(size=size)


def drawn_entries(config: IngestConfig, number: int, seed: int) -> Iterator[Entry]:
    """Entries of one set, in a fixed order. A thing that comes again has other colours."""
    bank, split = bank_of(config.size), config.split
    recipe: dict[str, Any]
    if config.kind == "drawn_scenes":
        for i in range(config.samples):
            recipe = {"scene": [split, seed, i, SCENE_TASKS[i % len(SCENE_TASKS)], config.size]}
            yield Entry(_path(number, recipe), "photograph", "photograph", f"scene {i}", draw=recipe)
        return
    persons = [one for one in bank.persons(split) if composable(one)]  # type: ignore[arg-type]
    objects = list(bank.objects(split))  # type: ignore[arg-type]
    for assets, count in ((persons, config.persons), (objects, config.objects)):
        order = np.random.default_rng([SALT, seed, number, len(assets)]).permutation(len(assets))
        for i in range(count):
            asset = assets[int(order[i % len(assets)])]
            recipe = {"asset": asset.key, "look": _look(asset, i // len(assets), seed, i), "size": config.size}
            yield Entry(_path(number, recipe), category_of(asset), asset.kind, asset.name, asset.family, draw=recipe)
    rng = np.random.default_rng([SALT, seed, number])
    for _ in range(config.backgrounds):
        ground = sample_background(rng)
        recipe = {"background": [ground.kind, ground.seed, ground.mood], "size": config.size}
        yield Entry(_path(number, recipe), "background", "background", ground.place.name, draw=recipe)


def _path(number: int, recipe: dict[str, Any]) -> str:
    """Path below the run's folder, by the recipe: manifests of earlier settings keep their pictures."""
    return f"drawn/{number}/{digest(recipe)}.png"


def category_of(asset: Asset) -> str:
    """Category of conflicts/drawn.yaml."""
    if asset.kind == "person":
        return "person with prop" if asset.holds_prop else "person"
    return "hat" if asset.is_hat else "small thing" if portable(asset) else "large thing"


def _look(asset: Asset, turn: int, seed: int, index: int) -> list[float]:
    """Colours of the turn-th picture of an asset: its own the first time."""
    if not turn:
        return [0.0, 1.0, 1.0]
    rng = np.random.default_rng([SALT, seed, index])
    coloured = not COLOUR_WORDS & set(asset.name.replace("-", " ").split())
    return [
        float(rng.uniform(0.15, 0.85)) if coloured else 0.0,
        float(rng.uniform(0.7, 1.2)),
        float(rng.uniform(0.85, 1.08)),
    ]


def draw_picture(recipe: dict[str, Any]) -> bytes:
    """PNG of one entry's recipe; equal recipes give equal bytes."""
    if "scene" in recipe:
        return png_of(scene_of(recipe)[1].target)
    if "background" in recipe:
        return png_of(draw(Background(*recipe["background"]), recipe["size"], recipe["size"]))
    item, bank = item_of(recipe), bank_of(recipe["size"])
    return png_of(cut_out(bank, item, recipe["size"]))


def item_of(recipe: dict[str, Any]) -> Item:
    """Item that a drawn source shows."""
    asset = bank_of(recipe["size"]).by_key[recipe["asset"]]
    hue, saturation, brightness = recipe["look"]
    return Item(asset, Look(hue, saturation, brightness), "centre", person_anchor())


def cut_out(bank: Bank, item: Item, size: int) -> Image.Image:
    """RGBA picture of an item alone, as the composition set's references place it."""
    left, top, width, height = in_square(bank, item, size)
    colours, alpha = sprite_at(bank, item, False, (width, height), look_matrix(item.look))
    picture = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    colours.putalpha(alpha)
    picture.paste(colours, (round(left), round(top)))
    return picture


def scene_of(recipe: dict[str, Any]) -> tuple[Scene, Sample]:
    """Scene of a drawn photograph, and its picture."""
    split, seed, index, task, size = recipe["scene"]
    checked: Split = split
    bank = bank_of(size)
    scene = make_scene(bank, checked, seed, index, task=task, size=size)
    return scene, render(bank, scene)
