"""The schedule of a run as ComfyUI's SIGMAS."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ....unipic_core.conditioning.sequence import PATCH
from ....unipic_core.run.plan import Settings
from ....unipic_core.sampling.schedules import Shift


def sigmas_of(settings: Settings, shift: Shift, num_target_tokens: int, denoise: float = 1.0) -> Tensor:
    """Times of a run as ComfyUI's SIGMAS: 1-D float32, ending in 0.

    denoise below 1: the last `steps` steps of a schedule of steps / denoise, as in KSampler. denoise 0: no times, and
    sampling returns the latent as it is.
    """
    if denoise <= 0:
        return torch.zeros(0)
    total = settings.steps if denoise > 0.9999 else max(int(settings.steps / denoise), settings.steps)
    times = replace(settings, steps=total).times(num_target_tokens, shift)
    return times[-(settings.steps + 1) :].float()


def target_tokens(latent: Tensor) -> int:
    """Tokens of a latent [..., H, W]; odd sizes are padded to whole tokens, as in ComfyUI's Qwen-Image model."""
    height, width = latent.shape[-2:]
    return math.ceil(height / PATCH) * math.ceil(width / PATCH)
