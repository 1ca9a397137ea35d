"""The release's guidance as ComfyUI's guidance function."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....unipic_core.conditioning.sequence import PATCH, LatentShape, pack_latents, unpack_latents
from ....unipic_core.sampling.guidance import apply_guidance


def with_guidance(model: ModelPatcher) -> Any:
    """A clone of the MODEL with the release's guidance, unless another node has set a guidance function already."""
    clone = model.clone()
    if "sampler_cfg_function" not in clone.model_options:
        clone.set_model_sampler_cfg_function(guide)
    return clone


def guide(args: dict[str, Any]) -> Tensor:
    """x - x0 of the guided velocity, from ComfyUI's x - x0 of positive and negative (`apply_guidance`)."""
    if math.isclose(args["cond_scale"], 1.0):  # ComfyUI may have left out the negative
        return args["cond"]
    sigma = args["sigma"].reshape(-1, *[1] * (args["cond"].ndim - 1))
    (cond, shape), (uncond, _) = _pack(args["cond"] / sigma), _pack(args["uncond"] / sigma)
    height, width = args["cond"].shape[-2:]
    v = unpack_latents(apply_guidance(cond, uncond, args["cond_scale"]), shape)[..., :height, :width]
    return v * sigma


def _pack(v: Tensor) -> tuple[Tensor, LatentShape]:
    """Tokens of a velocity [B, C, 1, H, W]; odd sizes are padded with zeros, which do not change the norms."""
    height, width = v.shape[-2:]
    v = F.pad(v, (0, width % PATCH, 0, height % PATCH))
    return pack_latents(v), LatentShape.of_latents(v)
