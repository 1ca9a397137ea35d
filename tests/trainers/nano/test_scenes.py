"""Scenes before they are drawn: determinism, conflicts, and words that agree with the order of the references."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from trainers.nano import wording
from trainers.nano.emoji import Bank
from trainers.nano.scene import Look, Scene
from trainers.nano.scenes import EDITS, TASKS, corpus, make_scene

MANY = 150


def scenes(bank: Bank, split: str = "train", count: int = MANY, task: str | None = None) -> list[Scene]:
    return [make_scene(bank, split, 3, index, task=task) for index in range(count)]  # type: ignore[arg-type]


def named_numbers(scene: Scene) -> dict[int, str]:
    """Image number to the noun that the instruction gives it."""
    found = re.findall(r"the ([^,]+?) (?:from|in|of|shown in) image (\d)", scene.instruction.lower())
    return {int(number): noun.rsplit(" the ", 1)[-1] for noun, number in found}


def test_the_same_seed_gives_the_same_scene(bank: Bank) -> None:
    assert scenes(bank, count=40) == scenes(bank, count=40)


def test_another_seed_index_or_split_gives_another_scene(bank: Bank) -> None:
    base = make_scene(bank, "train", 1, 1)
    others = [make_scene(bank, "train", 2, 1), make_scene(bank, "train", 1, 2), make_scene(bank, "heldout", 1, 1)]
    assert all(other.seed != base.seed for other in others)


def test_tasks_come_in_their_shares(bank: Bank) -> None:
    count = 1200
    drawn = Counter(scene.task for scene in scenes(bank, count=count))
    for task, share in TASKS.items():
        assert abs(drawn[task] / count - share) < 0.05, task


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_drawn_from_either_split_of_the_subset(bank: Bank, task: str, split: str) -> None:
    for scene in scenes(bank, split, 12, task):
        assert scene.task == task
        assert {item.asset.split for item in scene.items} == {split}


@pytest.mark.parametrize(("task", "references"), [("compose2", 2), ("compose3", 3), ("pair", 3), ("compose6", 6)])
def test_the_order_is_a_permutation_of_items_and_background(bank: Bank, task: str, references: int) -> None:
    for scene in scenes(bank, count=30, task=task):
        assert sorted(scene.order) == list(range(references))
        assert len(scene.items) == references - 1
    assert len({scene.order for scene in scenes(bank, count=30, task=task)}) > 1


@pytest.mark.parametrize("task", [task for task in TASKS if task not in EDITS])
def test_the_numbers_in_the_words_are_those_of_the_references(bank: Bank, task: str) -> None:
    for scene in scenes(bank, count=40, task=task):
        expected = {scene.order.index(index) + 1: item.asset for index, item in enumerate(scene.items)}
        nouns = named_numbers(scene)
        assert sorted(nouns) == list(range(1, len(scene.order) + 1)), scene.instruction
        for number, asset in expected.items():
            assert nouns[number] in (asset.name.lower(), asset.kind), scene.instruction
        ground = nouns[scene.order.index(len(scene.items)) + 1]
        assert ground in (scene.background.place.name, "scene"), scene.instruction


def test_some_instructions_name_nothing_but_numbers(bank: Bank) -> None:
    generic = [bool(set(named_numbers(scene).values()) <= {"object", "person", "scene"}) for scene in scenes(bank)]
    assert 0.15 < sum(generic) / len(generic) < 0.6


def test_nobody_wears_two_hats_and_only_hats_are_worn(bank: Bank) -> None:
    for scene in scenes(bank, count=400):
        worn = [item for item in scene.items if item.relation == "wear"]
        assert len(worn) <= 1
        assert all(item.asset.is_hat for item in worn)
        assert all(scene.items[0].asset.can_wear for _ in worn)
        assert sum(item.asset.is_hat for item in scene.items) == len(worn)


def test_no_one_with_a_prop_is_given_something_to_hold(bank: Bank) -> None:
    holders = [scene.items[0].asset for scene in scenes(bank, count=400) if "hold" in [i.relation for i in scene.items]]
    assert holders
    assert all(asset.can_hold and not asset.holds_prop for asset in holders)


def test_nothing_appears_twice_and_scenery_is_left_out(bank: Bank) -> None:
    for scene in scenes(bank, count=300):
        assert len({item.asset.family for item in scene.items}) == len(scene.items)
        assert all(item.asset.pose != "scenery" for item in scene.items)


def test_items_are_large_enough_to_be_learned(bank: Bank) -> None:
    smallest = {"compose2": 0.75, "compose3": 0.5, "pair": 0.5, "compose4": 0.375, "compose5": 0.375, "compose6": 0.375}
    for task, least in smallest.items():
        for scene in scenes(bank, count=15, task=task):
            assert all(item.anchor.size >= least for item in scene.items if item.relation != "wear"), scene


def test_looks_vary_in_training_only(bank: Bank) -> None:
    assert all(item.look == Look() for scene in scenes(bank, "heldout") for item in scene.items)
    assert len({item.look for scene in scenes(bank, count=30) for item in scene.items}) > 30


def test_a_stated_colour_keeps_its_hue(bank: Bank) -> None:
    stated = [
        i for s in scenes(bank, count=600) for i in s.items if {"red", "gold", "pink"} & set(i.asset.name.split())
    ]
    assert stated
    assert all(item.look.hue == 0 for item in stated)


def test_there_are_eight_paraphrases_of_every_edit_and_frame() -> None:
    for templates in (wording.MOVES, wording.REMOVALS, wording.RECOLOURINGS, wording.REPLACEMENTS, wording.FRAMES):
        assert len(set(templates)) >= 8


def test_the_corpus_is_the_instructions_of_the_training_split(bank: Bank) -> None:
    words = list(corpus(bank, 20, seed=3))
    assert words == [scene.instruction for scene in scenes(bank, count=20)]
    assert all(text[0].isupper() and text.endswith(".") for text in words)


def test_unknown_tasks_and_splits_are_refused(bank: Bank) -> None:
    with pytest.raises(ValueError, match="'compose9'"):
        make_scene(bank, "train", 0, 0, task="compose9")
    with pytest.raises(ValueError, match="'test'"):
        make_scene(bank, "test", 0, 0)  # type: ignore[arg-type]
