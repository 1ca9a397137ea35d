"""Open scenes: each is one of its answers, which differ in what the words leave open and in nothing else."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from trainers.nano.emoji import Bank
from trainers.nano.open_scenes.answers import OPEN_TASKS, REGIONS, answers, pictures_of
from trainers.nano.open_scenes.drawing import LEAST_ASYMMETRY, any_reworded, make_any_scene, make_open_scene
from trainers.nano.render import render
from trainers.nano.scene import LIGHTS, Scene
from trainers.nano.scenes import TASKS, make_scene


def scenes(bank: Bank, task: str, count: int = 12, split: str = "heldout") -> list[Scene]:
    return [make_open_scene(bank, split, 4, index, task=task) for index in range(count)]  # type: ignore[arg-type]


def difference(first: Image.Image, second: Image.Image) -> float:
    return float(np.abs(np.asarray(first, np.float32) - np.asarray(second, np.float32)).mean())


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("task", OPEN_TASKS)
def test_a_scene_is_one_of_its_answers_and_all_share_words_and_references(bank: Bank, task: str, split: str) -> None:
    for scene in scenes(bank, task, split=split):
        options = answers(scene)
        assert scene in options
        assert {one.instruction for one in options} == {scene.instruction}
        samples = [render(bank, one) for one in options]
        for sample in samples[1:]:
            assert [r.tobytes() for r in sample.references] == [r.tobytes() for r in samples[0].references]
        shown = {sample.target.tobytes() for sample in samples}
        assert len(shown) == len(options)


def test_every_answer_comes_about_as_often(bank: Bank) -> None:
    drawn = Counter(answers(scene).index(scene) for scene in scenes(bank, "open_light", 150))
    assert set(drawn) == set(range(len(LIGHTS)))
    assert min(drawn.values()) > 25


def test_tasks_come_in_their_shares(bank: Bank) -> None:
    drawn = Counter(make_open_scene(bank, "train", 3, index).task for index in range(600))
    for task, share in OPEN_TASKS.items():
        assert abs(drawn[task] / 600 - share) < 0.07, task


def test_words_say_nothing_of_what_is_open(bank: Bank) -> None:
    told = {"open_side": r"\b(left|right)\b", "open_light": r"\b(evening|night|sunset|dark)\b"}
    for task, words in told.items():
        for scene in scenes(bank, task, 30):
            text = scene.instruction.lower()
            for item in scene.items:
                text = text.replace(item.asset.name.lower(), "")
            assert not re.search(words, text), scene.instruction


def test_the_number_of_a_reference_is_in_the_words_and_an_open_background_has_none(bank: Bank) -> None:
    for task in OPEN_TASKS:
        for scene in scenes(bank, task):
            shown = len(scene.items) + (task != "open_background")
            assert sorted(scene.order) == list(range(shown))
            numbers = sorted(int(one) for one in re.findall(r"image (\d)", scene.instruction))
            assert numbers == list(range(1, shown + 1)), scene.instruction


def test_sides_are_mirrored_places(bank: Bank) -> None:
    for scene in scenes(bank, "open_side"):
        left, right = answers(scene)
        assert [item.relation for item in (left.items[1], right.items[1])] == ["left", "right"]
        assert left.items[1].anchor.x < left.items[0].anchor.x
        assert right.items[1].anchor.x > right.items[0].anchor.x


def test_a_mirrored_thing_is_the_mirror_image(bank: Bank) -> None:
    for scene in scenes(bank, "open_mirror"):
        plain, *_, mirrored = answers(scene)
        assert all(item.mirror for item in mirrored.items)
        assert not any(item.mirror for item in plain.items)
        assert all(bank.asymmetry(item.asset) >= LEAST_ASYMMETRY for item in scene.items)
        masks = [render(bank, one).placements[0].mask for one in (plain, mirrored)]
        if scene.items[0].anchor.x == 0.5 and len(scene.items) == 1:
            assert np.abs(masks[0][:, ::-1] - masks[1]).mean() < 0.08


def test_places_of_a_region_lie_in_it_one_token_apart(bank: Bank) -> None:
    for scene in scenes(bank, "open_region", 20):
        lefts = [render(bank, one).placements[0].box for one in answers(scene)]
        middles = [(box[0] + box[2]) / 2 for box in lefts]
        region = scene.items[0].relation
        assert len(middles) == len(REGIONS[region])
        assert np.allclose(np.diff(middles), 16, atol=1.5)
        if region != "anywhere":
            assert all((middle < 64) == (region == "left-half") for middle in middles)


def test_a_named_place_has_few_pictures(bank: Bank) -> None:
    for scene in scenes(bank, "open_background"):
        assert {one.background for one in answers(scene)} == set(pictures_of(scene.background.kind))
        assert len(set(pictures_of(scene.background.kind))) == 4


def test_light_is_on_the_background_and_mildly_on_things(bank: Bank) -> None:
    for scene in scenes(bank, "open_light", 4):
        day, _, night = (render(bank, one) for one in answers(scene))
        assert np.asarray(night.background).mean() < 0.7 * np.asarray(day.background).mean()
        assert day.references[0].tobytes() == night.references[0].tobytes()
        assert difference(day.target, night.target) > 5


def test_new_words_leave_the_picture_as_it_is(bank: Bank) -> None:
    for task in OPEN_TASKS:
        scene = scenes(bank, task, 1)[0]
        again = [any_reworded(scene, np.random.default_rng(k)) for k in range(6)]
        assert all(
            (one.items, one.background, one.light) == (scene.items, scene.background, scene.light) for one in again
        )
        assert len({one.instruction for one in again}) > 2


def test_closed_tasks_are_drawn_as_ever(bank: Bank) -> None:
    for task in (None, *TASKS):
        assert make_any_scene(bank, "train", 3, 5, task=task) == make_scene(bank, "train", 3, 5, task=task)
        assert answers(make_scene(bank, "train", 3, 5, task=task)) == (make_scene(bank, "train", 3, 5, task=task),)


def test_unknown_tasks_are_refused(bank: Bank) -> None:
    with pytest.raises(ValueError, match="'open_door'"):
        make_open_scene(bank, "train", 0, 0, task="open_door")
