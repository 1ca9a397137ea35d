"""Boxes by rules, from prompts in English and Chinese."""

from __future__ import annotations

import pytest

from unipic_core.conditioning.influence import Region
from unipic_core.conditioning.layout_rules import BEHIND, BOTTOM, FRONT, LEFT, MIDDLE, RIGHT, TOP, ruled_regions
from unipic_core.conditioning.picture_numbers import mentions


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Place the tent from image 2 right of the man from image 1, in the desert of image 3.", {2: RIGHT, 1: LEFT}),
        ("Show the cat of image 1 on the left and the dog of image 2 on the right.", {1: LEFT, 2: RIGHT}),
        ("the lamp from image 2 above the table from image 1", {2: TOP, 1: BOTTOM}),
        ("the cat (image 1) under the table (image 2)", {1: BOTTOM, 2: TOP}),
        ("the dog from image 1 in front of the house from image 2", {1: FRONT, 2: BEHIND}),
        ("the tree from image 3 behind the car from image 1", {3: BEHIND, 1: FRONT}),
        ("Show the panda from image 1 in the middle, on the beach of image 2.", {1: MIDDLE}),
        ("On the left image 2; at the bottom image 1.", {2: LEFT, 1: BOTTOM}),
        ("Give the man from image 1 a bright hat.", {}),
        ("left of image 1", {}),
        ("the man from image 1 left of the dog from image 7", {1: LEFT}),
        ("图2的帐篷放在图1的人的右边", {2: RIGHT, 1: LEFT}),
        ("图一在左边，图片 2 在右侧。", {1: LEFT, 2: RIGHT}),
        ("把图3放在中间", {3: MIDDLE}),
    ],
)
def test_prompts(prompt: str, expected: dict[int, Region]) -> None:
    assert ruled_regions(prompt, 3) == expected


def test_several_places_are_cut_with_each_other() -> None:
    corner = ruled_regions("image 1 on the left, image 1 at the top", 1)
    assert corner == {1: Region(0, 0, 500, 500)}
    assert ruled_regions("image 1 on the left, image 1 on the right", 1) == {1: RIGHT}


def test_mentions() -> None:
    assert mentions("put image 12 and 图二 on photo #3") == [(4, 12), (17, 2), (23, 3)]
