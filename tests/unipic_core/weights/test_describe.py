"""`describe` says what a path holds, without reading tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import TINY
from unipic_core.errors import CheckpointError
from unipic_core.weights.convert import convert
from unipic_core.weights.describe import describe, format_description
from unipic_core.weights.formats.tensor_spec import TensorSpec
from unipic_core.weights.lora import save_lora
from unipic_core.weights.recipe import Recipe


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor of more than a few bytes fails the test."""
    read = TensorSpec.read

    def small_only(spec: TensorSpec) -> torch.Tensor:
        assert spec.nbytes < 200, f"read a tensor of {spec.nbytes} bytes"
        return read(spec)

    monkeypatch.setattr(TensorSpec, "read", small_only)


@pytest.mark.usefixtures("no_reading")
def test_a_pipeline_folder() -> None:
    info = describe(TINY)
    assert info["kind"] == "pipeline"
    assert info["missing"] == []
    transformer = info["parts"]["transformer"]
    assert transformer["kind"] == "transformer"
    assert (transformer["layers"], transformer["width"], transformer["heads"]) == (2, 64, 2)
    assert info["parts"]["vae"]["kind"] == "vae"
    assert info["parts"]["vae"]["class"] == "AutoencoderKLQwenImage"
    assert info["parts"]["text_encoder"]["kind"] == "text encoder"
    stored = load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors")
    assert transformer["parameters"] == sum(t.numel() for t in stored.values())
    assert transformer["bytes"] == sum(t.nbytes for t in stored.values())
    assert transformer["dtypes"] == {"float32": transformer["parameters"]}
    assert info["parameters"] == sum(info["parts"][p]["parameters"] for p in ("transformer", "vae", "text_encoder"))
    assert info["recipe"] is None
    json.dumps(info)
    text = format_description(info)
    assert "2 layers, width 64, 2 heads of 32" in text
    assert "MISSING" not in text


def test_missing_parts_are_said(tmp_path: Path) -> None:
    for part in ("transformer", "tokenizer"):
        shutil.copytree(TINY / part, tmp_path / part)
    (tmp_path / "vae").mkdir()
    (tmp_path / "recipe.json").write_text(Recipe(steps=8, guidance=1.0).to_json())
    info = describe(tmp_path)
    assert info["missing"] == ["text_encoder", "vae", "processor", "scheduler"]
    assert info["recipe"]["steps"] == 8
    text = format_description(info)
    assert text.count("MISSING") == 4
    assert "steps 8, guidance 1.0" in text


@pytest.mark.usefixtures("no_reading")
def test_bare_folders_and_files(tmp_path: Path) -> None:
    shutil.copytree(TINY / "transformer", tmp_path / "Unipic3-DMD" / "ema_transformer")
    for path in (tmp_path / "Unipic3-DMD", tmp_path / "Unipic3-DMD" / "ema_transformer"):
        info = describe(path)
        assert (info["kind"], info["layers"], info["format"]) == ("transformer", 2, "safetensors")
        assert (info["recipe"]["steps"], info["recipe_source"]) == (8, "name")
        assert "known by the name of the folder" in format_description(info)


def test_a_converted_file(tmp_path: Path) -> None:
    info = describe(convert(TINY, tmp_path / "o.safetensors", dtype="fp8_scaled"))
    assert info["kind"] == "transformer"
    assert info["scaled_fp8"]
    assert set(info["dtypes"]) == {"float8_e4m3fn", "bfloat16"}
    assert info["recipe_source"] == "file"
    assert "float8_e4m3fn + bfloat16" in format_description(info)


def test_a_guess_stays_a_guess_in_a_converted_file(tmp_path: Path) -> None:
    source = shutil.copytree(TINY / "transformer", tmp_path / "Unipic3-DMD" / "ema_transformer")
    info = describe(convert(source, tmp_path / "o.safetensors"))
    assert (info["recipe"]["steps"], info["recipe"]["made"]["recipe_from"]) == (8, "name")
    assert info["recipe_source"] == "name"


def test_a_pickle(tmp_path: Path) -> None:
    state = load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.save({n: t.bfloat16() for n, t in state.items()}, tmp_path / "m.bin")
    info = describe(tmp_path / "m.bin")
    assert (info["format"], info["kind"], info["layers"], info["heads"]) == ("pickle", "transformer", 2, 2)
    assert list(info["dtypes"]) == ["bfloat16"]


@pytest.mark.usefixtures("no_reading")
def test_a_lora(tmp_path: Path) -> None:
    layers = {f"transformer_blocks.{i}.attn.to_q": (torch.zeros(4, 64), torch.zeros(64, 4)) for i in range(2)}
    save_lora(tmp_path / "l.safetensors", layers, recipe=Recipe(steps=4, attention_form="prefix_causal"))
    info = describe(tmp_path / "l.safetensors")
    assert (info["kind"], info["layers"], info["ranks"], info["alphas"]) == ("lora", 2, [4], [])
    assert info["targets"] == {"attn.to_q": 2}
    assert info["recipe"]["steps"] == 4
    text = format_description(info)
    assert "2 layers, rank 4," in text
    assert "2 x attn.to_q" in text
    assert "attention prefix_causal" in text
    others = {"down.weight": torch.zeros(4, 64), "up.weight": torch.zeros(64, 4)}
    named = {f"lora_unet_transformer_blocks_0_attn_to_q.lora_{part}": tensor for part, tensor in others.items()}
    save_file(
        {**named, "lora_unet_transformer_blocks_0_attn_to_q.alpha": torch.tensor(8.0)}, tmp_path / "o.safetensors"
    )
    assert "1 layers, rank 4, alpha 8" in format_description(describe(tmp_path / "o.safetensors"))


def test_a_recipe_by_a_loras_name_is_a_guess(tmp_path: Path) -> None:
    save_lora(tmp_path / "qwen-lightning-4steps.safetensors", {"img_in": (torch.ones(2, 16), torch.ones(64, 2))})
    info = describe(tmp_path / "qwen-lightning-4steps.safetensors")
    assert (info["recipe"]["steps"], info["recipe_source"]) == (4, "name")
    assert "known by the name of the folder or file" in format_description(info)


def test_a_causal_network(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_form": "reference_causal"}))
    info = describe(folder)
    assert info["attention_form"] == "reference_causal"
    assert "attention reference_causal" in format_description(info)
    assert "attention" not in format_description(describe(TINY / "transformer"))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": 5}, None),
        ({"architectures": True, "_class_name": ["x"]}, None),
        ({"architectures": [5, "Mine"], "_class_name": ""}, "Mine"),
        ({"_class_name": "AutoencoderKL", "architectures": {}}, "AutoencoderKL"),
        ([], None),
    ],
)
def test_configs_of_any_form(config: object, name: str | None, tmp_path: Path) -> None:
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert describe(tmp_path / "vae")["class"] == name


def test_other_weights_are_named(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    info = describe(tmp_path / "flux.safetensors")
    assert info["kind"] == "unknown"
    assert "FLUX" in format_description(info)
    assert describe(TINY / "vae")["kind"] == "vae"


def test_nothing_readable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file or folder"):
        describe(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no transformer in"):
        describe(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="fetch it again"):
        describe(tmp_path)
