"""Controls change what they are named after and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from trainers.nano.controls import (
    CONTROLS,
    background_alone,
    can_swap_references,
    object_swapped,
    positions_shuffled,
    recomposed,
    references_swapped,
)
from trainers.nano.emoji import Bank
from trainers.nano.hidden_variance import hidden_share
from trainers.nano.render import Placement, Sample, render
from trainers.nano.scene import Scene
from trainers.nano.scenes import EDITS, TASKS, make_scene


def scene_of(bank: Bank, task: str, index: int = 0) -> Scene:
    return make_scene(bank, "heldout", 21, index, task=task)


def centres(sample: Sample) -> list[float]:
    return [(place.box[0] + place.box[2]) / 2 for place in sample.placements]


def overlap(a: Placement, b: Placement) -> float:
    """Intersection over union of two masks."""
    return float(np.minimum(a.mask, b.mask).sum() / np.maximum(a.mask, b.mask).sum())


@pytest.mark.parametrize("task", TASKS)
def test_every_control_keeps_references_and_words(bank: Bank, task: str) -> None:
    scene = scene_of(bank, task)
    truth = render(bank, scene)
    for name, control in CONTROLS.items():
        if name == "references_swapped" and not can_swap_references(scene):
            continue
        sample = control(bank, scene)
        assert [one.tobytes() for one in sample.references] == [one.tobytes() for one in truth.references], name
        assert sample.instruction == truth.instruction
        changed = sample.target.tobytes() != truth.target.tobytes()
        assert changed != (name == "recomposed" and task in EDITS), name


def test_the_background_alone_shows_nothing(bank: Bank) -> None:
    sample = background_alone(bank, scene_of(bank, "compose3"))
    assert sample.target.tobytes() == sample.background.tobytes()
    assert all(place.mask.max() == 0 for place in sample.placements)


@pytest.mark.parametrize("task", ["compose2", "compose3", "pair", "compose4"])
def test_recomposed_stays_near_and_shuffled_goes_far(bank: Bank, task: str) -> None:
    near, far = [], []
    for index in range(10):
        scene = scene_of(bank, task, index)
        truth = render(bank, scene).placements
        near += map(overlap, truth, recomposed(bank, scene).placements)
        far += map(overlap, truth, positions_shuffled(bank, scene).placements)
    assert np.mean(near) > np.mean(far) + 0.25


def test_a_swapped_object_is_another_of_its_kind_in_its_place(bank: Bank) -> None:
    for task in ("compose2", "compose3", "compose5", "remove"):
        scene = scene_of(bank, task, 1)
        truth, swapped = render(bank, scene), object_swapped(bank, scene)
        pairs = list(zip(truth.placements, swapped.placements, strict=True))
        different = [(old, new) for old, new in pairs if old.asset != new.asset]
        assert len(different) == 1
        (old, new) = different[0]
        assert old.asset.kind == new.asset.kind
        assert old.asset.split == new.asset.split
        assert old.asset.family != new.asset.family


def test_swapped_references_exchange_identities(bank: Bank) -> None:
    scene = scene_of(bank, "pair")
    truth, swapped = render(bank, scene), references_swapped(bank, scene)
    assert [place.asset for place in swapped.placements] == [place.asset for place in truth.placements][::-1]
    assert abs(centres(truth)[0] - centres(swapped)[0]) < 12


def test_one_thing_alone_cannot_be_swapped(bank: Bank) -> None:
    scene = scene_of(bank, "compose2")
    assert not can_swap_references(scene)
    with pytest.raises(ValueError, match="two items"):
        references_swapped(bank, scene)


def test_the_hidden_share_is_small_and_zero_for_edits(bank: Bank) -> None:
    share = hidden_share(bank, "heldout", "compose2", scenes=12)
    assert 0.01 < share.shares["all"] < 0.35
    assert share.shares["flip"] < share.shares["all"]
    assert hidden_share(bank, "heldout", "move", scenes=4).shares["all"] == 0
