"""Systems beside a reference, on scores and on toy generators whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from trainers.evaluate import System, main
from trainers.judges.comparison import comparison_table, gains_table, retained_text
from trainers.judges.drawings.plot import draw_plot, retained_of, series_of
from trainers.judges.drawings.sheet import PICTURE, Layout, draw_sheet, font
from trainers.judges.kinds import JUDGES
from trainers.judges.measure import Evaluation, Generate, compare
from trainers.judges.retention import equal_steps, gains, pairwise_rms, retained_quality, spread_entry
from trainers.judges.scene_plan import Plan
from trainers.judges.statistics import Bootstrap
from trainers.nano.emoji import SUBSET, Bank
from trainers.nano.render import Sample
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.weights.lora import save_lora
from unipic_core.weights.recipe import Recipe

BY_NAME = {judge.name: judge for judge in JUDGES}
IOU, ERROR, DB = (BY_NAME[name] for name in ("placement_iou", "placement_centre_error", "masked_psnr"))
N, K = 10, 3
ABOUT = {
    "base": {"steps": 50, "cfg": 4.0, "series": "base, cfg 4"},
    "same": {"steps": 50, "cfg": 4.0, "series": "base, cfg 4"},
    "base, 4 steps": {"steps": 4, "cfg": 1.0, "series": "base, cfg 1"},
    "student, 4 steps": {"steps": 4, "cfg": 1.0, "series": "student, cfg 1"},
}


def scored(values: np.ndarray | list[float]) -> np.ndarray:
    return np.asarray(values, float)[:, None]


@pytest.fixture
def noisy() -> np.ndarray:
    return scored(np.random.default_rng(0).uniform(0.2, 0.9, 80))


# --- what is kept


@pytest.mark.parametrize("judge", [IOU, ERROR])
def test_a_copy_keeps_all_of_it_with_no_doubt(judge, noisy: np.ndarray) -> None:
    assert retained_quality(judge, noisy, noisy.copy(), Bootstrap(80, 1)) == {
        "kind": "ratio",
        "value": 1.0,
        "ci95": [1.0, 1.0],
    }


def test_decibels_are_a_difference(noisy: np.ndarray) -> None:
    found = retained_quality(DB, 20 + noisy, 22 + noisy, Bootstrap(80, 1))
    assert found == {"kind": "difference_db", "value": -2.0, "ci95": [-2.0, -2.0]}


def test_half_the_quality_is_half_and_twice_the_error_too(noisy: np.ndarray) -> None:
    bootstrap = Bootstrap(80, 1)
    assert retained_quality(IOU, noisy / 2, noisy, bootstrap)["value"] == 0.5
    twice = retained_quality(ERROR, 2 * noisy, noisy, bootstrap)
    assert (twice["value"], twice["ci95"]) == (0.5, [0.5, 0.5])


def test_it_is_the_ratio_of_means_over_shared_items_not_the_mean_of_ratios() -> None:
    own, reference = scored([1.0, 1.0, np.nan, 4.0] * 5), scored([2.0, 4.0, 9.0, np.nan] * 5)
    assert retained_quality(IOU, own, reference, Bootstrap(20, 1))["value"] == pytest.approx(2 / 6, abs=1e-5)


def test_pairing_narrows_the_interval(noisy: np.ndarray) -> None:
    bootstrap = Bootstrap(80, 1)
    own = 0.9 * noisy + scored(np.random.default_rng(1).normal(0, 0.01, 80))
    paired = retained_quality(IOU, own, noisy, bootstrap)["ci95"]
    unpaired = retained_quality(IOU, own, noisy[::-1].copy(), bootstrap)["ci95"]
    assert paired[1] < 1
    assert paired[0] < 0.9 < paired[1]
    assert paired[1] - paired[0] < 0.2 * (unpaired[1] - unpaired[0])


@pytest.mark.parametrize("level", [0.0, -0.3])
def test_nothing_is_kept_of_nothing(level: float, noisy: np.ndarray) -> None:
    none = {"kind": "ratio", "value": None, "ci95": None}
    assert retained_quality(IOU, noisy, np.full_like(noisy, level), Bootstrap(80, 1)) == none


def test_the_shown_bound_never_promises_more() -> None:
    assert retained_text("ratio", 0.9961, [0.9499, 1.01]) == "1.00 (0.94)"
    assert retained_text("difference_db", -0.04, [-0.51, 0.3]) == "+0.0 (-0.6)"
    assert retained_text("ratio", None, None) == "-"


# --- which is better


def known(level: float, n: int = 80) -> dict[str, np.ndarray]:
    """Every judge's scores, better the higher the level."""
    return {judge.name: np.full((n, 1), level if judge.higher_is_better else 1 - level) for judge in JUDGES}


VALID = {judge.name: {"valid": judge.name != "masked_ssim"} for judge in JUDGES}


def test_a_gain_is_positive_for_the_better_whatever_the_judge() -> None:
    found = gains(known(0.75), known(0.5), VALID, Bootstrap(80, 1))
    assert "masked_ssim" not in found
    assert all(one == {"gain": 0.25, "ci95": [0.25, 0.25], "better": True, "worse": False} for one in found.values())
    back = gains(known(0.5), known(0.75), VALID, Bootstrap(80, 1))
    assert all(one["gain"] == -0.25 and one["worse"] and not one["better"] for one in back.values())


def test_noise_is_neither_better_nor_worse() -> None:
    rng = np.random.default_rng(3)
    first, second = ({judge.name: rng.normal(0.5, 0.1, (80, 1)) for judge in JUDGES} for _ in range(2))
    found = gains(first, second, VALID, Bootstrap(80, 1))
    assert sum(one["better"] or one["worse"] for one in found.values()) <= 2


def test_systems_of_equal_steps_are_paired_later_against_earlier() -> None:
    systems = {name: known(level) for name, level in (("a", 0.9), ("b", 0.5), ("c", 0.6), ("d", 0.7), ("e", 0.7))}
    pairs = equal_steps({"a": 50, "b": 4, "c": 8, "d": 4, "e": None}, systems, VALID, Bootstrap(80, 1))
    assert [(pair["steps"], pair["system"], pair["against"]) for pair in pairs] == [(4, "d", "b")]
    assert pairs[0]["judges"]["placement_iou"]["gain"] == pytest.approx(0.2)


# --- the spread between seeds


def flat(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


def test_the_spread_is_the_mean_rms_over_pairs() -> None:
    assert pairwise_rms([flat(100), flat(100), flat(100)]) == 0
    assert pairwise_rms([flat(0), flat(51), flat(255)]) == pytest.approx((0.2 + 1.0 + 0.8) / 3, abs=1e-6)
    half = flat(0)
    half.paste(flat(255).crop((0, 0, 4, 8)), (0, 0))
    assert pairwise_rms([half, flat(0)]) == pytest.approx(np.sqrt(0.5), abs=1e-6)


def test_no_ratio_to_a_reference_without_spread() -> None:
    found = spread_entry(scored([0.1, 0.2, 0.3]), scored([0.0, 0.0, 0.0]), Bootstrap(3, 0))
    assert (found["value"], found["ratio"], found["ratio_ci95"]) == (0.2, None, None)


# --- all of it, on toy generators


def noise_over(sample: Sample, seed: int, strength: float) -> Image.Image:
    """The truth, blurred as far as the noise is strong, with noise of its own seed."""
    grain = np.random.default_rng(seed).normal(0, strength, (*sample.target.size[::-1], 3))
    blurred = sample.target.filter(ImageFilter.GaussianBlur(strength / 4))
    return Image.fromarray(np.clip(np.asarray(blurred, float) + grain, 0, 255).astype(np.uint8))


def toy(strength: float) -> Callable[[], Generate]:
    return lambda: lambda sample, seed: noise_over(sample, seed, strength)


def without_seed() -> Generate:
    return lambda sample, seed: noise_over(sample, 0, 4)


@pytest.fixture(scope="module")
def toys() -> Evaluation:
    systems = {"base": toy(4), "same": toy(4), "base, 4 steps": toy(24), "student, 4 steps": toy(8)}
    plan = Plan(N, seed=3, progress=False, seeds_per_scene=K)
    return compare(systems, Bank.open(SUBSET), plan, about=ABOUT, sheet_rows=2)


def test_a_copy_keeps_all_and_a_worse_system_less(toys: Evaluation) -> None:
    same, worse, student = toys.report["others"]
    for name, found in same["retained"].items():
        even = 0.0 if found["kind"] == "difference_db" else 1.0
        assert (found["value"], found["ci95"]) == (even, [even, even]), name
    assert {name for name, found in worse["retained"].items() if found["kind"] == "difference_db"} == {
        "background_psnr",
        "masked_psnr",
    }
    for name in ("masked_ssim", "colour_difference"):
        assert worse["retained"][name]["ci95"][1] < student["retained"][name]["value"] < 1
    assert worse["retained"]["masked_psnr"]["ci95"][1] < 0
    assert "retained" not in toys.report


def test_the_pair_of_equal_steps_says_that_the_student_is_better(toys: Evaluation) -> None:
    pairs = toys.report["equal_steps"]
    assert [(pair["system"], pair["against"]) for pair in pairs] == [
        ("same", "base"),
        ("student, 4 steps", "base, 4 steps"),
    ]
    assert not any(one["better"] or one["worse"] for one in pairs[0]["judges"].values())
    for name in ("masked_psnr", "masked_ssim", "colour_difference"):
        assert pairs[1]["judges"][name]["better"], name
    table = gains_table(pairs)
    assert any(line.startswith("student, 4 steps ") for line in table.splitlines())
    assert "minus base, 4 steps" in table.splitlines()
    assert table.count("*") == sum(one["better"] or one["worse"] for one in pairs[1]["judges"].values()) >= 3


def test_spreads_and_their_ratio(toys: Evaluation) -> None:
    report = toys.report
    assert report["diversity"]["seeds_per_scene"] == K
    assert 0 < report["diversity"]["truth_drawn_again"]["value"] < 0.5
    same, worse, _ = report["others"]
    assert report["spread"]["value"] == pytest.approx(4 * np.sqrt(2) / 255, rel=0.15)
    assert (same["spread"]["ratio"], same["spread"]["ratio_ci95"]) == (1.0, [1.0, 1.0])
    assert worse["spread"]["ratio"] == pytest.approx(6, rel=0.15)


def test_the_judges_see_the_first_seed_only_so_the_numbers_stay(toys: Evaluation) -> None:
    bank, seen = Bank.open(SUBSET), []

    def base(sample: Sample, seed: int) -> Image.Image:
        seen.append(seed)
        return noise_over(sample, seed, 4)

    alone = compare({"base": lambda: base}, bank, Plan(N, seed=3, progress=False)).report
    assert seen == [3 + index for index in range(N)]
    assert alone["judges"] == toys.report["judges"]
    assert not {"spread", "diversity", "comparison", "others", "equal_steps"} & set(alone)
    seen.clear()
    compare({"base": lambda: base}, bank, Plan(2, seed=3, progress=False, seeds_per_scene=2))
    assert len(set(seen)) == 4
    assert (seen[0], seen[2]) == (3, 4)


def test_a_system_that_ignores_its_seed_has_no_spread() -> None:
    systems = {"base": toy(4), "fixed": without_seed}
    plan = Plan(3, seed=3, progress=False, seeds_per_scene=2)
    fixed = compare(systems, Bank.open(SUBSET), plan).report["others"][0]["spread"]
    assert fixed == {"value": 0.0, "ci95": [0.0, 0.0], "ratio": 0.0, "ratio_ci95": [0.0, 0.0]}


def test_the_comparison_says_the_same_as_the_report(toys: Evaluation) -> None:
    report = toys.report
    block = report["comparison"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (block["reference"], [row["steps"] for row in block["systems"]]) == ("base", [50, 50, 4, 4])
    for row, own in zip(block["systems"], [report, *report["others"]], strict=True):
        assert row["judges"]["placement_iou"]["value"] == own["judges"]["placement_iou"]["model"]
        assert row["spread"] == own["spread"]
    student = block["systems"][3]["judges"]["masked_ssim"]
    assert student["retained_ci95"] == report["others"][2]["retained"]["masked_ssim"]["ci95"]
    assert "retained" not in block["systems"][0]["judges"]["masked_ssim"]
    assert block["truth"]["spread"] == report["diversity"]["truth_drawn_again"]["value"]


def test_the_table_has_a_value_and_what_is_kept_for_each_system(toys: Evaluation) -> None:
    block = toys.report["comparison"]
    lines = comparison_table(block).splitlines()
    assert all(len(line) <= len(lines[0]) for line in lines)
    assert len({len(line) for line in lines if "x speed" in line}) == 1
    assert lines[0].split()[-2:] == ["s/picture", "spread"]
    (row,) = (index for index, line in enumerate(lines) if line.startswith("same"))
    assert lines[row + 1].count("(") == len(block["kinds"]) + 1
    assert lines[row + 1].split()[:2] == ["1.00", "(1.00)"]


# --- pictures


def test_long_labels_wrap_so_that_what_differs_is_read() -> None:
    labels = ["unipic-nano + unipic_distill, 8 steps, cfg 1", "unipic-nano + unipic_distill, 4 steps, cfg 1"]
    layout = Layout.of(labels)
    assert [head.split("\n")[-1] for head in layout.heads[1:]] == ["8 steps, cfg 1", "4 steps, cfg 1"]
    assert [", ".join(head.split("\n")) for head in layout.heads[1:]] == labels
    assert all(font(14).getlength(line) <= PICTURE for head in layout.heads for line in head.split("\n"))


def test_the_sheet_has_the_numbers_under_the_pictures(toys: Evaluation) -> None:
    block = toys.report["comparison"]
    plain, full = draw_sheet(toys.rows, "toys"), draw_sheet(toys.rows, "toys", block)
    assert full.width == plain.width
    added = np.asarray(full)[plain.height : full.height]
    assert full.height - plain.height > 20 * len(block["kinds"])
    for left in Layout.of(list(toys.rows[0].outputs)).pictures:
        assert added[:, left : left + PICTURE].min() < 100


def test_a_series_is_a_line_over_steps() -> None:
    rows = [{"label": "r", "steps": 50, "judges": {}}]
    for steps, series, value in ((8, "base", 0.9), (2, "base", 0.4), (4, "student", 0.95), (2, "student", None)):
        bounds = None if value is None else [value - 0.1, value + 0.1]
        judges = {"placement_iou": {"value": 0.5, "retained": value, "retained_ci95": bounds}}
        rows.append({"label": f"{series} {steps}", "series": series, "steps": steps, "judges": judges})
    series = series_of({"systems": rows}, "placement_iou")
    assert [point[:2] for point in series["base"]] == [(2, 0.4), (8, 0.9)]
    assert [point[:2] for point in series["student"]] == [(4, 0.95)]
    for row, seconds in zip(rows[1:], (0.2, 0.7, 0.1, 0.1), strict=True):
        row["seconds_per_picture"] = seconds
    by_time = series_of({"systems": rows}, "placement_iou", "seconds")
    assert [point[:2] for point in by_time["base"]] == [(0.2, 0.9), (0.7, 0.4)]


def test_a_plot_is_drawn_with_the_spread(toys: Evaluation, tmp_path: Path) -> None:
    block = toys.report["comparison"]
    assert retained_of(block["systems"][2], "spread")[0] == toys.report["others"][1]["spread"]["ratio"]
    block = json.loads(json.dumps(block))
    block["systems"][3]["judges"]["placement_iou"] |= {"retained": None, "retained_ci95": None}
    draw_plot(block, tmp_path / "plot.png")
    picture = Image.open(tmp_path / "plot.png")
    assert picture.width > 1000
    assert np.asarray(picture.convert("L")).min() < 100
    draw_plot(block, tmp_path / "seconds.png", "seconds")
    assert (np.asarray(Image.open(tmp_path / "seconds.png")) != np.asarray(picture)).any()


# --- the command line


def test_a_system_says_how_it_really_runs() -> None:
    plain = System("nano", str(DEFAULT_MODEL)).about()
    assert (plain["steps"], plain["cfg"], plain["sampler"]) == (20, 1.5, "euler")
    few = System("few", str(DEFAULT_MODEL), steps=4, cfg=2.0).about()
    assert (few["steps"], few["cfg"], few["label"]) == (4, 2.0, "few")
    assert few["series"] == f"{DEFAULT_MODEL.name}, cfg 2"


def test_a_lora_brings_its_recipe(tmp_path: Path) -> None:
    file = tmp_path / "few.safetensors"
    layers = {"transformer_blocks.0.attn.to_q": (torch.zeros(1, 8), torch.zeros(8, 1))}
    save_lora(file, layers, recipe=Recipe(steps=4, guidance=1.0, sampler="consistency"))
    about = System("few", str(DEFAULT_MODEL), lora=str(file)).about()
    assert (about["steps"], about["cfg"], about["sampler"]) == (4, 1.0, "consistency")
    assert about["series"] == f"{DEFAULT_MODEL.name} + few"
    assert System("one", str(DEFAULT_MODEL), lora=str(file), steps=1).about()["steps"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", str(DEFAULT_MODEL), "--plot", "plot.png"], "at least 2"),
        (["--controls-only", "--plot", "plot.pdf"], "--plot must end in .png"),
        (["--controls-only", "--seeds-per-scene", "0"], "seeds_per_scene"),
        (["--model", str(DEFAULT_MODEL), "--steps", "8", "--steps", "0"], "steps"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--data", str(SUBSET), "--n", "2"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
