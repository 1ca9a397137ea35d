"""Classifier-free guidance as in the release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..conditioning.sequence import PackedLatents, TextCond

ConditionalVelocity = Callable[[PackedLatents, Any, TextCond], Tensor]
"""(sequence, t: [B] or a number, text) -> velocity [B, N, 4C], such as `MMDiT`."""


def guided_velocity(
    velocity: ConditionalVelocity,
    latents: PackedLatents,
    t: Tensor | float,
    cond: TextCond,
    uncond: TextCond | None,
    guidance: float,
) -> Tensor:
    """Velocity [B, N, 4C] in float32; guided, with a second pass, if there is an unconditional text."""
    v = velocity(latents, t, cond).float()
    return v if uncond is None else apply_guidance(v, velocity(latents, t, uncond).float(), guidance)


def apply_guidance(cond: Tensor, uncond: Tensor, guidance: float, eps: float = 1e-6) -> Tensor:
    """v = u + guidance (c - u), then each packed token rescaled to the conditional's norm (QwenImageEditPipeline).

    cond, uncond: velocities [B, N, 4C]. The norms are computed in float32 and the denominator is clamped at eps.
    """
    cond32, uncond32 = cond.float(), uncond.float()
    guided = torch.lerp(uncond32, cond32, guidance)
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(eps)
    return (guided * (cond32.norm(dim=-1, keepdim=True) / norm)).to(cond.dtype)
