"""Classifier-free guidance as the release applies it."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_cfg(cond: Tensor, uncond: Tensor, scale: float, eps: float = 1e-6) -> Tensor:
    """v = u + s (c - u), then each packed token rescaled to the conditional's norm (QwenImageEditPipeline).

    cond, uncond: velocities [B, N, 4C]. The norms are taken in float32 and the denominator is clamped at eps.
    """
    cond32, uncond32 = cond.float(), uncond.float()
    guided = torch.lerp(uncond32, cond32, scale)
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(eps)
    return (guided * (cond32.norm(dim=-1, keepdim=True) / norm)).to(cond.dtype)
