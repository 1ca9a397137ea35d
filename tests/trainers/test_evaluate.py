"""The whole evaluation, on the vendored subset of assets."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.paths import TINY
from trainers.evaluate import System, evaluate, main, parser, picture_stores, systems_of, weights_seed
from trainers.judges.measure import Generate, compare
from trainers.judges.saved_pictures import PictureStore
from trainers.judges.scene_plan import SEED_STRIDE, Plan
from trainers.nano.emoji import SUBSET, Bank
from trainers.nano.render import Sample
from unipic_core.pipeline import UniPicPipeline

N = 14


def truth(sample: Sample, seed: int) -> Image.Image:
    return sample.target


def nothing(sample: Sample, seed: int) -> Image.Image:
    return sample.background


@pytest.fixture(scope="module")
def subset() -> Bank:
    return Bank.open(SUBSET)


@pytest.fixture(scope="module")
def measured(subset: Bank) -> dict:
    systems = {"truth": lambda: truth, "nothing": lambda: nothing}
    return compare(systems, subset, Plan(N, seed=3, progress=False), sheet_rows=1).report


def test_a_cpu_of_any_name_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(UniPicPipeline, "from_pretrained", lambda *_, **options: opened.append(options))
    System("tiny", str(TINY)).open("cpu:0")
    assert opened == [{"torch_dtype": torch.float32, "device": "cpu:0"}]


def test_the_truth_as_a_model_scores_as_the_truth(measured: dict) -> None:
    assert (measured["n"], measured["seed"], measured["model"]["label"]) == (N, 3, "truth")
    for name, judge in measured["judges"].items():
        if judge["valid"]:
            assert judge["model"] == judge["controls"]["truth"], name
            assert judge["margins"]["truth"]["difference"] == 0
    assert sum(task["n"] for task in measured["by_task"].values()) == N


def test_the_judges_separate_and_the_truth_beats_what_it_must(measured: dict) -> None:
    judges = measured["judges"]
    for name in ("placement_iou", "placement_centre_error"):
        assert judges[name]["valid"]
        assert all(judges[name]["margins"][control]["beats"] for control in ("background_alone", "positions_shuffled"))
    for name in ("masked_psnr", "object_retrieval_top1"):
        assert judges[name]["margins"]["object_swapped"]["beats"]
    assert judges["placement_iou"]["model"] > 0.8
    assert judges["object_retrieval_top1"]["model"] > 0.9
    assert judges["person_retrieval_top1"]["controls"]["truth"] > 0.9


def test_the_binding_is_judged_of_pairs_alone(subset: Bank) -> None:
    """The truth is bound in every pair, the truth with the two things exchanged in none."""
    pairs = compare({"truth": lambda: truth}, subset, Plan(6, seed=3, tasks=("pair",), progress=False), sheet_rows=0)
    binding = pairs.report["judges"]["binding"]
    assert binding["valid"]
    assert (binding["model"], binding["items"]) == (1, 6)
    assert (binding["controls"]["recomposed"], binding["controls"]["references_swapped"]) == (1, 0)
    others = compare({"truth": lambda: truth}, subset, Plan(3, tasks=("compose3",), progress=False), sheet_rows=0)
    assert others.report["judges"]["binding"]["note"] == "not reported: nothing to judge"


def test_an_empty_picture_finds_nothing(measured: dict) -> None:
    judges = measured["others"][0]["judges"]
    assert judges["placement_iou"]["model"] == 0
    assert judges["placement_centre_error"]["model"] == 0.5
    assert judges["object_retrieval_top1"]["model"] < 0.2
    assert judges["masked_psnr"]["versus_first"]["ci95"][1] < 0
    assert not judges["placement_iou"]["margins"]["background_alone"]["beats"]


def test_the_report_is_plain_json(measured: dict) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    low, high = measured["judges"]["masked_psnr"]["ci95"]
    assert low <= measured["judges"]["masked_psnr"]["model"] <= high


def test_sample_i_is_scene_i_with_seed_plus_i_and_pictures_come_to_its_size(subset: Bank) -> None:
    seen: list[tuple[str, int]] = []

    def large(sample: Sample, seed: int) -> Image.Image:
        seen.append((sample.instruction, seed))
        return sample.target.resize((256, 256))

    result = evaluate(large, subset, 3, seed=40, tasks=["pair", "move"])
    again = list(seen)
    evaluate(large, subset, 2, seed=40, tasks=["pair", "move"])
    assert [seed for _, seed in again] == [40, 41, 42]
    assert seen[3:] == again[:2]
    assert {task: row["n"] for task, row in result.report["by_task"].items()} == {"pair": 2, "move": 1}
    assert result.rows[0].outputs["model"].size == result.rows[0].sample.target.size


def test_scenes_come_at_any_size_and_the_truth_is_judged_alike(subset: Bank) -> None:
    sizes = set()

    def large(sample: Sample, seed: int) -> Image.Image:
        sizes.update({sample.target.size, *(max(r.size) for r in sample.references)})
        return sample.target

    plan = Plan(4, seed=3, progress=False, size=256)
    scenes = [(plan.scene(subset, i), Plan(4, seed=3, progress=False).scene(subset, i)) for i in range(4)]
    assert all(replace(wide, size=128) == small for wide, small in scenes)
    report = compare({"truth": lambda: large}, subset, plan).report
    assert sizes == {(256, 256), 256}
    assert report["size"] == 256
    assert report["judges"]["placement_iou"]["model"] > 0.8
    assert report["judges"]["object_retrieval_top1"]["model"] > 0.9


def test_options_make_one_system_each() -> None:
    args = parser().parse_args(
        ["--model", "a/nano", "--steps", "8", "--steps", "2", "--lora", "none", "--lora", "x.safetensors"]
    )
    first, second = systems_of(args)
    assert (first.label, first.lora, first.steps) == ("nano, 8 steps", None, 8)
    assert (second.label, second.model, second.steps) == ("nano + x, 2 steps", "a/nano", 2)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_controls_only_writes_numbers_and_a_sheet(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, sheet = tmp_path / "c.json", tmp_path / f"c.{ending}"
    options = ["--controls-only", "--n", "3", "--size", "160", "--data", str(SUBSET), "--sheet-rows", "2"]
    assert main([*options, "--json", str(numbers), "--sheet", str(sheet)]) == 0
    report = json.loads(numbers.read_text(encoding="utf-8"))
    assert (report["model"], report["size"]) == (None, 160)
    assert report["judges"]["placement_iou"]["controls"]["background_alone"] == 0
    assert Image.open(sheet).height > 300
    assert "truth" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"c.json", f"c.{ending}"}


def test_the_seed_of_the_weights_follows_their_bytes_alone(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    seed = weights_seed(model)
    (model / "loras").mkdir(exist_ok=True)
    (model / "loras" / "other.safetensors").write_bytes(b"a LoRA")
    (model / "transformer" / "notes.txt").write_text("a note")
    assert weights_seed(model) == seed == weights_seed(TINY)
    weights = next((model / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_seed(model) != seed
    with pytest.raises(ValueError, match="no safetensors files"):
        weights_seed(tmp_path / "empty")


def test_a_pipeline_folder_is_measured_at_the_size_of_its_recipe(tmp_path: Path) -> None:
    numbers, model = tmp_path / "tiny.json", tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "recipe.json").write_text('{"version": 1, "output_budget": 96}', encoding="utf-8")
    options = ["--model", str(model), "--steps", "1", "--cfg", "1", "--sampler", "consistency", "--device", "cpu"]
    options += ["--n", "2", "--seed", "weights", "--task", "compose2", "--data", str(SUBSET)]
    assert main([*options, "--json", str(numbers)]) == 0
    report = json.loads(numbers.read_text(encoding="utf-8"))
    assert (report["seed"], report["size"]) == (weights_seed(model), 96)
    assert report["model"]["steps"] == 1
    assert report["model"]["seconds_per_picture"] > 0


def test_a_run_that_was_broken_off_goes_on_with_its_pictures_and_their_times(subset: Bank, tmp_path: Path) -> None:
    calls: list[int] = []

    def opener() -> Generate:
        calls.append(-1)

        def generate(sample: Sample, seed: int) -> Image.Image:
            if calls.count(-1) == 1 and len(calls) == 6:
                raise KeyboardInterrupt
            calls.append(seed)
            time.sleep(0.01)
            return sample.background if seed % 2 else sample.target

        return generate

    plan = Plan(4, seed=3, progress=False, seeds_per_scene=2)

    def measure(kept: PictureStore | None) -> dict:
        return compare({"m": opener}, subset, plan, stores=kept and {"m": kept}).report

    kept = PictureStore(tmp_path, {"model": "m", "steps": 4})
    with pytest.raises(KeyboardInterrupt):
        measure(kept)
    assert calls == [-1, 3, 3 + SEED_STRIDE, 4, 4 + SEED_STRIDE, 5]
    first = measure(kept)
    assert calls[6:] == [-1, 5 + SEED_STRIDE, 6, 6 + SEED_STRIDE]
    again = measure(PictureStore(tmp_path, {"steps": 4, "model": "m"}))
    assert again == first
    assert len(calls) == 10  # nothing was opened
    assert first["model"].pop("seconds_per_picture") >= 0.01
    assert kept.folder.parent == tmp_path

    other = measure(PictureStore(tmp_path, {"model": "m", "steps": 8}))
    assert len(calls) == 19  # other facts, other pictures
    del other["model"]["seconds_per_picture"]
    plain = measure(None)
    del plain["model"]["seconds_per_picture"]
    assert first == other == plain


def test_the_command_keeps_pictures_until_the_weights_are_others(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    options = ["--model", str(model), "--steps", "1", "--cfg", "1", "--sampler", "consistency", "--device", "cpu"]
    options += ["--n", "2", "--task", "compose2", "--data", str(SUBSET), "--keep", str(tmp_path / "kept")]
    options += ["--size", "128"]
    assert main(options) == 0
    [folder] = (tmp_path / "kept").iterdir()
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert set(made) == {"0.png", "1.png"}
    assert main([*options, "--label", "another name"]) == 0
    assert made == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    os.utime(next((model / "transformer").glob("*.safetensors")))
    assert main(options) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_pictures_of_scenes_of_other_assets_are_not_found_again(subset: Bank, tmp_path: Path) -> None:
    args = parser().parse_args(["--model", str(TINY), "--label", "a", "--keep", str(tmp_path / "kept")])
    (tmp_path / "fewer").mkdir()
    shutil.copy(SUBSET / "1f3b8.webp", tmp_path / "fewer")
    stores = [
        picture_stores(args, systems_of(args), Plan(2), bank, {"a": {"steps": 4}})["a"]
        for bank in (subset, Bank.open(SUBSET), Bank.open(tmp_path / "fewer"))
    ]
    assert stores[0].folder == stores[1].folder != stores[2].folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--controls-only", "--n", "1"], "n must be at least 2"),
        (["--n", "5"], "--model is missing"),
        (["--model", "no/such/model", "--n", "2"], "no/such/model"),
        (["--controls-only", "--size", "100"], "a multiple of 32"),
        (["--controls-only", "--task", "dance"], "dance"),
        (["--controls-only", "--json", "no/such/folder/a.json"], "cannot write"),
        (["--controls-only", "--sheet", "sheet.txt"], ".png"),
        (["--model", "a", "--steps", "1", "--steps", "2", "--cfg", "1", "--cfg", "2", "--cfg", "3"], "--steps"),
        (["--controls-only", "--data", "no/such/pictures"], "no pictures"),
        (["--controls-only", "--seed", "weights"], "--seed weights needs --model"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = [] if "--data" in options else ["--data", str(SUBSET)]
    assert main([*options, *data]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1
