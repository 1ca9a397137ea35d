"""Runs of FewStepSampler, the kv cache and LoRAs for the tests of causal attention forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_tools import random_inputs
from torch import Tensor
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.unipic_core.weights.lora import build_lora
from unipic_pack.unipic_core.weights.recipe import Recipe

CAUSAL = ("reference_causal", "prefix_causal")
EXACT = 1e-5
STEPS = 3


def conditioning(text: Tensor, references: list[Tensor]) -> list:
    return [[text, {"reference_latents": references}]]


def run(model: Any, cache: str = "auto", cfg: float = 1.0, seed: int = 3, batch: int = 1, **changes: Any) -> Tensor:
    x, text, references = random_inputs(batch)
    text, references = changes.get("text", text[:1]), changes.get("references", references)
    positive = conditioning(text, references)
    negative = conditioning(text[:, :4] * -0.5, changes.get("negative_references", references))
    empty = {"samples": torch.zeros_like(x)}
    out = FewStepSampler.execute(
        model, positive, negative, empty, seed, changes.get("steps", STEPS), cfg, "consistency", 1.0, cache
    )
    return out[0]["samples"]


def cached_sets(model: Any) -> dict[str, int]:
    """REFERENCES and TEXT -> the number of sets in the kv cache."""
    return {piece: len(cache) for piece, cache in model.model.diffusion_model.kv_cache.exact.items()}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=EXACT * float(b.abs().max().clamp_min(1)))


def build(tensors: dict[str, Tensor], recipe: Recipe | None = None) -> Any:
    return build_lora(tensors, tensors.__getitem__, Path("test.safetensors"), {}, recipe)
