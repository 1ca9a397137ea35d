"""Each judge alone, on pictures whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from trainers.judges import appearance, identity, placement
from trainers.judges.arrays import MAX_PSNR, area_matrix, box_blur, weighted_psnr
from trainers.judges.drawings.sheet import font, wrapped
from trainers.judges.kinds import CONTROL_NAMES, JUDGES, PLACES, TRUTH
from trainers.judges.statistics import Bootstrap
from trainers.judges.summary import Scores, empty, summarise, table

SIDE = 64
GREY = np.full((SIDE, SIDE, 3), 0.5, np.float32)


def square(top: int, left: int, side: int = 20) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[top : top + side, left : left + side] = 1
    return mask


def painted(*masks: np.ndarray, colour: tuple[float, float, float] = (1, 0.2, 0.1)) -> np.ndarray:
    picture = GREY.copy()
    for mask in masks:
        picture[mask > 0] = colour
    return picture


def texture(seed: int, side: int = SIDE) -> np.ndarray:
    return box_blur(np.random.default_rng(seed).random((side, side, 3)).astype(np.float32), 1)


# --- placement


def test_what_stands_in_its_place_overlaps_and_is_centred() -> None:
    mask = square(20, 10)
    found = placement.changed(painted(mask), GREY)
    assert placement.placement_iou(found, [mask]) > 0.8
    assert placement.centre_errors(found, [mask])[0] < 0.01


def test_centre_error_is_the_distance_moved_in_sides() -> None:
    mask, moved = square(20, 10), square(20, 26)
    found = placement.changed(painted(moved), GREY)
    assert placement.centre_errors(found, [mask])[0] == pytest.approx(16 / SIDE, abs=0.01)
    assert placement.placement_iou(found, [mask]) < 0.2


def test_nothing_drawn_scores_nothing() -> None:
    found = placement.changed(GREY, GREY)
    assert placement.placement_iou(found, [square(5, 5)]) == 0
    assert placement.centre_errors(found, [square(5, 5)]) == [placement.MISSING]


def test_a_missing_item_is_charged_to_itself_alone() -> None:
    here, missing = square(22, 4), square(22, 40)
    errors = placement.centre_errors(placement.changed(painted(here), GREY), [here, missing])
    assert errors[0] < 0.01
    assert errors[1] == placement.MISSING


def test_a_slight_cast_and_grain_are_no_change() -> None:
    grain = np.random.default_rng(0).normal(0, 0.03, GREY.shape).astype(np.float32)
    assert placement.changed(GREY + 0.03 + grain, GREY).mean() < 0.01


def test_a_thing_left_behind_lowers_the_overlap() -> None:
    mask, stray = square(20, 4), square(20, 40)
    clean = placement.placement_iou(placement.changed(painted(mask), GREY), [mask])
    dirty = placement.placement_iou(placement.changed(painted(mask, stray), GREY), [mask])
    assert dirty < 0.6 * clean


def test_background_psnr_looks_outside_the_items_only() -> None:
    mask = square(20, 20)
    assert placement.background_psnr(painted(mask), GREY, [mask]) == MAX_PSNR
    assert placement.background_psnr(GREY + 0.1 * (1 - mask[..., None]), GREY, [mask]) == pytest.approx(20, abs=0.01)


def test_a_pair_is_bound_if_it_is_nearer_to_the_truth_than_to_its_exchange() -> None:
    left, right = square(20, 4), square(20, 40)
    target = np.where(left[..., None] > 0, painted(left), painted(right, colour=(0.1, 0.3, 0.9)))
    exchanged = target[:, ::-1]
    assert placement.not_exchanged(target, target, exchanged) == 1
    assert placement.not_exchanged(exchanged, target, exchanged) == 0
    assert placement.not_exchanged(0.6 * target + 0.4 * exchanged, target, exchanged) == 1
    assert placement.not_exchanged(0.4 * target + 0.6 * exchanged, target, exchanged) == 0


# --- appearance


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-4, 4), (1, 1)])
def test_shifts_within_the_tolerance_are_forgiven(shift: tuple[int, int]) -> None:
    target, mask = texture(1), square(20, 22)
    picture = appearance.shifted(target, -shift[0], -shift[1])
    assert appearance.best_shift(picture, target, mask) == shift
    assert appearance.appearance(picture, target, mask).psnr == MAX_PSNR


def test_a_larger_shift_is_not() -> None:
    target = texture(1)
    assert appearance.appearance(appearance.shifted(target, 9, 0), target, square(20, 22)).psnr < 20


def test_known_colours_and_errors() -> None:
    mask = square(20, 20)
    judged = appearance.appearance(GREY + 0.1, GREY, mask)
    assert judged.psnr == pytest.approx(20, abs=0.01)
    assert judged.colour == pytest.approx(25.5, abs=0.01)
    assert np.isnan(weighted_psnr(GREY, GREY, 0 * mask))


def test_ssim_is_one_for_equals_and_negative_for_a_negative() -> None:
    target = texture(2)
    assert appearance.ssim_map(target, target) == pytest.approx(1, abs=1e-4)
    assert appearance.ssim_map(1 - target, target).mean() < 0
    assert appearance.ssim_map(texture(3), target).mean() < 0.3


def test_area_means_are_exact_inside_and_short_outside() -> None:
    matrix = area_matrix(1.5, 5.5, 2, 8)
    assert matrix @ np.arange(8) == pytest.approx([2, 4])
    assert matrix.sum(axis=1) == pytest.approx([1, 1])
    assert area_matrix(-2, 2, 2, 8).sum(axis=1) == pytest.approx([0, 1])


# --- identity


@pytest.fixture(scope="module")
def sprites() -> list[np.ndarray]:
    """Twenty coloured discs with a texture of their own, 40 x 40 RGBA."""
    rows, columns = np.indices((40, 40)) - 19.5
    disc = (255 * (np.hypot(rows, columns) < 19)).astype(np.uint8)
    pictures = []
    for seed in range(20):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        colours = np.asarray(Image.fromarray(coarse).resize((40, 40), Image.Resampling.BILINEAR))
        pictures.append(np.dstack([colours, disc]))
    return pictures


@pytest.fixture(scope="module")
def index(sprites: list[np.ndarray]) -> identity.IdentityIndex:
    return identity.IdentityIndex(sprites)


def stand(sprite: np.ndarray, left: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The sprite at a corner of a graded background, and the background."""
    background = np.repeat(np.linspace(0.2, 0.8, SIDE, dtype=np.float32)[:, None, None], SIDE, axis=1).repeat(3, axis=2)
    canvas = Image.fromarray((255 * background).astype(np.uint8))
    picture = Image.fromarray(sprite)
    canvas.paste(picture.convert("RGB"), (left, top), picture.getchannel("A"))
    return np.asarray(canvas, np.float32) / 255, background


def nearest(index: identity.IdentityIndex, picture: np.ndarray, background: np.ndarray, **changes: np.ndarray) -> int:
    weight = changes.get("weight", np.ones((SIDE, SIDE), np.float32))
    tint = changes.get("tint", np.eye(3))
    return int(index.nearest(picture[None], background, weight, (12, 12, 40, 40), tint)[0])


@pytest.mark.parametrize("wanted", [0, 7, 19])
def test_identity_survives_flip_shift_light_and_occlusion(
    index: identity.IdentityIndex, sprites: list[np.ndarray], wanted: int
) -> None:
    picture, background = stand(sprites[wanted], 12, 12)
    assert nearest(index, picture, background) == wanted
    assert nearest(index, stand(sprites[wanted][:, ::-1], 12, 12)[0], background) == wanted
    assert nearest(index, stand(sprites[wanted], 14, 11)[0], background) == wanted
    tint = np.diag([0.7, 0.9, 1.0])
    lit = sprites[wanted].copy()
    lit[..., :3] = lit[..., :3] @ tint
    assert nearest(index, stand(lit, 12, 12)[0], background, tint=tint) == wanted
    hidden = picture.copy()
    hidden[:, :30] = 0
    weight = np.ones((SIDE, SIDE), np.float32)
    weight[:, :30] = 0
    assert nearest(index, hidden, background, weight=weight) == wanted


def test_identity_of_a_box_that_leaves_the_picture(index: identity.IdentityIndex, sprites: list[np.ndarray]) -> None:
    picture, background = stand(sprites[4], 12, 40)
    found = index.nearest(picture[None], background, np.ones((SIDE, SIDE), np.float32), (12, 40, 40, 40), np.eye(3))
    assert found.tolist() == [4]


def test_distance_is_the_mean_squared_difference(index: identity.IdentityIndex, sprites: list[np.ndarray]) -> None:
    picture, background = stand(sprites[3], 12, 12)
    weight = np.ones((SIDE, SIDE), np.float32)
    distances = index.distances(np.stack([picture, background]), background, weight, (12, 12, 40, 40), np.eye(3))
    assert distances.shape == (2, 20)
    assert distances[0, 3] < 1e-3
    assert distances[0].argmin() == 3
    assert distances[1, 3] > 0.02


# --- statistics and summary


def test_a_constant_difference_has_no_spread_however_noisy_both_are() -> None:
    noisy = np.random.default_rng(0).normal(10, 5, (50, 2))
    bootstrap = Bootstrap(50, seed=1)
    gap = bootstrap.difference(noisy + 1, noisy)
    assert gap is not None
    assert (gap.value, gap.low, gap.high) == pytest.approx((1, 1, 1))
    ratio = bootstrap.ratio(2 * noisy, noisy)
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_intervals_have_the_width_of_theory() -> None:
    mean = Bootstrap(400, seed=1).mean(np.random.default_rng(2).normal(0, 1, (400, 1)))
    assert mean is not None
    assert (mean.high - mean.low) / 2 == pytest.approx(1.96 / 20, rel=0.12)


def test_nothing_to_score_gives_nothing() -> None:
    bootstrap = Bootstrap(4, seed=0)
    only_one = np.array([[1.0], [np.nan], [np.nan], [np.nan]])
    assert bootstrap.mean(only_one) is None
    assert bootstrap.ratio(np.ones((4, 1)), np.zeros((4, 1))) is None
    some = np.array([[1.0, np.nan], [0.0, 0.0], [np.nan, np.nan]] * 2)
    mean = Bootstrap(6, seed=0).mean(some)
    assert mean is not None
    assert mean.value == pytest.approx(1 / 3)


def judged(n: int, level: float) -> dict[str, np.ndarray]:
    """Scores that are better the higher the level, for every judge."""
    scores = empty(n)
    grain = np.random.default_rng(int(1000 * level)).normal(0, 0.01, n)
    for judge in JUDGES:
        scores[judge.name][:, 0] = (level if judge.higher_is_better else 1 - level) + grain
    return scores


def test_a_judge_that_cannot_separate_is_not_reported() -> None:
    controls = {name: judged(30, 0.9 if name in (TRUTH, *PLACES) else 0.2) for name in CONTROL_NAMES}
    scores = Scores(["pair"] * 30, {"a": judged(30, 0.6), "b": judged(30, 0.7)}, controls)
    first, second = summarise(scores, Bootstrap(30, seed=0))
    unable, able = first["judges"]["placement_iou"], first["judges"]["masked_psnr"]
    assert (unable["valid"], unable["model"]) == (False, None)
    assert "cannot separate" in unable["note"]
    assert able["valid"]
    assert able["model"] == pytest.approx(0.6, abs=0.01)
    assert able["margins"]["object_swapped"]["beats"]
    assert not able["margins"][TRUTH]["beats"]
    assert second["judges"]["masked_psnr"]["versus_first"]["difference"] == pytest.approx(0.1, abs=0.01)
    assert "not reported" in table(first)
    assert "minus the first" in table(second)
    long = "unipic-nano + distill, 4 steps, cfg 1"
    assert table({**first, "model": {"label": long}}).startswith(long + "\n")


def test_better_may_be_lower() -> None:
    controls = {name: judged(30, 0.9 if name == TRUTH else 0.2) for name in CONTROL_NAMES}
    report = summarise(Scores(["pair"] * 30, {"a": judged(30, 0.6)}, controls), Bootstrap(30, seed=0))[0]
    error = report["judges"]["placement_centre_error"]
    assert error["better"] == "lower"
    assert error["margins"]["background_alone"]["difference"] < 0
    assert error["margins"]["background_alone"]["beats"]


def test_wrapped_lines_fit() -> None:
    lines = wrapped("Put the guitar from image 2 in the hands of the firefighter from image 1", 150, 15).split("\n")
    assert len(lines) > 2
    assert all(font(15).getlength(line) <= 150 for line in lines)
