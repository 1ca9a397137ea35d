"""Classifier-free guidance as the release applies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..conditioning.sequence import PackedLatents, TextCond

Network = Callable[[PackedLatents, Any, TextCond], Tensor]
"""(sequence, t: [B] or a number, text) -> velocity [B, N, 4C], as `MMDiT`."""


def guided_velocity(
    network: Network, latents: PackedLatents, t: Tensor | float, cond: TextCond, uncond: TextCond | None, scale: float
) -> Tensor:
    """Velocity [B, N, 4C] in float32, guided if there is an unconditional text: then two passes."""
    v = network(latents, t, cond).float()
    return v if uncond is None else apply_cfg(v, network(latents, t, uncond).float(), scale)


def apply_cfg(cond: Tensor, uncond: Tensor, scale: float, eps: float = 1e-6) -> Tensor:
    """v = u + s (c - u), then each packed token rescaled to the conditional's norm (QwenImageEditPipeline).

    cond, uncond: velocities [B, N, 4C]. The norms are taken in float32 and the denominator is clamped at eps.
    """
    cond32, uncond32 = cond.float(), uncond.float()
    guided = torch.lerp(uncond32, cond32, scale)
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(eps)
    return (guided * (cond32.norm(dim=-1, keepdim=True) / norm)).to(cond.dtype)
