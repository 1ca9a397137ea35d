"""Drawn places: deterministic, of any size, told apart by their words."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from trainers.nano.backgrounds import CANONICAL, PLACES, WITH_MOOD, Background, draw, sample_background


@pytest.mark.parametrize("kind", PLACES)
def test_every_place_draws_the_same_picture_twice_at_any_size(kind: str) -> None:
    background = Background(kind, 5)
    assert draw(background, 128, 128).tobytes() == draw(background, 128, 128).tobytes()
    assert draw(background, 90, 41).size == (90, 41)


@pytest.mark.parametrize("kind", PLACES)
def test_no_part_of_a_place_is_left_undrawn(kind: str) -> None:
    for seed in range(5):
        assert np.asarray(draw(Background(kind, seed), 64, 64)).max(axis=2).min() > 20


def test_seeds_and_moods_change_the_picture() -> None:
    plain = draw(Background("beach", 1), 64, 64).tobytes()
    assert plain != draw(Background("beach", 2), 64, 64).tobytes()
    assert plain != draw(Background("beach", 1, "sunset"), 64, 64).tobytes()


def test_the_places_of_the_words_differ_from_each_other() -> None:
    pictures = {phrase: np.asarray(draw(there, 64, 64), float) for phrase, there in CANONICAL.items()}
    for first, second in combinations(pictures, 2):
        assert np.abs(pictures[first] - pictures[second]).mean() > 8, (first, second)


def test_only_places_with_a_sky_have_a_mood() -> None:
    drawn = [sample_background(np.random.default_rng(seed)) for seed in range(300)]
    assert {background.kind for background in drawn} == set(PLACES)
    assert all(background.mood == "day" or background.kind in WITH_MOOD for background in drawn)
