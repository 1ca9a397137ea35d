"""How references share one pixel budget: by the release's rule, by equal areas, by weights; and what is told of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unipic_core.conditioning.images import resize_references
from unipic_core.conditioning.reference_sizes import (
    MAX_REFERENCES,
    SHARES,
    Size,
    described_sizes,
    reference_sizes,
    scaled_sizes,
    small_references,
)
from unipic_core.errors import UniPicError

FACE: list[Size] = [(6000, 4000), (300, 300)]


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.floats(1 / 16, 16), st.floats(0.01, 100)),
        min_size=1,
        max_size=MAX_REFERENCES,
    ),
    st.sampled_from([32, 100, 128, 1024]),
    st.sampled_from(SHARES),
)
def test_reference_sizes_are_multiples_of_32(pictures: list[tuple[int, float, float]], budget: int, share: str) -> None:
    """Of all pictures up to 16:1, whatever their sizes and weights."""
    sizes = [(max(round(side * aspect), math.ceil(side / 16)), side) for side, aspect, _ in pictures]
    seen = reference_sizes(sizes, budget, share, [weight for *_, weight in pictures])
    assert all(w % 32 == 0 and h % 32 == 0 and w >= 32 and h >= 32 for w, h in seen)


@pytest.mark.parametrize(
    ("sizes", "budget", "how", "message"),
    [
        (
            [(1_000_000, 1)],
            1024,
            {},
            r"image 1 \(1000000x1\) is too thin: it would be seen at 1024000x32, far over its",
        ),
        ([(1, 1_000_000)], 1024, {}, r"image 1 \(1x1000000\) .* 32x1024000"),
        ([(60_000, 10)], 1024, {}, "seen at 79328x32, far over its share of 1024x1024 pixels"),
        ([(256, 256), (4000, 6)], 256, {"share": "equal"}, r"image 2 \(4000x6\) .* seen at 4672x32"),
        ([(256, 256), (9000, 9)], 256, {"weights": [1, 0.5]}, r"image 2 \(9000x9\)"),
    ],
)
def test_a_picture_too_thin_for_its_share_is_refused_with_the_size_to_crop_it_to(
    sizes: list[Size], budget: int, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(UniPicError, match=message + r".*; crop it to at most \d+x\d+$") as error:
        reference_sizes(sizes, budget, **how)
    width, height = map(int, str(error.value).rpartition(" ")[2].split("x"))
    assert reference_sizes([*sizes[:-1], (width, height)], budget, **how)
    longer = (width + 1, height) if width > height else (width, height + 1)
    with pytest.raises(UniPicError, match="is too thin"):
        reference_sizes([*sizes[:-1], longer], budget, **how)


@pytest.mark.parametrize(
    ("sizes", "budget", "how", "seen"),
    [
        ([(8000, 4)], 1024, {}, [(45792, 32)]),
        ([(20_000, 1000)], 256, {}, [(1152, 64)]),
        ([(4000, 3000), (2000, 100)], 256, {}, [(288, 224), (160, 32)]),
        ([(100, 100), (400, 20)], 256, {"weights": [100, 0.01]}, [(256, 256), (32, 32)]),
        ([(100, 100), (400, 10)], 1024, {"weights": [100, 0.01], "share": "equal"}, [(1024, 1024), (64, 32)]),
    ],
)
def test_panoramas_and_small_shares_keep_their_sizes(
    sizes: list[Size], budget: int, how: dict[str, Any], seen: list[Size]
) -> None:
    """Over their share by rounding, or by few pixels in all: as before there was a limit."""
    assert reference_sizes(sizes, budget, **how) == seen


def test_references_share_one_budget() -> None:
    one = reference_sizes([(3000, 2000)])
    six = reference_sizes([(3000, 2000)] * 6)
    assert sum(w * h for w, h in one) == pytest.approx(1024**2, rel=0.05)
    assert sum(w * h for w, h in six) == pytest.approx(1024**2, rel=0.05)
    assert reference_sizes([]) == []
    with pytest.raises(UniPicError, match=r"at most 6 pictures.*got 7"):
        reference_sizes([(10, 10)] * 7)
    with pytest.raises(UniPicError, match="at least 32 pixels, got 16"):
        reference_sizes([(10, 10)], 16)
    with pytest.raises(UniPicError, match="at least 1x1"):
        reference_sizes([(0, 10)])


def test_small_reference_does_not_vanish() -> None:
    assert reference_sizes([(4000, 4000), (10, 10)], 256)[1] == (32, 32)
    assert [p.size for p in resize_references([Image.new("RGB", s) for s in [(4000, 4000), (3, 3)]], 64)][1] == (32, 32)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("weights", [None, [1, 1], [7, 7], [1, 4]])
def test_the_budget_is_filled_whatever_the_shares(share: str, weights: list[float] | None) -> None:
    """Before sides are rounded to 32, and up to their rounding to pixels."""
    filled = sum(w * h for w, h in scaled_sizes([(3000, 2000), (700, 900)], 1024, share, weights))
    assert filled == pytest.approx(1024**2, rel=0.005)


def test_equal_weights_are_no_weights() -> None:
    """By the release's rule r is one number for all: 1024 / sqrt(6000 * 4000 + 300 * 300)."""
    assert reference_sizes(FACE) == reference_sizes(FACE, weights=[1, 1]) == [(1248, 832), (64, 64)]
    assert reference_sizes(FACE, share="equal") == reference_sizes(FACE, share="equal", weights=[2.5, 2.5])


def test_equal_areas() -> None:
    """724 = 1024 / sqrt(2): half of the pixels each."""
    assert scaled_sizes(FACE, share="equal") == [(887, 591), (724, 724)]
    assert reference_sizes(FACE, share="equal") == [(896, 576), (736, 736)]
    assert reference_sizes([(30, 20)], share="equal") == reference_sizes([(30, 20)])


def test_weights_multiply_the_shares_of_pixels() -> None:
    assert scaled_sizes([(10, 10), (10, 10)], 1000, weights=[9, 16]) == [(600, 600), (800, 800)]
    assert scaled_sizes([(10, 10), (99, 99)], 1000, "equal", [9, 16]) == [(600, 600), (800, 800)]
    assert scaled_sizes([(30, 10), (10, 10)], 1000, weights=[1, 3]) == [(1225, 408), (707, 707)]


def test_resized_pictures_have_these_sizes() -> None:
    pictures = [Image.new("RGB", size) for size in ((60, 40), (30, 30))]
    sizes = [picture.size for picture in pictures]
    for share, weights in (("release", None), ("equal", None), ("release", [1, 4]), ("equal", [2, 1])):
        resized = resize_references(pictures, 256, share, weights)
        assert [picture.size for picture in resized] == reference_sizes(sizes, 256, share, weights)


@pytest.mark.parametrize("weights", [[0, 1], [1, -1], [1, float("nan")], [1, True], [1, "2"], [1, 101]])
def test_wrong_weights(weights: list[float]) -> None:
    with pytest.raises(UniPicError, match=r"weight should be a number from 0.01 to 100, got"):
        reference_sizes(FACE, weights=weights)


def test_other_choices_are_refused() -> None:
    with pytest.raises(UniPicError, match="one weight for each of 2 pictures, got 3"):
        reference_sizes(FACE, weights=[1, 1, 1])
    with pytest.raises(UniPicError, match="share the budget by release or equal, got 'fair'"):
        reference_sizes(FACE, share="fair")


def test_small_references_are_told() -> None:
    """The boundary is a quarter of the budget's side: 256 of 1024, by area."""
    seen = reference_sizes(FACE)
    assert described_sizes(FACE, seen) == "image 1 6000x4000 seen at 1248x832, image 2 300x300 seen at 64x64"
    [caution] = small_references(FACE, seen, 1024)
    assert caution.startswith("image 2 (300x300) is seen at 64x64, below 256x256, so its details are lost")
    assert not list(small_references(FACE, reference_sizes(FACE, share="equal"), 1024))
    assert not list(small_references([(9, 9)], [(256, 256)], 1024))
    assert len(list(small_references([(9, 9)], [(256, 224)], 1024))) == 1
    assert not list(small_references([(9, 9)] * 6, reference_sizes([(9, 9)] * 6), 1024))
