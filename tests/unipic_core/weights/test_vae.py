"""VAEs on disk: our names and shapes against diffusers', there and back, single files, and what can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file, save_file

from unipic_core.errors import CheckpointError
from unipic_core.model.vae import ImageVAE, VAEConfig
from unipic_core.weights.vae import (
    config_of_file,
    load_image_vae,
    name_in_file,
    open_vae,
    read_vae_config,
    video_shapes,
    video_weights,
)

CONFIGS = [
    VAEConfig(),
    VAEConfig(base_dim=16, num_res_blocks=1),
    VAEConfig(base_dim=8, dim_mult=(1, 1, 2, 3), num_res_blocks=3, temperal_downsample=(True, False, True)),
]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("config", CONFIGS, ids=["released", "nano", "odd"])
def test_names_and_shapes_are_those_of_diffusers(config: VAEConfig) -> None:
    with torch.device("meta"):
        ours = ImageVAE(config)
        theirs = AutoencoderKLQwenImage.from_config(config.to_dict())
    assert video_shapes(ours) == {name: tuple(p.shape) for name, p in theirs.state_dict().items()}


def written(folder: Path, vae: ImageVAE) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: w.contiguous() for k, w in video_weights(vae).items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(vae.config.to_dict()))
    return folder


def test_weights_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = ImageVAE(CONFIGS[2])
    folder = written(tmp_path / "vae", vae)
    loaded = load_image_vae(folder)
    assert loaded.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(w, vae.state_dict()[name]) for name, w in loaded.state_dict().items())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert AutoencoderKLQwenImage.from_pretrained(folder).config.base_dim == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_and_memory_of_what_is_loaded(golden: Path, dtype: torch.dtype) -> None:
    vae = load_image_vae(golden / "tiny" / "vae", dtype)
    assert {p.dtype for p in vae.parameters()} == {dtype}
    # a view of a video kernel would keep three times the memory alive
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in vae.parameters())
    assert open_vae(golden / "tiny" / "vae").parameters == sum(p.numel() for p in vae.parameters())
    kernel = vae.decoder.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    return shutil.copytree(golden / "tiny" / "vae", tmp_path / "vae")


def test_config_of_the_tiny_model(folder: Path) -> None:
    config = read_vae_config(folder)
    assert (config.z_dim, config.latents_std) == (4, (0.9, 1.1, 1.3, 0.7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "of an AutoencoderKLQwenImage, got one of a AutoencoderKL; take vae/"),
        ({"_class_name": None}, "got one of a None"),
        ({"latents_mean": [0.0]}, "should each be 4 numbers"),
        ({"latents_std": [0.0] * 4}, "should each be 4 numbers, the latter above 0"),
        ({"latents_std": [float("nan")] * 4}, "should each be 4 numbers, the latter above 0"),
        ({"latents_std": ["a"] * 4}, "cannot be read"),
        ({"base_dim": 0}, "base_dim should be a whole number from 1 to 65536, got 0"),
        ({"z_dim": 4.0}, "z_dim should be a whole number from 1 to 65536, got 4.0"),
        ({"num_res_blocks": 10**9}, "num_res_blocks should be a whole number from 1 to 100, got 1000000000"),
        ({"dim_mult": [1, 2]}, r"dim_mult should be 4 values, got \[1, 2\]"),
        ({"dim_mult": [1, 2, 4, 10**9]}, "dim_mult should be 4 values"),
        ({"dim_mult": 7}, "cannot be read"),
        ({"temperal_downsample": []}, "temperal_downsample should be 3 values"),
    ],
)
def test_damaged_configs(folder: Path, change: dict[str, Any], message: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_image_vae(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, "\ud800"])
def test_configs_that_are_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read .*download the vae folder again"):
        read_vae_config(folder)


def test_absent_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no vae/config\.json; download vae/ from a Qwen-Image"):
        read_vae_config(tmp_path / "vae")


@pytest.mark.parametrize("shape", [(8, 3, 0, 3, 3), (8, 3, 3), (8, 3, 3, 5, 5), None])
def test_weights_that_do_not_fit_are_named(folder: Path, shape: tuple[int, ...] | None) -> None:
    name = "encoder.conv_in.weight"
    tensors = {n: t for n, t in load_file(folder / WEIGHTS).items() if n != name}
    save_file(tensors | ({name: torch.zeros(shape)} if shape else {}), folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json .*encoder\.conv_in\.weight") as caught:
        load_image_vae(folder)
    assert "\n" not in str(caught.value)


def test_damaged_weights(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load_image_vae(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="expected a .safetensors or .bin file"):
        load_image_vae(folder)


# --- one file, as ComfyUI has it; the nodes' tests compare it with ComfyUI's own VAE ---


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("post_quant_conv.bias", "conv2.bias"),
        ("encoder.down_blocks.3.conv_shortcut.weight", "encoder.downsamples.3.shortcut.weight"),
        ("encoder.mid_block.attentions.0.norm.gamma", "encoder.middle.1.norm.gamma"),
        ("decoder.up_blocks.1.resnets.2.conv2.weight", "decoder.upsamples.6.residual.6.weight"),
        ("decoder.up_blocks.2.upsamplers.0.time_conv.bias", "decoder.upsamples.11.time_conv.bias"),
    ],
)
def test_names_in_a_file(name: str, stored: str) -> None:
    assert name_in_file(name, VAEConfig()) == stored


def in_one_file(file: Path, vae: ImageVAE, **changes: torch.Tensor) -> Path:
    tensors = {name_in_file(k, vae.config): w.contiguous() for k, w in video_weights(vae).items()}
    assert len(tensors) == len(video_weights(vae))
    save_file(tensors | changes, file)
    return file


def test_a_file_gives_the_same_as_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = ImageVAE(VAEConfig(base_dim=8))
    loaded = load_image_vae(in_one_file(tmp_path / "qwen_image_vae.safetensors", vae))
    assert loaded.config == vae.config
    assert all(torch.equal(w, vae.state_dict()[name]) for name, w in loaded.state_dict().items())
    assert loaded.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_files_of_another_vae(tmp_path: Path) -> None:
    vae = ImageVAE(VAEConfig(base_dim=8))
    layered = {"encoder.conv1.weight": torch.zeros(8, 4, 3, 3, 3)}  # pictures of four channels
    for changes in (layered, {"vae.more.weight": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match=r"is not the Qwen-Image VAE in ComfyUI's layout; use qwen_image_vae"):
            load_image_vae(in_one_file(tmp_path / "other.safetensors", vae, **changes))
    for shape in ((), (0,), (10**9,)):
        assert config_of_file({"decoder.head.0.gamma": shape}) is None
    assert config_of_file({}) is None
