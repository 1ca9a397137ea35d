"""What the tests of MODEL share: inputs, and the velocity through ComfyUI's apply_model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import load_file
from torch import Tensor
from unipic_pack.unipic_core.conditioning.sequence import LatentShape, unpack_latents
from unipic_pack.unipic_core.model.vae import VAEConfig

torch.set_num_threads(1)


class Case:
    """A golden case as ComfyUI's latents."""

    def __init__(self, folder: Path) -> None:
        self.info = json.loads((folder / "case.json").read_text())
        self.tensors = load_file(folder / "tensors.safetensors")
        _, h, w = self.info["img_shapes"][0]
        self.shape = LatentShape(1, h, w)
        self.noise = unpack_latents(self.tensors["noise"], self.shape)
        self.references = [self.tensors[n] for n in sorted(self.tensors) if n.startswith("reference_latent_")]
        self.text = self.tensors["prompt_embeds"]

    def latents(self, step: int) -> Tensor:
        """After a step, counted from 1."""
        return unpack_latents(self.tensors[f"latents_after_step_{step}"], self.shape)


def velocity(patcher: Any, x: Tensor, sigma: float, text: Tensor, references: list[Tensor], **kwargs: Any) -> Tensor:
    """From apply_model's denoised = x - sigma v."""
    management.load_models_gpu([patcher])
    options = {**patcher.model_options["transformer_options"], **kwargs.pop("transformer_options", {})}
    t = torch.full((x.shape[0],), sigma)
    x0 = patcher.model.apply_model(
        x, t, c_crossattn=text, ref_latents=references, transformer_options=options, **kwargs
    )
    return (x - x0) / sigma


def random_inputs(batch: int = 1, words: int = 9, width: int = 128, channels: int = 16) -> tuple[Tensor, Tensor, list]:
    generator = torch.Generator().manual_seed(5)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    references = [randn(1, channels, 1, 6, 10), randn(1, channels, 1, 12, 4)]
    return randn(batch, channels, 1, 8, 8), randn(batch, words, width), references


def four_channels() -> VAEConfig:
    return VAEConfig(z_dim=4, latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(0.9, 1.1, 1.3, 0.7))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def lora_file(pattern: str, rank: int = 4, width: int = 160) -> dict[str, Tensor]:
    """Random LoRA weights for two layers of every block. pattern: takes the layer and A or B."""
    generator = torch.Generator().manual_seed(11)
    layers = [f"transformer_blocks.{i}.attn.{n}" for i in range(6) for n in ("to_q", "add_v_proj")]
    return {
        pattern.format(layer, end): torch.randn(size, generator=generator) * 0.2
        for layer in layers
        for end, size in (("A", (rank, width)), ("B", (width, rank)))
    }


def patched(patcher: Any, lora: dict[str, Tensor]) -> Any:
    patcher = patcher.clone()
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), key_map)
    assert len(patcher.add_patches(patches, 1.0)) == 12
    return patcher
