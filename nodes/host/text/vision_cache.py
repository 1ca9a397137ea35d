"""What the vision tower makes of pictures, shared by all texts on them: prompt, negative, and prompts that follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from comfy.sd import CLIP
from torch import Tensor

from ....unipic_core.caching import TensorCache, WeightsKey
from ....unipic_core.conditioning.reference_sizes import MAX_REFERENCES
from .tokenizer import KEY

_seen: TensorCache[Tensor] = TensorCache(MAX_REFERENCES)
"""Of the last pictures, in main memory: at the release's size up to 34 MB each, and as much for all of one set."""


def clear_cache() -> None:
    """Forget what the tower made."""
    _seen.clear()


@contextmanager
def shared_tower(clip: CLIP) -> Iterator[None]:
    """While this lasts, the tower of a Qwen2.5-VL CLIP does not run for pictures that it has lately seen.

    Works for ComfyUI's own class too, since it stands before the tower itself. Known are the pictures by their pixels,
    and the weights by their state and by the patches that ComfyUI may apply to them without changing them.
    """
    tower = getattr(clip.cond_stage_model, KEY).transformer.visual
    if "forward" in vars(tower):  # another node pack has put something in its place, which may depend on anything
        yield
        return
    run, patches = tower.forward, clip.patcher.patches_uuid

    def forward(pixels: Tensor, grid: Tensor) -> Tensor:
        key = (WeightsKey(tower), patches, pixels.device, tuple(grid.flatten().tolist()))
        return _seen.get(key, [pixels.cpu()], lambda: run(pixels, grid).cpu()).to(pixels.device)

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward
