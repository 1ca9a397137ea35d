"""Patches for Qwen2.5-VL's vision tower: its image processor, without transformers."""

from __future__ import annotations

from torch import Tensor

PATCH, MERGE, FRAMES = 14, 2, 2
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def vision_patches(pictures: Tensor) -> Tensor:
    """Cut pictures [B, 3, H, W] in [0, 1], H and W multiples of 28, into patches [B, H/14 * W/14, 1176].

    The order is that of transformers' `Qwen2VLImageProcessor`: patches by (merge row, merge column, row in the merge
    group, column in it), values by (channel, frame, y, x); one picture counts as two equal frames. Raises ValueError
    for other sizes.
    """
    b, c, height, width = pictures.shape
    if height % (PATCH * MERGE) or width % (PATCH * MERGE):
        raise ValueError(f"expected sides of multiples of {PATCH * MERGE} pixels, got {width}x{height}")
    mean, std = pictures.new_tensor([MEAN, STD])[..., None, None]
    x = (pictures - mean) / std
    x = x.reshape(b, c, height // (PATCH * MERGE), MERGE, PATCH, width // (PATCH * MERGE), MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    x = x.expand(-1, -1, -1, -1, -1, -1, FRAMES, -1, -1)
    return x.reshape(b, (height // PATCH) * (width // PATCH), c * FRAMES * PATCH * PATCH)


def grid_thw(height: int, width: int) -> tuple[int, int, int]:
    """Number of patches of one picture over (time, height, width). height, width: in pixels."""
    return 1, height // PATCH, width // PATCH


def vision_tokens(height: int, width: int) -> int:
    """Number of prompt tokens of one picture. height, width: in pixels."""
    return (height // (PATCH * MERGE)) * (width // (PATCH * MERGE))


POSITIONS = ("multimodal", "sequential")
"""RoPE positions of image tokens in the encoder: (frame, row, column), as Qwen2.5-VL was trained, or one by one."""


def encoder_positions(configured: str | None, transformers_version: str | None) -> str:
    """Choose the encoder's positions, one of POSITIONS.

    configured: `unipic_positions` of the encoder's config.json, which decides if present. Otherwise the version of
    transformers that wrote the config decides: from 5.3 on it numbers one by one unless it gets the token types, which
    the Qwen-Image pipelines never pass (huggingface/diffusers#14194), so weights trained with it need "sequential".
    """
    if configured:
        return str(configured)
    numbers = tuple(int(n) for n in (transformers_version or "5.3").split(".")[:2] if n.isdigit())
    return "sequential" if numbers >= (5, 3) else "multimodal"
