"""Labelled grids: the pictures' pixels, the labels' places, labels that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from unipic_core.run.grid import labelled_grid

COLOURS = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]
ROWS = [[Image.new("RGB", (64, 48), colour) for colour in row] for row in COLOURS]
WHITE = (255, 255, 255)


def inked(grid: Image.Image, box: tuple[int, int, int, int]) -> bool:
    """True if something is drawn there."""
    return bool((np.asarray(grid.crop(box)) < 128).all(axis=-1).any())


def test_pictures_and_labels_are_where_they_belong() -> None:
    columns, lines = ["seed 1", "seed 2", "seed 3"], ["steps 4", "steps 8"]
    grid = labelled_grid(ROWS, columns, lines)
    left, top = grid.width - 3 * 64 - 2 * 4, grid.height - 2 * 48 - 4
    for j, row in enumerate(ROWS):
        for i, picture in enumerate(row):
            x, y = left + i * 68, top + j * 52
            assert np.array_equal(grid.crop((x, y, x + 64, y + 48)), picture)
            assert inked(grid, (x, 0, x + 64, top)), "above each column"
        assert inked(grid, (0, top + j * 52, left, top + j * 52 + 48)), "left of each row"
    assert not inked(grid, (0, 0, left, top))


def test_without_labels_there_is_no_margin() -> None:
    assert labelled_grid(ROWS).size == (3 * 64 + 2 * 4, 2 * 48 + 4)
    assert labelled_grid(ROWS[:1], title="a title").height > 48


def test_other_labels_give_another_grid() -> None:
    grids = [labelled_grid(ROWS[:1], ["a", "b", label]).tobytes() for label in ("c", "d")]
    assert grids[0] != grids[1]


def test_a_long_label_is_cut_and_stays_in_its_column() -> None:
    grid = labelled_grid(ROWS, ["seed 18446744073709551615 and more", "b", "c"])
    assert grid.width == 3 * 64 + 2 * 4
    assert not inked(grid, (64, 0, 68, 20))


@pytest.mark.parametrize(
    ("rows", "columns", "lines", "message"),
    [
        ([], (), (), "rows of equal length"),
        ([ROWS[0], ROWS[1][:2]], (), (), "rows of equal length, got .3, 2."),
        (ROWS, ("a",), (), "a label for each of 3 columns and 2 rows, got 1 and 0"),
        ([[ROWS[0][0], Image.new("RGB", (8, 8))]], (), (), "pictures of one size"),
    ],
)
def test_what_does_not_fit(rows: object, columns: tuple[str, ...], lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled_grid(rows, columns, lines)  # type: ignore[arg-type]
