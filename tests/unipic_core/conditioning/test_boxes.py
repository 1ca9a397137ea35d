"""Boxes as JSON: what is read, and one sentence for everything else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unipic_core.conditioning.boxes import EXAMPLE, MAX_ROWS, MAX_TEXT, parse_boxes, regions_of
from unipic_core.conditioning.influence import Influence, Region, checked_influences
from unipic_core.errors import UniPicError

BOX = Region(100, 500, 400, 900)
"""Of "bbox": [500, 100, 900, 400], which is top, left, bottom, right."""


@pytest.mark.parametrize(
    ("text", "regions"),
    [
        ("", {}),
        ("  \n", {}),
        ("[]", {}),
        (EXAMPLE, {2: BOX}),
        ('{"id": "<image_2>", "bbox": [500, 100, 900, 400], "desc": "a cup"}', {2: BOX}),
        ('[{"image": 3, "bbox": [500, 100, 900, 400]}]', {3: BOX}),
        ('[{"desc": "the cat of image 1", "bbox": [500, 100, 900, 400]}]', {1: BOX}),
        ('[{"label": "图2", "box_2d": [500, 100, 900, 400]}]', {2: BOX}),
        (
            '[{"type": "obj", "bbox": [500, 100, 900, 400], "desc": ""}, {"bbox": [0, 0, 1000, 500]}]',
            {1: BOX, 2: Region(0, 0, 500, 1000)},
        ),
        ('[{"id": "cat_1", "bbox": [500, 100, 900, 400]}]', {1: BOX}),
        (
            '[{"id": "image_3", "bbox": [0.5, 1.5, 2, 3]}, {"id": "image_1", "bbox": [500, 100, 900, 400]}]',
            {1: BOX, 3: Region(1.5, 0.5, 3, 2)},
        ),
    ],
)
def test_read(text: str, regions: dict[int, Region]) -> None:
    assert parse_boxes(text, 3) == regions


@pytest.mark.parametrize(
    "name",
    [
        *({"image": value} for value in (2, 2.0, "2", "2.0", " #2 ", "<2>", "image 2", "ref2", "the second photo")),
        *({key: 2} for key in ("id", "label", "index", "number", "image_id", "Picture", "image-index", "ref")),
        *({key: "2"} for key in ("id", "label", "desc", "imageNumber")),
        *({"id": value} for value in ("ref_2", "#2", "last image", "picture no. 2")),
        {"image": 2, "id": "cat_1", "index": 0},
        {"index": 0, "id": "image_2"},
        {"image": None, "id": "", "label": "the cup of image 2"},
    ],
)  # fmt: skip
def test_every_way_to_name_a_picture(name: dict[str, object]) -> None:
    assert regions_of([{**name, "bbox": [500, 100, 900, 400]}], 2) == {2: BOX}


@pytest.mark.parametrize(
    "name",
    [
        *({"image": value} for value in ("images 2 and 3", "2 and 3", "two", "guitar", 2.5, True, [2], "-2", "a.png")),
        *({"id": value} for value in ("image_two", "images 1, 2", "ref", 1.5, False, {})),
        *({key: "cup"} for key in ("image_id", "index", "number", "photo", "Image Number")),
        {"image": "guitar", "id": "image_2"},
    ],
)  # fmt: skip
def test_a_picture_that_cannot_be_read_is_not_image_1(name: dict[str, object]) -> None:
    with pytest.raises(UniPicError, match=r'^box 1 has ".*": .*; expected the number of one picture, such as 2 or'):
        regions_of([{**name, "bbox": [500, 100, 900, 400]}], 3)


@pytest.mark.parametrize("name", [{"id": "cat_1"}, {"label": "guitar"}, {"desc": "images 1 and 2"}, {"type": "image"}])
def test_names_of_things_are_counted_in_order(name: dict[str, object]) -> None:
    assert regions_of([{**name, "bbox": [500, 100, 900, 400]}], 3) == {1: BOX}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image 2 left", "boxes must be JSON such as"),
        ('[{"bbox": [0, 0, 1', "boxes must be JSON such as"),
        ("[" * 9000, "boxes must be JSON such as"),
        (" " * MAX_TEXT + "[]", f"at most {MAX_TEXT} characters"),
        (json.dumps([{"bbox": [0, 0, 1, 1]}] * (MAX_ROWS + 1)), f"at most {MAX_ROWS} boxes"),
        ("5", "must be a list of rows"),
        ('"a"', "must be a list of rows"),
        ("[[0, 0, 10, 10]]", "must be a list of rows"),
        ("null", "must be a list of rows"),
        ('[{"id": "image_2"}]', r'box 1 must have "bbox": \[top, left, bottom, right\]'),
        ('[{"bbox": [0, 0, 10]}]', "box 1 must have"),
        ('[{"bbox": "0 0 10 10"}]', "box 1 must have"),
        ('[{"bbox": [0, 0, true, 10]}]', "box 1 must have"),
        ('[{"bbox": [0, 0, null, 10]}]', "box 1 must have"),
        ('[{"bbox": [0, 0, 10, 1001]}]', "box 1: a box must lie between 0 and 1000"),
        ('[{"bbox": [0, -1, 10, 10]}]', "must lie between 0 and 1000"),
        ('[{"bbox": [0, 0, NaN, 10]}]', "must lie between 0 and 1000"),
        ('[{"bbox": [10, 0, 10, 10]}]', r"higher than 0, got \[top, left, bottom, right\] = \[10, 0, 10, 10\]"),
        ('[{"bbox": [0.1, 0, 0.5, 1]}]', "on a grid from 0 to 1000, got one from 0 to 1: .*; multiply by 1000"),
        ('[{"image": 4, "bbox": [0, 0, 1, 1]}]', "box 1 is of image 4, and there are 3 pictures"),
        ('[{"image": 0, "bbox": [0, 0, 1, 1]}]', "box 1 is of image 0"),
        ('[{"image": 1e300, "bbox": [0, 0, 1, 1]}]', "box 1 is of image 10000"),
        ('[{"image": 2, "bbox": [0, 0, 9, 9]}, {"id": "image_2", "bbox": [0, 0, 9, 9]}]', "image 2 has two boxes"),
        ('[{"image": 2, "bbox": [0, 0, 1, 1]}, {"bbox": [0, 0, 1, 1]}]', "box 2 names no picture, and others do"),
    ],
)  # fmt: skip
def test_everything_else_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UniPicError, match=message) as error:
        parse_boxes(text, 3)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["id", "bbox", "image", "index", "x"]), inner)
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_value_is_read_or_refused(value: object) -> None:
    try:
        regions = regions_of(value, 3)
    except UniPicError:
        return
    assert set(regions) <= {1, 2, 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": -1}, "strength must be a number from 0 to 100"),
        ({"strength": float("nan")}, "strength must be a number"),
        ({"strength": "1"}, "got '1'"),
        ({"start": 0.5, "end": 0.4}, "from 0 to 1 in order, got 0.5 and 0.4"),
        ({"end": 2}, "from 0 to 1 in order"),
    ],
)
def test_wrong_influences(values: dict[str, object], message: str) -> None:
    with pytest.raises(UniPicError, match=message):
        Influence(**values)  # type: ignore[arg-type]


def test_neutral_influences_are_none() -> None:
    whole = Influence(region=Region(0, 0, 1000, 1000), end=0.5)
    assert checked_influences([Influence(), whole], 2) == ()
    assert checked_influences(None, 2) == ()
    assert checked_influences([Influence(), Influence(0.5)], 2) == (Influence(), Influence(0.5))
    with pytest.raises(UniPicError, match="one Influence for each of 3 pictures"):
        checked_influences([Influence()], 3)
