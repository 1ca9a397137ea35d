"""Recipes: round trips, merging, where they are found, and clear errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unipic_core.errors import CheckpointError
from unipic_core.weights.recipe import (
    METADATA_KEY,
    RELEASED_BASE,
    RELEASED_FEW_STEP,
    Recipe,
    recipe_of,
    released_recipe,
    step_lora_recipe,
)


def test_defaults_are_those_of_the_released_weights() -> None:
    assert (RELEASED_BASE.steps, RELEASED_BASE.guidance, RELEASED_BASE.sampler, RELEASED_BASE.schedule) == (
        50,
        4.0,
        "euler",
        "base",
    )
    assert (RELEASED_FEW_STEP.steps, RELEASED_FEW_STEP.guidance) == (8, 1.0)
    assert (RELEASED_FEW_STEP.sampler, RELEASED_FEW_STEP.schedule) == ("consistency", "few_step")
    assert {r.reference_budget for r in (RELEASED_BASE, RELEASED_FEW_STEP)} == {1024}
    assert {r.output_budget for r in (RELEASED_BASE, RELEASED_FEW_STEP)} == {1024}


def test_round_trip_keeps_unknown_fields_of_a_newer_version() -> None:
    text = json.dumps(
        {"version": 7, "steps": 4, "made": {"by": "sft", "loss": 0.1}, "colour": [1, 2], "later": {"a": None}}
    )
    recipe = Recipe.from_json(text)
    assert recipe.version == 7
    assert recipe.steps == 4
    assert recipe.extra == {"colour": [1, 2], "later": {"a": None}}
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["colour"] == [1, 2]


def test_absent_fields_are_none_and_written_as_absent() -> None:
    assert Recipe.from_json({}) == Recipe()
    assert json.loads(Recipe().to_json()) == {"version": 1, "attention_form": "full"}
    assert Recipe.from_json({"steps": None, "guidance": 2}).guidance == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("steps", 2.5),
        ("steps", "8"),
        ("steps", True),
        ("steps", []),
        ("steps", float("nan")),
        ("steps", float("inf")),
        ("guidance", -1),
        ("guidance", "4"),
        ("guidance", True),
        ("guidance", float("inf")),
        ("sampler", "heun"),
        ("sampler", ["euler"]),
        ("schedule", "linear"),
        ("version", 0),
        ("shift", 0),
        ("shift", "3"),
        ("made", "by hand"),
        ("attention_form", 3),
        ("reference_budget", "1024"),
        ("steps", 10**9),
        ("steps", 10**400),
        ("guidance", 1e30),
        ("output_budget", 16),
        ("reference_budget", 10**6),
    ],
)
def test_wrong_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{field} should be .*got"):
        Recipe.from_json({field: value})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '"euler"', "[" * 100_000])
def test_what_is_no_table_is_a_clear_error(text: str) -> None:
    with pytest.raises(CheckpointError, match="recipe"):
        Recipe.from_json(text)


def test_a_loras_set_fields_win() -> None:
    base = Recipe(
        steps=50, guidance=4.0, sampler="euler", output_budget=512, made={"by": "sft"}, extra={"a": 1, "b": 1}
    )
    lora = Recipe(version=2, steps=8, sampler="consistency", made={"by": "dmd"}, extra={"b": 2})
    merged = base.merge(lora)
    assert (merged.steps, merged.guidance, merged.sampler, merged.output_budget) == (8, 4.0, "consistency", 512)
    assert merged.made == {"base": {"by": "sft"}, "by": "dmd"}
    assert merged.extra == {"a": 1, "b": 2}
    assert merged.version == 2
    assert base.merge(None) is base
    assert base.merge(Recipe()) == base
    assert Recipe(attention_form="cached").merge(Recipe()).attention_form == "cached"


def write(path: Path, steps: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Recipe(steps=steps).to_json())


def steps_at(path: Path) -> int | None:
    recipe = Recipe.read(path)
    return recipe.steps if recipe else None


def test_read_finds_it_in_pipeline_and_transformer_folders(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    assert Recipe.read(tmp_path) is None
    write(tmp_path / "transformer" / "recipe.json", 3)
    assert steps_at(tmp_path) == 3
    write(tmp_path / "recipe.json", 5)
    assert steps_at(tmp_path) == 5
    assert steps_at(tmp_path / "transformer") == 3
    (tmp_path / "transformer" / "recipe.json").unlink()
    assert steps_at(tmp_path / "transformer") == 5
    (tmp_path / "other").mkdir()
    assert Recipe.read(tmp_path / "other") is None


def test_read_finds_it_in_a_files_metadata_before_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file, {METADATA_KEY: Recipe(steps=6).to_json()})
    assert steps_at(file) == 6
    assert steps_at(tmp_path) == 6
    write(tmp_path / "recipe.json", 7)
    (tmp_path / "config.json").write_text("{}")
    assert steps_at(file) == 6
    assert steps_at(tmp_path) == 7
    save_file({"a": torch.zeros(1)}, file)
    assert steps_at(file) == 7


def test_a_wrong_recipe_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"steps": "many"}')
    with pytest.raises(CheckpointError, match=r"recipe\.json: the recipe's steps"):
        Recipe.read(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file, {METADATA_KEY: "{"})
    with pytest.raises(CheckpointError, match="model.safetensors: the recipe is not JSON"):
        Recipe.read(file)


FEW_STEP_NAMES = (
    *("unipic3-cm", "unipic3_lcm", "UniPic3.0-DMD", "unipic3dmd", "Unipic3_8step_DMD", "UniPic-3-DMD", "unipic3_cm"),
    *("unipic-3-consistency-model", "Unipic3ConsistencyModel", "UNIPIC3 DMD", "unipic_3.0_lcm", "Unipic3-8steps"),
    *("DMD/step20000/transformer", "CM/step_300/transformer", "DMD/step20000", "Unipic3-CM/checkpoint-7/transformer"),
    *("Unipic3-DMD/model.safetensors", "UniPic-3-DMD/unipic3_bf16.safetensors", "unipic3_dmd_fp8_e4m3fn.safetensors"),
    *("unipic3-dmd/diffusion_pytorch_model-00001-of-00002.safetensors", "Unipic3/dmd.safetensors"),
    *("DMD/step20000/transformer/diffusion_pytorch_model.safetensors", "unipic3-lcm/transformer/mine.safetensors"),
    *("models--a--UniPic3.0-CM/snapshots/01", "models--a--unipic3_lcm/snapshots/01/model.safetensors"),
)
BASE_NAMES = (
    *("dmd tests/unipic3-base.safetensors", "cm/unipic3.safetensors", "home/cm/models/unipic3/transformer"),
    *("Unipic3-dmd/unipic3-base.safetensors", "lcm/Unipic3", "dmd/step/Unipic-3.0", "unipic3-step20000.safetensors"),
    *("DMD/Unipic3/step20000/transformer", "unipic3-50steps.safetensors", "unipic3_2000steps", "unipic3-cmyk"),
    *("unipic3-style-v2-step1000.safetensors", "unipic3-epoch4-step20000", "unipic3-v2/step1000/transformer"),
)
UNKNOWN_NAMES = ("dmd tests/model.safetensors", "home/cm/mine/transformer", "Qwen-Image-Edit-2509", "step20000")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Unipic3", RELEASED_BASE),
        ("Unipic3-DMD", RELEASED_FEW_STEP),
        ("models--Skywork--Unipic3-Consistency-Model/snapshots/0123/ema_transformer", RELEASED_FEW_STEP),
        ("unipic3_dmd.safetensors", RELEASED_FEW_STEP),
        ("Qwen-Image-Edit", None),
        ("models--Skywork--Unipic3-DMD/snapshots/0123", RELEASED_FEW_STEP),
        ("models--Skywork--Unipic3/snapshots/0123/transformer", RELEASED_BASE),
        ("Unipic3-DMD/transformer/diffusion_pytorch_model.safetensors", RELEASED_FEW_STEP),
        ("Unipic3-DMD/mine", None),
        ("unipic3/runs/mine/transformer", None),
        ("unipic3-dmd/mine.safetensors", None),
        *((name, RELEASED_FEW_STEP) for name in FEW_STEP_NAMES),
        *((name, RELEASED_BASE) for name in BASE_NAMES),
        *((name, None) for name in UNKNOWN_NAMES),
        ("unipic3_4steps.safetensors", replace(RELEASED_FEW_STEP, steps=4)),
    ],
)
def test_released_weights_are_known_by_name(tmp_path: Path, name: str, expected: Recipe | None) -> None:
    assert released_recipe(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen-Image-Edit-Lightning-4steps-V1.0-bf16", (4, "euler", "fixed_shift", 3.0)),
        ("Qwen-Image-Edit-2509-Lightning-8steps-V1.0-fp32", (8, "euler", "fixed_shift", 3.0)),
        ("qwen_lightning", (8, "euler", "fixed_shift", 3.0)),
        ("lightning-4steps-2509", (4, "euler", "fixed_shift", 3.0)),
        ("turbo_4step", (4, "euler", "fixed_shift", 3.0)),
        ("turbo8steps-v2", (8, "euler", "fixed_shift", 3.0)),
        ("8-step-lora", (8, "euler", "fixed_shift", 3.0)),
        ("unipic3dmd4steps", (4, "consistency", "few_step", None)),
        ("unipic3-dmd-lora", (8, "consistency", "few_step", None)),
        ("style_2000steps", None),
        ("style-step4", None),
        ("dmd", None),
        ("mychar-v2-step00001000", None),
        ("style_v2_steps2000", None),
        ("anime-epoch3-step1200", None),
        ("lora-rank16-step500", None),
        ("char_r8_step_3000", None),
        ("char_v2step1000", None),
        ("2-step-1000", None),
        ("rank16-steps-final", None),
        ("lightning_bolt_effect", None),
        ("style-lightning-photo", None),
    ],
)
def test_step_loras_are_known_by_name(name: str, expected: tuple[object, ...] | None) -> None:
    recipe = step_lora_recipe(f"4steps dmd/{name}.safetensors")
    assert (recipe and (recipe.steps, recipe.sampler, recipe.schedule, recipe.shift)) == expected
    assert recipe is None or recipe.guidance == 1
    assert recipe is None or Recipe.from_json(recipe.to_json()) == recipe


def test_recipe_of_fills_what_is_known_and_leaves_the_rest_open(tmp_path: Path) -> None:
    assert recipe_of(tmp_path) == Recipe()
    write(tmp_path / "recipe.json", 12)
    assert recipe_of(tmp_path) == Recipe(steps=12)
    (tmp_path / "ema_transformer").mkdir()
    assert recipe_of(tmp_path) == RELEASED_FEW_STEP.merge(Recipe(steps=12))
