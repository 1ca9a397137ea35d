"""LoRAs of the tiny network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.paths import TINY
from unipic_core.weights.lora import save_lora
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import expected_shapes, read_config

SOURCE = TINY / "transformer" / "diffusion_pytorch_model.safetensors"
LAYERS = ("img_in", "transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2")
STUDENT = Recipe(steps=4, guidance=1.0, sampler="consistency", made={"by": "dmd"})


def make_lora(path: Path, seed: int, recipe: Recipe | None = None) -> dict[str, Tensor]:
    """Writes a LoRA; returns what strength 1 adds, by parameter."""
    shapes, g = expected_shapes(read_config(TINY)), torch.Generator().manual_seed(seed)
    draw = lambda *size: (torch.randn(size, generator=g) * 0.1).bfloat16()  # noqa: E731
    pairs = {n: (draw(4, shapes[f"{n}.weight"][1]), draw(shapes[f"{n}.weight"][0], 4)) for n in LAYERS}
    save_lora(path, pairs, recipe=recipe)
    return {f"{n}.weight": up.float() @ down.float() for n, (down, up) in pairs.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
