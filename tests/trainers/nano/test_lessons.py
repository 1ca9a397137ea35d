"""Lessons: one of several alike references is shown, and only its number tells which; pairs in plain words."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from trainers.data.endless.token_sources import AMBIGUOUS, owners_of
from trainers.nano.emoji import Bank
from trainers.nano.lessons import PLAIN_PAIRS
from trainers.nano.open_scenes.drawing import any_reworded, make_any_scene
from trainers.nano.render import render
from trainers.nano.scene import Scene


def scenes(bank: Bank, count: int = 30, split: str = "train", task: str = "choose") -> list[Scene]:
    return [make_any_scene(bank, split, 3, index, task=task) for index in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_spare_things_have_references_and_no_words(bank: Bank, split: str) -> None:
    drawn = scenes(bank, split=split)
    assert drawn == scenes(bank, split=split)
    for scene in drawn:
        shown = 2 + len(scene.spares)
        assert sorted(scene.order) == list(range(shown))
        named = {scene.order.index(source) + 1 for source in (0, 1)}  # thing and background
        assert {int(one) for one in re.findall(r"image (\d)", scene.instruction)} == named
        assert len({item.asset.family for item in (*scene.items, *scene.spares)}) == shown - 1
        assert len(render(bank, scene).references) == shown
    assert {len(scene.spares) for scene in drawn} == {1, 2}


def test_the_number_alone_decides_which_thing_is_shown(bank: Bank) -> None:
    """With a spare in the thing's stead, only the target and the thing's number change."""
    for scene in scenes(bank, 6):
        item, spare = scene.items[0], scene.spares[0]
        other = replace(scene, items=(spare,), spares=(item, *scene.spares[1:]))
        exchanged = replace(other, order=tuple({0: 2, 2: 0}.get(source, source) for source in scene.order))
        first, second = render(bank, scene), render(bank, exchanged)
        assert [one.tobytes() for one in first.references] == [one.tobytes() for one in second.references]
        assert first.target.tobytes() != second.target.tobytes()
        assert (spare.anchor, spare.relation) == (item.anchor, item.relation)


def test_new_words_keep_the_spare_things_unnamed(bank: Bank) -> None:
    scene = scenes(bank)[0]
    again = [any_reworded(scene, np.random.default_rng(k)) for k in range(8)]
    assert len({one.order for one in again}) > 1
    for one in again:
        assert (one.items, one.spares) == (scene.items, scene.spares)
        assert str(one.order.index(0) + 1) in one.instruction


def test_no_token_of_the_target_shows_a_spare_thing(bank: Bank) -> None:
    for scene in scenes(bank, 6):
        assert set(owners_of(scene, render(bank, scene)).tolist()) <= {0, 1, AMBIGUOUS}


def test_plain_pairs_name_their_things_by_number_alone(bank: Bank) -> None:
    drawn = scenes(bank, task="plain_pair")
    assert {scene.items[1].relation for scene in drawn} == set(PLAIN_PAIRS)
    for scene in drawn:
        first, second = (scene.order.index(source) + 1 for source in (0, 1))
        assert re.sub(r"\d", "N", scene.instruction).count("the object from image N") == 2
        told = re.findall(r"the object from image (\d)", scene.instruction)
        swapped = scene.items[1].relation in ("right", "behind")
        assert [int(one) for one in told] == ([first, second] if swapped else [second, first])
        again = any_reworded(scene, np.random.default_rng(1))
        assert again == replace(scene, order=again.order, instruction=again.instruction)


@pytest.mark.parametrize(("task", "things"), [("plain_three", 1), ("plain_four", 2)])
def test_plain_persons_have_their_things_in_the_order_of_the_items(bank: Bank, task: str, things: int) -> None:
    for scene in scenes(bank, task=task):
        told = re.findall(
            r"the (person|object|scene) (?:from|of) image (\d)|in the scene of image (\d)", scene.instruction
        )
        numbers = [int(one or other) for _, one, other in told]
        assert numbers == [scene.order.index(source) + 1 for source in range(things + 2)]
        words = {"hold": "holding", "wear": "wearing", "front": "in front"}
        relation = scene.items[1].relation
        assert words.get(relation, relation.split("-")[-1]) in scene.instruction


def test_any_object_is_worn_in_a_lesson(bank: Bank) -> None:
    """Where hats alone are worn, a network knows them by sight and needs no number."""
    drawn = scenes(bank, 60, task="plain_four")
    worn = [item.asset for scene in drawn for item in scene.items if item.relation == "wear"]
    assert len({asset.key for asset in worn}) > 5
    assert not all(asset.is_hat for asset in worn)
    assert all(len({item.asset.family for item in scene.items[1:]}) == 2 for scene in drawn)
    assert all(render(bank, scene).placements[1].mask.mean() > 0 for scene in drawn[:8])
