"""The place in a reference that each target token shows: the same colours lie there, for every task, size and shape."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from PIL import Image

from trainers.data.endless.token_sources import AMBIGUOUS, owners_of, token_centres, token_shares, token_sources
from trainers.nano.emoji import SUBSET, Bank
from trainers.nano.open_scenes.drawing import make_any_scene
from trainers.nano.render import hidden_of, render
from trainers.nano.scene import Scene, Shape
from trainers.nano.scenes import EDITS

COMPOSITIONS = ("compose2", "compose3", "pair", "compose4", "compose6", "open_mirror", "plain_four", "choose")


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.open(SUBSET)


def colours(picture: Image.Image, places: np.ndarray) -> np.ndarray:
    """Mean colours [N, 3] of 5 x 5 pixels around places, shares of the width and height."""
    values = np.pad(np.asarray(picture, np.float64), ((2, 2), (2, 2), (0, 0)), "edge")
    columns, rows = (places * picture.size).astype(int).clip(0, np.array(picture.size) - 1).T
    around = [values[rows + i, columns + j] for i in range(5) for j in range(5)]
    return np.mean(around, axis=0)


def pairs(bank: Bank, scenes: Iterable[Scene]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Colours of target tokens, of the places that they show, and of these places shuffled within a source; of items
    and backgrounds, each source less its mean, so that light and the choice of the source count for nothing. Only
    tokens that show an item alone: at the centre of the others something else may lie."""
    rng, kinds = np.random.default_rng(0), {"items": [], "background": []}
    for scene in scenes:
        sample = render(bank, scene)
        sources, centres = token_sources(bank, scene, sample, owners_of(scene, sample)), token_centres(scene)
        for source in set(sources[:, 0].astype(int)) - {AMBIGUOUS}:
            mine = sources[:, 0] == source
            if not scene.edit and source < len(scene.items):
                mine &= token_shares(sample)[source] > 0.95
            if not mine.any():
                continue
            target = colours(sample.target, centres[mine] / scene.canvas)
            shown = colours(sample.references[scene.reference_of(source)], sources[mine, 1:])
            shuffled = shown[rng.permutation(len(shown))]
            kind = "background" if source == len(scene.items) else "items"
            kinds[kind].append([values - values.mean(0) for values in (target, shown, shuffled)])
    return {kind: tuple(map(np.concatenate, zip(*parts, strict=True))) for kind, parts in kinds.items() if parts}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


@pytest.mark.parametrize(("size", "shape"), [(128, (1, 1)), (192, (1, 1)), (128, (1, 2)), (192, (4, 3))])
def test_the_reference_has_the_tokens_colours_there(bank: Bank, size: int, shape: Shape) -> None:
    scenes = [
        make_any_scene(bank, "train", 3, index, task=task, size=size, shape=shape)
        for task in COMPOSITIONS
        for index in range(4)
    ]
    assert any(hidden.flip for scene in scenes for hidden in hidden_of(scene, None))
    for target, shown, shuffled in pairs(bank, scenes).values():
        assert correlation(target, shown) > 0.9
        assert correlation(target, shuffled) < 0.5


@pytest.mark.parametrize("task", EDITS)
def test_an_edit_shows_the_picture_before(bank: Bank, task: str) -> None:
    scenes = [make_any_scene(bank, "train", 4, index, task=task, size=192) for index in range(8)]
    ((target, shown, shuffled),) = pairs(bank, scenes).values()
    assert correlation(target, shown) > (0.8 if task == "recolour" else 0.95)
    assert correlation(target, shuffled) < 0.5


def test_sources_are_the_owners_and_edits_have_tokens_without_one(bank: Bank) -> None:
    for task in COMPOSITIONS:
        scene = make_any_scene(bank, "train", 5, 0, task=task)
        sample = render(bank, scene)
        sources = token_sources(bank, scene, sample, owners_of(scene, sample))
        assert sources[:, 0].tolist() == owners_of(scene, sample).tolist()
        assert 0 <= sources[:, 1:].min() <= sources[:, 1:].max() <= 1 or (sources[:, 0] == AMBIGUOUS).any()
    for task in EDITS:
        scene = make_any_scene(bank, "train", 5, 1, task=task)
        sample = render(bank, scene)
        certain = token_sources(bank, scene, sample, owners_of(scene, sample))[:, 0] == 0
        assert certain.sum() > 5
        assert certain.all() == (task == "recolour")


def test_a_moved_item_is_looked_for_where_it_was(bank: Bank) -> None:
    """The tokens of the item, and no other ones, have places that are not their own."""
    scene = make_any_scene(bank, "train", 4, 2, task="move", size=192)
    assert scene.edit is not None
    assert scene.edit.item is not None
    sample = render(bank, scene)
    sources, centres = token_sources(bank, scene, sample, owners_of(scene, sample)), token_centres(scene) / scene.canvas
    elsewhere = (np.abs(sources[:, 1:] - centres).max(1) > 0.05) & (sources[:, 0] == 0)
    mask = sample.placements[scene.edit.item].mask
    for row, column in (centres[elsewhere] * 12).astype(int)[:, ::-1]:
        assert mask[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].mean() >= 0.5
    assert elsewhere.sum() >= 4
