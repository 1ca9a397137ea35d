"""Cache of the vision tower's outputs: prompt, negative prompt and later prompts share them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from comfy.sd import CLIP
from torch import Tensor

from ....unipic_core.caching import TensorCache, WeightsKey
from ....unipic_core.conditioning.reference_sizes import MAX_REFERENCES
from .tokenizer import KEY

_embeddings: TensorCache[Tensor] = TensorCache(MAX_REFERENCES)
"""Outputs for the last pictures, in main memory: at the release's size up to 34 MB for one picture or one set."""


def clear_cache() -> None:
    """Empty the cache."""
    _embeddings.clear()


@contextmanager
def shared_tower(clip: CLIP) -> Iterator[None]:
    """Context in which the vision tower of a Qwen2.5-VL CLIP reuses its outputs for recent pictures.

    Works for ComfyUI's own class too, since it replaces the tower's forward. An output belongs to the pixels, to the
    state of the weights and to the patches that ComfyUI applies to them.
    """
    tower = getattr(clip.cond_stage_model, KEY).transformer.visual
    if "forward" in vars(tower):  # replaced by another node pack: its output may depend on anything
        yield
        return
    run, patches = tower.forward, clip.patcher.patches_uuid

    def forward(pixels: Tensor, grid: Tensor) -> Tensor:
        key = (WeightsKey(tower), patches, pixels.device, tuple(grid.flatten().tolist()))
        return _embeddings.get(key, [pixels.cpu()], lambda: run(pixels, grid).cpu()).to(pixels.device)

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward
