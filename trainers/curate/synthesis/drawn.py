"""The composition set's compositor on curated sources: scene, instruction and target from a row's slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unipic_core.errors import UniPicError

from ...judges.vlm import png_of
from ...nano.backgrounds import Background, sample_background
from ...nano.layout import OBJECT, PERSON, SMALL, around, person_anchor
from ...nano.render import Sample, render
from ...nano.scene import Item, Scene
from ...nano.wording import compose_instruction
from ..errors import CurateError
from ..manifest.shards import Row
from ..stages.drawn_sources import bank_of, item_of, scene_of

RELATIONS = {"head": "wear", "hands": "hold", "left": "left", "right": "right", "front": "front", "chest": "front"}
GENERIC_SHARE = 0.3
MANY = 2
"""Things around a person from which all are small."""


def draw_target(row: Row, size: int, attempt: int) -> bytes:
    """PNG of the target; a later attempt differs in the hidden scale, flip and offset. Raises UniPicError."""
    bank = bank_of(size)
    return png_of(render(bank, scene_of_row(row, size), hidden_seed=attempt - 1 if attempt > 1 else None).target)


def truth_of(row: Row, size: tuple[int, int]) -> Sample:
    """Draw the compositor's picture of a row. Raises UniPicError for sources that are not drawn."""
    side = round((size[0] * size[1]) ** 0.5)
    return render(bank_of(side), scene_of_row(row, side))


def scene_of_row(row: Row, size: int) -> Scene:
    """Scene of a row of the rules conflicts/drawn.yaml, or of a decomposed drawn photograph."""
    if "scene" in row:
        scene = scene_of({"scene": [*row["scene"][:4], size]})[0]
        return replace(scene, instruction=row.get("instruction", ""))
    items, order, ground = layout(row)
    seed = int(row["composition"][:12], 16)
    ground = ground or sample_background(np.random.default_rng(seed))
    task = f"compose{len(row['sources'])}"
    return Scene(tuple(items), ground, tuple(order), row.get("instruction", ""), task=task, size=size, seed=seed)


def layout(row: Row) -> tuple[list[Item], list[int], Background | None]:
    """Items (the person first), the item that each source shows (len(items): the background), and the background."""
    sources: Sequence[Row] = row["sources"]
    for source in sources:
        if "drawn" not in source:
            raise UniPicError(
                f"the drawn compositor cannot place {source['path']}, which is not of the composition set"
            )
    persons = [i for i, source in enumerate(sources) if source["subject"] == "person"]
    things = [i for i, source in enumerate(sources) if source["subject"] == "object"]
    grounds = [i for i, source in enumerate(sources) if source["subject"] == "background"]
    if len(persons) != 1 or len(grounds) > 1:
        raise UniPicError("the drawn compositor places one person on at most one background; use the rules 'drawn'")
    relations = [RELATIONS[row["slots"][i][0]] for i in things]
    items = [_person(sources[persons[0]], relations)]
    small = sum(relation != "wear" for relation in relations) >= MANY
    for i, relation in zip(things, relations, strict=True):
        anchor = around(relation, SMALL if small else OBJECT)
        items.append(replace(item_of(sources[i]["drawn"]), relation=relation, anchor=anchor))
    place = {index: at for at, index in enumerate([*persons, *things])}
    order = [place.get(i, len(items)) for i in range(len(sources))]
    ground = Background(*sources[grounds[0]]["drawn"]["background"]) if grounds else None
    return items, order, ground


def _person(source: dict[str, Any], relations: Sequence[str]) -> Item:
    """Item of the person, who steps aside for a single thing beside or before them; a head leaves room for a hat."""
    item = item_of(source["drawn"])
    shift = {"left": 0.64, "right": 0.36, "front": 0.4}.get(relations[0], 0.5) if len(relations) == 1 else 0.5
    height = OBJECT if item.asset.pose == "head" and "wear" in relations else PERSON
    return replace(item, anchor=person_anchor(height, shift))


def drawn_instruction(row: Row, rng: np.random.Generator) -> str:
    """Instruction in the composition set's wording. Raises CurateError without a background."""
    try:
        scene = scene_of_row(row, 128)
    except UniPicError as error:
        raise CurateError(str(error)) from None
    if len(scene.items) not in scene.order:
        raise CurateError("prompt.kind drawn needs a background in every row; add it to pair.always")
    generic = bool(rng.random() < GENERIC_SHARE)
    return compose_instruction(scene.task, scene.items, scene.background, scene.order, generic, rng)
