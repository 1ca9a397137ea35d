"""Pictures to the patches that Qwen2.5-VL's vision tower takes: its image processor, without transformers."""

from __future__ import annotations

from torch import Tensor

PATCH, MERGE, FRAMES = 14, 2, 2
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def vision_patches(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1], H and W multiples of 28 -> [B, H/14 * W/14, 1176], 2x2 merge groups together.

    The order is transformers' `Qwen2VLImageProcessor`'s: (merge row, merge column, row in it, column in it) and then
    (channel, frame, y, x); one picture is two equal frames.
    """
    b, c, height, width = pictures.shape
    if height % (PATCH * MERGE) or width % (PATCH * MERGE):
        raise ValueError(f"the vision encoder takes multiples of {PATCH * MERGE} pixels, got {width}x{height}")
    mean, std = pictures.new_tensor([MEAN, STD])[..., None, None]
    x = (pictures - mean) / std
    x = x.reshape(b, c, height // (PATCH * MERGE), MERGE, PATCH, width // (PATCH * MERGE), MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    x = x.expand(-1, -1, -1, -1, -1, -1, FRAMES, -1, -1)
    return x.reshape(b, (height // PATCH) * (width // PATCH), c * FRAMES * PATCH * PATCH)


def grid_thw(height: int, width: int) -> tuple[int, int, int]:
    """Patches of one picture over (time, height, width)."""
    return 1, height // PATCH, width // PATCH


def vision_tokens(height: int, width: int) -> int:
    """Tokens that one picture takes in the prompt."""
    return (height // (PATCH * MERGE)) * (width // (PATCH * MERGE))


POSITIONS = ("multimodal", "sequential")
"""How image tokens are numbered for the encoder's RoPE: (frame, row, column), as Qwen2.5-VL was trained, or one by one.
"""


def encoder_positions(asked: str | None, transformers_version: str | None) -> str:
    """Which of POSITIONS an encoder wants, if it does not ask for something else.

    asked: `unipic_positions` of the encoder's config.json. Without it what counts is the version of transformers that
    wrote the config: from 5.3 on it counts one by one when it is not told which tokens are images, as the Qwen-Image
    pipelines never did (huggingface/diffusers#14194), so numbers made with it want "sequential".
    """
    if asked:
        return str(asked)
    numbers = tuple(int(n) for n in (transformers_version or "5.3").split(".")[:2] if n.isdigit())
    return "sequential" if numbers >= (5, 3) else "multimodal"
