"""Composition: conditionings from pictures and texts, with the caches of their encodings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import node_helpers
import torch
from comfy.sd import CLIP, VAE
from PIL import Image
from torch import Tensor

from ...unipic_core.caching import LRU, PictureCache, WeightsKey, image_key
from ...unipic_core.conditioning.images import resize_references
from ...unipic_core.run.plan import Plan, Request, plan
from ...unipic_core.weights.recipe import LIMITS, Recipe
from .compare.run import COMPOSITION
from .model.influences import INFLUENCES
from .pictures.images import to_image
from .pictures.vae import UniPicVAE
from .sampling.influence_control import InfluenceControl
from .text import vision_cache as vision
from .text.encoder import Conditioning, changes_weights, encode_prompt

CACHED_REFERENCES, CACHED_TEXTS = 24, 4
"""At the release's size a reference takes up to 1 MB, a text about 20 MB of main memory."""

_references: PictureCache[Tensor] = PictureCache(CACHED_REFERENCES)
_texts: LRU[Conditioning] = LRU(CACHED_TEXTS)


def clear_caches() -> None:
    """Empty the caches of encodings; changed weights do not need it."""
    _references.clear()
    _texts.clear()
    vision.clear_cache()


@dataclass(frozen=True)
class Composition:
    """Inputs of one run, carried by its conditionings so that Compare encodes them at other reference budgets."""

    clip: CLIP
    vae: VAE
    pictures: tuple[Image.Image, ...]
    request: Request
    recipe: Recipe

    def plan(self, reference_budget: int | None = None) -> Plan:
        """The checked plan of the run, or of one at another reference budget."""
        request = self.request if reference_budget is None else replace(self.request, reference_budget=reference_budget)
        recipe = self.recipe
        if recipe.output_budget is None and (request.width or request.height):  # such weights allow any size
            recipe = replace(recipe, output_budget=LIMITS["output_budget"][1])
        return plan(recipe, [picture.size for picture in self.pictures], request)

    def resized(self, planned: Plan) -> list[Image.Image]:
        """The pictures at the plan's reference budget."""
        request, budget = planned.request, planned.settings.reference_budget
        return resize_references(self.pictures, budget, request.share, request.reference_weights)

    def conditionings(self, planned: Plan, resized: list[Image.Image]) -> tuple[Conditioning, Conditioning]:
        """Positive and negative with the resized pictures."""
        extra: dict[str, Any] = {COMPOSITION: self}
        if resized:
            extra["reference_latents"] = reference_latents(self.vae, resized)
        if planned.influences:
            extra |= {INFLUENCES: planned.influences, "control": InfluenceControl(planned.influences)}
        positive, negative = (
            node_helpers.conditioning_set_values(_text(self.clip, text, resized), extra)
            for text in (planned.request.prompt, planned.request.negative_prompt)
        )
        return positive, negative


def reference_latents(vae: VAE, references: Sequence[Image.Image]) -> list[Tensor]:
    """Latents [1, C, 1, h, w] of each picture, not normalised, since the MODEL does that. Encodings are cached.

    Load UniPic's VAE encodes pictures of one size together; a stock VAE would take them for a video.
    """

    def encode(pictures: list[Image.Image]) -> list[Tensor]:
        latents = vae.encode(torch.cat([to_image(picture) for picture in pictures])).cpu()
        return [latent[None].clone() for latent in latents]  # copied, since a view would hold the whole batch

    weights = (WeightsKey(vae.first_stage_model), vae.patcher.patches_uuid, vae.vae_dtype)
    latents = _references.encode(references, weights, encode, together=isinstance(vae, UniPicVAE))
    return [latent.to(comfy.model_management.intermediate_device()) for latent in latents]


def _text(clip: CLIP, text: str, references: list[Image.Image]) -> Conditioning:
    """Conditioning of a text. Cached, unless hooks change the weights meanwhile."""

    def encode() -> Conditioning:
        return encode_prompt(clip, text, references)

    return encode() if changes_weights(clip) else _texts.get(_text_key(clip, text, references), encode)


def _text_key(clip: CLIP, text: str, references: list[Image.Image]) -> tuple[Any, ...]:
    weights = (WeightsKey(clip.cond_stage_model), clip.patcher.patches_uuid)
    options = (clip.layer_idx, str(clip.tokenizer_options))
    return *weights, *options, text, *(image_key(reference) for reference in references)
