"""Judges of open scenes, on pictures made by hand and on systems whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from trainers.evaluate import main
from trainers.judges.arrays import box_blur, to_array
from trainers.judges.kinds import OPEN_JUDGES
from trainers.judges.measure import Generate, compare
from trainers.judges.open_scenes import OpenCase, gradient, mean_answer, sharpness
from trainers.judges.scene_plan import SEED_STRIDE, Plan
from trainers.nano.emoji import SUBSET, Bank
from trainers.nano.open_scenes.answers import OPEN_TASKS, answers
from trainers.nano.open_scenes.drawing import make_open_scene
from trainers.nano.render import Sample, render
from trainers.nano.scene import Scene

N, K, SEED = 12, 4, 5


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.open(SUBSET)


# --- sharpness


def stripes(contrast: float = 1.0) -> np.ndarray:
    wave = 0.5 + 0.5 * contrast * np.sign(np.sin(np.arange(64) * np.pi / 4 + 0.1))
    return np.broadcast_to(wave[None, :, None], (64, 64, 3)).astype(np.float32)


def inside() -> np.ndarray:
    mask = np.zeros((64, 64), np.float32)
    mask[8:56, 8:56] = 1
    return mask


def test_gradients_of_a_ramp_are_its_slope() -> None:
    ramp = np.broadcast_to(np.linspace(0, 0.63, 64)[:, None, None], (64, 64, 3)).astype(np.float32)
    assert gradient(ramp)[:-1].mean() == pytest.approx(0.01, abs=1e-5)
    assert gradient(ramp)[-1].max() == pytest.approx(0, abs=1e-6)


def test_sharpness_is_one_of_the_same_half_of_half_the_contrast_and_less_of_blur_and_of_noise() -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, (64, 64, 3)).astype(np.float32)
    assert sharpness(stripes(), stripes(), inside()) == pytest.approx(1)
    assert sharpness(stripes(0.5), stripes(), inside()) == pytest.approx(0.5, abs=1e-3)
    assert sharpness(stripes(), stripes(0.5), inside()) == pytest.approx(0.5, abs=1e-3)
    assert sharpness(box_blur(stripes(), 4), stripes(), inside()) < 0.5
    assert sharpness(stripes() + noise, stripes(), inside()) < 0.8


def test_nothing_is_judged_where_there_is_nothing() -> None:
    assert np.isnan(sharpness(stripes(), stripes(), 0 * inside()))
    assert np.isnan(sharpness(stripes(), 0 * stripes(), inside()))


# --- answers


def scene_of(bank: Bank, task: str) -> Scene:
    return make_open_scene(bank, "heldout", 4, 2, task=task)


@pytest.mark.parametrize("task", OPEN_TASKS)
def test_each_answer_is_nearest_to_itself_also_blurred_and_drawn_again(bank: Bank, task: str) -> None:
    scene = scene_of(bank, task)
    case = OpenCase.of(bank, scene)
    count = len(answers(scene))
    pictures = [one.sample.target for one in case.answers]
    nearest, decibels = case.nearest(pictures)
    assert nearest.tolist() == list(range(count))
    assert decibels.tolist() == [50.0] * count
    blurred = [picture.filter(ImageFilter.GaussianBlur(1)) for picture in pictures]
    assert case.nearest(blurred)[0].tolist() == list(range(count))
    again = [render(bank, one, hidden_seed=3).target for one in answers(scene)]
    assert case.nearest(again)[0].tolist() == list(range(count))


def test_the_answers_that_draws_reach(bank: Bank) -> None:
    case = OpenCase.of(bank, scene_of(bank, "open_side"))
    left, right = (one.sample.target for one in case.answers)
    assert [case.reached(some) for some in ([left, left, left], [left, right], [right])] == [1, 2, 1]
    assert [case.reachable(draws) for draws in (1, 2, 3)] == pytest.approx([1, 1.5, 1.75])


def test_the_mean_of_the_answers_shows_all_of_them_faintly(bank: Bank) -> None:
    case = OpenCase.of(bank, scene_of(bank, "open_side"))
    mean = to_array(mean_answer(bank, case))
    halfway = np.mean([to_array(one.sample.target) for one in case.answers], axis=0)
    assert np.abs(mean - halfway).mean() < 0.03
    for answer in case.answers:
        for item in answer.sample.placements:
            assert sharpness(mean, to_array(answer.sample.target), item.mask) < 0.9


# --- whole evaluations


def scene_number(seed: int) -> int:
    return seed % SEED_STRIDE - SEED


def random_answer(bank: Bank, sample: Sample, seed: int) -> Image.Image:
    options = answers(make_open_scene(bank, "heldout", SEED, scene_number(seed)))
    return render(bank, options[np.random.default_rng(seed).integers(len(options))], hidden_seed=seed).target


def same_answer(bank: Bank, sample: Sample, seed: int) -> Image.Image:
    return sample.target


def mean_of_them(bank: Bank, sample: Sample, seed: int) -> Image.Image:
    return mean_answer(bank, OpenCase.of(bank, make_open_scene(bank, "heldout", SEED, scene_number(seed))))


@pytest.fixture(scope="module")
def measured(bank: Bank) -> dict:
    def opener(answer) -> Generate:
        return lambda sample, seed: answer(bank, sample, seed)

    systems = {"truth": random_answer, "one": same_answer, "mean": mean_of_them}
    openers = {label: (lambda answer=answer: opener(answer)) for label, answer in systems.items()}
    plan = Plan(N, SEED, open=True, seeds_per_scene=K, progress=False)
    return compare(openers, bank, plan, sheet_rows=1).report


def test_the_truth_scores_as_another_answer_and_the_mean_loses_sharpness(measured: dict) -> None:
    judges, mean = measured["judges"], measured["others"][1]["judges"]
    assert measured["scenes"] == "open"
    assert set(judges) == {judge.name for judge in OPEN_JUDGES}
    for name in ("match_psnr", "match_iou", "match_object", "sharpness"):
        assert judges[name]["valid"], name
    assert judges["sharpness"]["model"] > 0.9
    assert judges["sharpness"]["margins"]["mean_answer"]["beats"]
    assert judges["match_psnr"]["margins"]["mean_answer"]["beats"]
    assert judges["match_object"]["model"] > 0.9
    assert mean["sharpness"]["model"] < 0.85
    assert mean["sharpness"]["versus_first"]["ci95"][1] < 0
    assert not mean["sharpness"]["margins"]["mean_answer"]["beats"]


def test_spread_and_answers_are_those_of_the_truth_or_one(measured: dict) -> None:
    one, mean = measured["others"]
    low, high = measured["spread"]["of_truth_ci95"]
    assert low < 1 < high
    assert measured["spread"]["of_truth"] == pytest.approx(1, abs=0.35)
    assert measured["answers_reached"]["of_truth"] == pytest.approx(1, abs=0.2)
    assert measured["answers_reached"]["value"] > 1.4
    for stuck in (one, mean):
        assert stuck["spread"]["of_truth"] == 0
        assert stuck["answers_reached"]["value"] == 1
        assert stuck["answers_reached"]["of_truth_ci95"][1] < 0.8


def test_the_report_is_plain_json(measured: dict) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


def test_the_command_judges_open_scenes_of_another_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, sheet = tmp_path / "open.json", tmp_path / "open.png"
    options = ["--controls-only", "--scenes", "open", "--shape", "3x4", "--size", "192", "--n", "3"]
    options += ["--task", "open_side", "--data", str(SUBSET), "--json", str(numbers), "--sheet", str(sheet)]
    assert main(options) == 0
    report = json.loads(numbers.read_text(encoding="utf-8"))
    assert (report["scenes"], report["shape"], report["size"]) == ("open", [3, 4], 192)
    assert report["judges"]["match_psnr"]["controls"]["truth"] == 50
    assert "sharpness" in capsys.readouterr().out
    assert Image.open(sheet).height > 200


def test_a_closed_task_is_none_of_open_scenes() -> None:
    with pytest.raises(ValueError, match="open_side"):
        Plan(4, tasks=("pair",), open=True)
