"""A run of the pipeline that takes no time, and pictures for it."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

SMALL: dict[str, Any] = {
    "width": 64,
    "height": 48,
    "num_inference_steps": 2,
    "true_cfg_scale": 1.0,
    "sampler": "consistency",
    "reference_budget": 64,
    "output_type": "latent",
}


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    data = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(data.numpy())
