"""Previews of pictures on the nodes."""

from __future__ import annotations

import torch.nn.functional as F
from comfy_api.latest import ui
from torch import Tensor

PREVIEW_SIDE, PREVIEW_PICTURES = 1024, 16
"""Longest side of a preview in pixels, and the most pictures of a batch that are shown."""


def preview(image: Tensor) -> ui.PreviewImage:
    """The `ui` of a node: an IMAGE [B, H, W, 3], shrunk to PREVIEW_SIDE. The page shows it; temporary files hold it."""
    image = (image[None] if image.ndim == 3 else image)[:PREVIEW_PICTURES].detach().float().cpu()
    height, width = image.shape[1:3]
    scale = PREVIEW_SIDE / max(height, width)
    if scale < 1:
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        image = F.interpolate(image.movedim(-1, 1), size, mode="bilinear", antialias=True).movedim(1, -1)
    return ui.PreviewImage(image)
