"""Drawn samples: the same bytes from the same seed, honest boxes and masks, edits that change what they say."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from trainers.nano.emoji import Bank
from trainers.nano.layout import lattice_step
from trainers.nano.render import (
    HIDDEN_FLIP,
    HIDDEN_OFFSET,
    HIDDEN_SCALE,
    Hidden,
    hidden_of,
    in_square,
    look_matrix,
    render,
    square,
)
from trainers.nano.render import place as boxes_of
from trainers.nano.scene import Look
from trainers.nano.scenes import EDITS, TASKS, make_scene, shaped


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float64)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_bytes(bank: Bank, task: str) -> None:
    first, second = (render(bank, make_scene(bank, "train", 4, 2, task=task)) for _ in range(2))
    assert first.target.tobytes() == second.target.tobytes()
    assert [picture.tobytes() for picture in first.references] == [picture.tobytes() for picture in second.references]


@pytest.mark.parametrize("task", TASKS)
def test_shapes_modes_and_numbers_of_references(bank: Bank, task: str) -> None:
    for index in range(6):
        scene = make_scene(bank, "train", 5, index, task=task)
        sample = render(bank, scene)
        assert sample.target.size == sample.background.size == (128, 128)
        assert len(sample.references) == (1 if task in EDITS else len(scene.items) + 1)
        assert {picture.mode for picture in (sample.target, *sample.references)} == {"RGB"}
        assert {picture.size for picture in sample.references} <= {(128, 128), (128, 96), (96, 128)}


@pytest.mark.parametrize("task", TASKS)
def test_masks_lie_in_their_boxes_and_never_sum_to_more_than_one(bank: Bank, task: str) -> None:
    for index in range(6):
        sample = render(bank, make_scene(bank, "heldout", 6, index, task=task))
        masks = [place.mask for place in sample.placements]
        assert all(mask.dtype == np.float32 and mask.shape == (128, 128) for mask in masks)
        assert np.sum(masks, axis=0).max() <= 1 + 1e-5
        for place in sample.placements:
            left, top, right, bottom = place.box
            assert 0 <= left < right <= 128
            assert 0 <= top < bottom <= 128
            outside = place.mask.copy()
            outside[top:bottom, left:right] = 0
            assert outside.max() == 0


def test_every_item_stays_partly_visible(bank: Bank) -> None:
    for index in range(80):
        for place in render(bank, make_scene(bank, "train", 7, index)).placements:
            assert place.mask.sum() > 80, (index, place.asset)


@pytest.mark.parametrize("task", ["compose2", "compose3", "compose6"])
def test_placements_name_the_reference_that_shows_their_asset(bank: Bank, task: str) -> None:
    scene = make_scene(bank, "heldout", 8, 1, task=task)
    for place in render(bank, scene).placements:
        assert place.reference is not None
        assert scene.items[scene.order[place.reference]].asset == place.asset


def test_outside_the_items_the_target_is_the_background_but_for_shadows(bank: Bank) -> None:
    for index in range(10):
        sample = render(bank, make_scene(bank, "heldout", 9, index, task="compose2"))
        change = (pixels(sample.target) - pixels(sample.background)).max(axis=2)
        assert change[sample.placements[0].mask == 0].max() <= 1  # a shadow only darkens


def test_a_hidden_seed_moves_things_and_nothing_else(bank: Bank) -> None:
    scene = make_scene(bank, "train", 10, 0, task="compose3")
    truth, again = render(bank, scene), render(bank, scene, hidden_seed=1)
    assert truth.target.tobytes() != again.target.tobytes()
    assert [picture.tobytes() for picture in truth.references] == [picture.tobytes() for picture in again.references]
    assert truth.background.tobytes() == again.background.tobytes()


def test_hidden_variation_is_bounded(bank: Bank) -> None:
    hidden = [one for index in range(200) for one in hidden_of(make_scene(bank, "train", 11, index), index)]
    assert all(abs(one.scale - 1) <= HIDDEN_SCALE for one in hidden)
    assert all(max(abs(one.dx), abs(one.dy)) <= HIDDEN_OFFSET for one in hidden)
    assert max(abs(one.scale - 1) for one in hidden) > 0.9 * HIDDEN_SCALE
    assert abs(np.mean([one.flip for one in hidden]) - HIDDEN_FLIP) < 0.06


@pytest.mark.parametrize("task", EDITS)
def test_an_edit_changes_its_picture_and_hides_nothing(bank: Bank, task: str) -> None:
    scene = make_scene(bank, "heldout", 12, 1, task=task)
    sample = render(bank, scene)
    assert np.abs(pixels(sample.target) - pixels(sample.references[0])).mean() > 0.5
    assert sample.target.tobytes() == render(bank, scene, hidden_seed=5).target.tobytes()


def test_removing_leaves_the_other_item(bank: Bank) -> None:
    scene = make_scene(bank, "heldout", 13, 0, task="remove")
    assert scene.edit is not None
    assert scene.edit.item is not None
    left = [place.asset for place in render(bank, scene).placements]
    assert left == [item.asset for index, item in enumerate(scene.items) if index != scene.edit.item]


def test_the_same_words_give_the_same_background(bank: Bank) -> None:
    seen: dict[object, bytes] = {}
    for index in range(40):
        scene = make_scene(bank, "train", 14, index, task="replace_background")
        assert scene.edit is not None
        drawn = render(bank, scene).background.tobytes()
        assert seen.setdefault(scene.edit.background, drawn) == drawn


def test_identity_look_is_the_identity_and_a_full_turn_too() -> None:
    np.testing.assert_allclose(look_matrix(Look()), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(look_matrix(Look(hue=1.0)), np.eye(3), atol=1e-9)
    grey = look_matrix(Look(hue=0.37)) @ np.ones(3)
    np.testing.assert_allclose(grey, np.ones(3), atol=0.01)  # turning the hue leaves grey alone


@pytest.mark.parametrize("task", ["compose2", "compose3", "pair", "compose4", "compose6", "move"])
def test_squares_stand_on_the_lattice_as_their_references_show_them(bank: Bank, task: str) -> None:
    """Without hidden variation an item lies in its square as in its reference, and squares move by whole tokens."""
    for index in range(10):
        scene = make_scene(bank, "heldout", 15, index, task=task)
        for item, box in zip(scene.items, boxes_of(bank, scene, [Hidden()] * len(scene.items)), strict=True):
            if item.anchor.align in ("head", "top"):
                continue
            own = in_square(bank, item, item.anchor.size * 128)
            left, top = box[0] - own[0], box[1] - own[1]
            assert (left / 16, top / 16) == pytest.approx((round(left / 16), round(top / 16)))
            assert box[2:] == pytest.approx(own[2:])
            assert 0 <= left <= 128 * (1 - item.anchor.size)
            assert 0 <= top <= 128 * (1 - item.anchor.size)


def test_other_sizes_are_drawn_as_well(bank: Bank) -> None:
    sample = render(bank, make_scene(bank, "train", 16, 0, task="compose3", size=64))
    assert sample.target.size == (64, 64)
    assert sample.placements[0].mask.shape == (64, 64)


@pytest.mark.parametrize("size", [128, 192])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 2), (2, 1)])
def test_targets_of_any_shape_hold_all_items(bank: Bank, size: int, shape: tuple[int, int]) -> None:
    for index in range(12):
        scene = shaped(make_scene(bank, "heldout", 6, index, size=size), shape)
        sample = render(bank, scene)
        width, height = scene.canvas
        assert sample.target.size == sample.background.size == (width, height)
        assert abs(np.log(width / height / (shape[0] / shape[1]))) < 0.25
        assert 0.85 < width * height / size**2 < 1.2
        for place in sample.placements:
            assert place.mask.shape == (height, width)
            left, top, right, bottom = place.box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
        if scene.edit:
            assert sample.references[0].size == (width, height)


def test_two_things_stand_side_by_side_where_it_is_narrow(bank: Bank) -> None:
    for index in range(20):
        scene = shaped(make_scene(bank, "train", 8, index, task="pair"), (1, 2))
        if scene.items[1].relation in ("left", "right"):
            first, second = (place.mask for place in render(bank, scene).placements)
            assert np.minimum(first, second).max() < 0.5
            assert all(mask.sum() > 200 for mask in (first, second))


@pytest.mark.parametrize(("size", "step"), [(128, 16), (192, 16), (256, 32), (64, 8)])
def test_items_stand_on_whole_tokens(bank: Bank, size: int, step: int) -> None:
    assert lattice_step(size) == step
    for index in range(10):
        scene = make_scene(bank, "train", 9, index, task="pair", size=size)
        x, y = square(scene, scene.items[0])
        assert x % step == 0
        assert y % step == 0
