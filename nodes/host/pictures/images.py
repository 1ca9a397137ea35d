"""Conversions between ComfyUI's IMAGE and MASK and Pillow's pictures."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ....unipic_core.conditioning.images import to_rgb
from ....unipic_core.errors import UniPicError

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def to_image(picture: Image.Image) -> Tensor:
    """A picture as IMAGE [1, H, W, 3], float32 in [0, 1]; transparent parts become white."""
    return torch.from_numpy(np.array(to_rgb(picture), dtype=np.float32) / 255)[None]


def to_pictures(image: Tensor, mask: Tensor | None = None) -> list[Image.Image]:
    """All pictures of an IMAGE [B, H, W, C] as 8-bit RGB; transparent parts become white.

    C is 1 (grey), 2 (grey and alpha), 3 or 4 (RGBA). mask: ComfyUI's, 1 = transparent, [H, W] or [B or 1, H, W];
    stretched bilinearly to the picture's size. Raises UniPicError.
    """
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[-1] not in _MODES or 0 in image.shape:
        raise UniPicError(
            f"an image must be [batch, height, width, 1 to 4 channels], got {list(image.shape)}; connect another image"
        )
    values = image.detach().float().cpu().nan_to_num(nan=0.0)
    if mask is not None:
        values = _with_alpha(values, 1 - stretched(mask.detach().float().cpu(), values))
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    mode = _MODES[pixels.shape[-1]]
    rows = pixels[..., 0] if mode == "L" else pixels
    return [to_rgb(Image.fromarray(row, mode)) for row in rows]


def to_masks(image: Tensor, mask: Tensor | None = None) -> list[Image.Image | None]:
    """For each picture of an IMAGE the parts that `to_pictures` makes white, as "L" with 255 = left out; None for a
    picture without any."""
    image = (image[None] if image.ndim == 3 else image).detach().float().cpu()
    hidden = torch.zeros(*image.shape[:3], 1)
    if mask is not None:
        hidden = stretched(mask.detach().float().cpu(), image)
    if image.shape[-1] in (2, 4):
        hidden = 1 - (1 - hidden) * image[..., -1:].nan_to_num(nan=0.0).clamp(0, 1)
    rows = (hidden[..., 0] * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(row) if row.any() else None for row in rows]


def _with_alpha(values: Tensor, alpha: Tensor) -> Tensor:
    """Pictures with alpha [B, H, W, 1], multiplied by the alpha that they have, if any."""
    if values.shape[-1] in (2, 4):
        return torch.cat([values[..., :-1], values[..., -1:] * alpha], dim=-1)
    return torch.cat([values, alpha], dim=-1)


def stretched(mask: Tensor, values: Tensor) -> Tensor:
    """A mask as [B, H, W, 1], of the pictures' size. values: the pictures [B, H, W, C]. Raises UniPicError."""
    batch, height, width = values.shape[:3]
    mask = mask.reshape(-1, *mask.shape[-2:]) if mask.ndim >= 2 else mask
    if mask.ndim != 3 or 0 in mask.shape or mask.shape[0] not in (1, batch):
        raise UniPicError(
            f"a mask must be [height, width], or one for each of {batch} pictures, got {list(mask.shape)}; connect "
            "another mask"
        )
    if mask.shape[1:] != (height, width):
        mask = F.interpolate(mask[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
    return mask.nan_to_num(nan=0.0).clamp(0, 1)[..., None].expand(batch, -1, -1, -1)
