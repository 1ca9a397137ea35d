"""Sampling as the node does it, but from given noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.sample
from torch import Tensor
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.nodes.host.sampling.guidance import with_guidance
from unipic_pack.nodes.host.sampling.run import prepared
from unipic_pack.nodes.host.sampling.samplers import ksampler
from unipic_pack.nodes.host.sampling.schedules import sigmas_of
from unipic_pack.unipic_core.conditioning.sequence import LatentShape


def sample_from(
    model: Any, settings: Any, start: Tensor, added: Sequence[Tensor], positive: Any, negative: Any, latent: Any
) -> Tensor:
    """ComfyUI's latents. start: [1, C, 1, h, w]; added: the noises of the consistency sampler, none for Euler."""
    options = {"step_noise": list(added)} if added else {}
    tokens = LatentShape.of_latents(start).num_tokens
    return comfy.sample.sample_custom(
        with_guidance(model),
        start,
        settings.guidance,
        ksampler(settings.sampler, **options),
        sigmas_of(settings, attachment_of(model).shift, tokens),
        positive,
        negative,
        prepared(model, latent),
        disable_pbar=True,
        seed=0,
    )
