"""Recipes and parts of the pipeline's folders, and what is said of wrong ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unipic_core.small_runs import picture
from unipic_core.errors import CheckpointError, UniPicError
from unipic_core.pipeline import UniPicPipeline
from unipic_core.pipeline.loading import check_fit, load_parts, open_pipeline
from unipic_core.run.plan import resolve
from unipic_core.weights.recipe import Recipe

# --- recipes ---


def test_defaults_are_those_of_the_release() -> None:
    base = resolve(Recipe())
    assert (base.steps, base.guidance, base.sampler, base.schedule) == (50, 4.0, "euler", "base")
    assert (base.reference_budget, base.output_budget) == (1024, 1024)
    few = resolve(Recipe(sampler="consistency"))
    assert (few.steps, few.guidance, few.schedule) == (8, 1.0, "few_step")


def test_recipe_and_wishes() -> None:
    recipe = Recipe(steps=6, guidance=2.0, sampler="consistency", schedule="few_step", output_budget=128)
    assert resolve(recipe).steps == 6
    assert resolve(recipe).output_budget == 128
    assert resolve(recipe, steps=3, guidance=1.0).guidance == 1.0
    other = resolve(recipe, sampler="euler")  # what the recipe says stays
    assert (other.steps, other.schedule, other.guidance) == (6, "few_step", 2.0)
    open_ = resolve(Recipe(steps=8, sampler="consistency"), sampler="euler")  # the sampler fills what it leaves open
    assert (open_.steps, open_.schedule, open_.guidance) == (8, "base", 4.0)
    assert resolve(recipe, guidance=0).guidance == 1.0  # off, as in the release
    assert resolve(Recipe(guidance=0.0)).guidance == 1.0
    with pytest.raises(UniPicError, match="got 'causal' in the weights' recipe"):
        resolve(Recipe(attention_form="causal"))


def with_transformer(golden: Path, to: Path, recipe: dict[str, Any]) -> Path:
    shutil.copytree(golden / "tiny" / "transformer", to)
    (to / "recipe.json").write_text(json.dumps({"version": 1, **recipe}))
    return to


def test_recipe_and_network_come_with_the_transformer(golden: Path, tmp_path: Path, tiny: UniPicPipeline) -> None:
    recipe = {"steps": 3, "guidance": 1.0, "sampler": "consistency", "schedule": "few_step", "reference_budget": 64}
    other = with_transformer(golden, tmp_path / "ema_transformer", {**recipe, "output_budget": 64})
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    save_file({n: t * 1.1 for n, t in weights.items()}, other / "diffusion_pytorch_model.safetensors")
    pipe = UniPicPipeline.from_pretrained(golden / "tiny", other, torch_dtype=torch.float32, device="cpu")
    out = pipe([picture()], "a", output_type="latent")
    assert (out.settings.steps, out.settings.reference_budget) == (3, 64)
    assert out.images.shape == (1, 4 * 4, 16)  # 40x30 at 64x64 pixels is 74x55, to 32: 64x64
    assert not torch.equal(pipe.transformer.img_in.weight, tiny.transformer.img_in.weight)


# --- folders ---


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    return shutil.copytree(golden / "tiny", tmp_path / "model")


def load(folder: Path, **more: Any) -> UniPicPipeline:
    return UniPicPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu", **more)


def test_missing_parts_are_named_with_what_to_download(folder: Path, golden: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        load(folder / "absent")
    with pytest.raises(CheckpointError, match="is one file, expected a pipeline folder"):
        load(folder / "model_index.json")
    for part in ("vae", "text_encoder"):
        shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=r"no text_encoder/, vae/; download Qwen/Qwen-Image-Edit.*transformer="):
        load(folder)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(CheckpointError, match="has no text_encoder/, vae/; download Qwen/Qwen-Image-Edit"):
        load(folder)


def test_network_missing(folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    with pytest.raises(CheckpointError, match="no transformer in"):
        load(folder)


def test_damaged_vae(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    good = load_file(weights)
    save_file({n: t for n, t in good.items() if "conv_in.weight" not in n}, weights)
    with pytest.raises(CheckpointError, match=r"VAE in .* does not fit its config\.json .*conv_in\.weight"):
        load(folder)
    weights.write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors"):
        load(folder)
    save_file(good, weights)
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="of an AutoencoderKLQwenImage, got one of a AutoencoderKL"):
        load(folder)


def test_parts_of_different_models(folder: Path, golden: Path) -> None:
    config = folder / "vae" / "config.json"
    values = json.loads(config.read_text()) | {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    config.write_text(json.dumps(values))
    from diffusers import AutoencoderKLQwenImage

    AutoencoderKLQwenImage.from_config(values).save_pretrained(folder / "vae")
    with pytest.raises(CheckpointError, match="takes 16 channels a token and gives 16, the VAE has 32"):
        load(folder)


def test_a_network_whose_output_does_not_fit_the_vae(tiny: UniPicPipeline, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny.transformer, "config", replace(tiny.transformer.config, out_channels=16))
    with pytest.raises(CheckpointError, match="takes 16 channels a token and gives 64, the VAE has 16"):
        check_fit(tiny.transformer, tiny.text_encoder, tiny.vae)


def test_float16_is_refused_before_anything_is_loaded(golden: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("unipic_core.pipeline.loading.TextEncoder", None)
    with pytest.raises(CheckpointError, match="float16 overflows"):
        load_parts(open_pipeline(golden / "tiny"), torch.float16, "cpu")


def test_scheduler_config_decides_the_shift(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_shift": 0.25}))
    assert load_parts(open_pipeline(folder), torch.float32, "cpu").shift.base_mu == 0.25
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"scheduler_config.json cannot be read"):
        load(folder)
