"""What a picture costs beside the network: the VAE and the text encoder at the release's sizes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLModel

from trainers.nano.make_model import text_encoder_config
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.prompt import IMAGE_PAD
from unipic_core.conditioning.reference_sizes import MAX_REFERENCES, Size, reference_sizes
from unipic_core.conditioning.sequence import VAE_SCALE
from unipic_core.model.vae import ImageVAE, VAEConfig, channels_last
from unipic_core.pipeline.text_encoder import TextEncoder

from .common import Run
from .systems import Kind

PROMPT = "Put the guitar from image 2 in the hands of the astronaut from image 1, on the beach of image 3."
QWEN_7B: dict[str, dict[str, Any]] = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16},
}
"""Qwen2.5-VL-7B where it differs from transformers' defaults."""


@dataclass(frozen=True)
class Parts:
    """vae: its sizes. encoder: the text encoder's config for a tokenizer."""

    vae: VAEConfig
    encoder: Callable[[Any], Any]


def released_encoder(tokenizer: Any) -> Any:
    return Qwen2_5_VLConfig(**QWEN_7B, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PAD))


RELEASED = Parts(VAEConfig(), released_encoder)
TINY = Parts(VAEConfig(base_dim=4, num_res_blocks=1), text_encoder_config)


def reference_pixels(size: int, count: int) -> list[Size]:
    """Square references that share a budget of size^2 pixels."""
    return reference_sizes([(size, size)] * count, size)


def vae_runs(parts: Parts, kind: Kind, size: int) -> dict[str, Run]:
    """All references at once, and the picture; the VAE as a vae/ folder is loaded."""
    vae = channels_last(ImageVAE(parts.vae)).to(kind.device, kind.dtype).eval().requires_grad_(False)
    width, height = reference_pixels(size, MAX_REFERENCES)[0]
    pictures = torch.rand(MAX_REFERENCES, 3, height, width, device=kind.device) * 2 - 1
    side = size // VAE_SCALE
    latents = torch.randn(1, parts.vae.z_dim, 1, side, side, device=kind.device)
    return {
        f"VAE, {MAX_REFERENCES} references encoded": partial(_without_gradient, vae.encode, pictures),
        "VAE, picture decoded": partial(_without_gradient, vae.decode, latents),
    }


def encoder_numbers(parts: Parts) -> int:
    """How many the text encoder's weights are, counted without memory."""
    return sum(p.numel() for p in _encoder(parts, Kind(torch.bfloat16, torch.device("meta"))).model.parameters())


def _encoder(parts: Parts, kind: Kind) -> TextEncoder:
    """With random weights."""
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_MODEL / "tokenizer", local_files_only=True)
    default = torch.get_default_dtype()
    torch.set_default_dtype(kind.dtype)
    try:
        with kind.device:
            model: Any = Qwen2_5_VLModel(parts.encoder(tokenizer))
    finally:
        torch.set_default_dtype(default)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer, positions="multimodal")


def text_runs(parts: Parts, kind: Kind, size: int) -> dict[str, Run]:
    """The vision tower, which both prompts of a guided picture share, and the language model on one prompt."""
    encoder = _encoder(parts, kind)
    references = [Image.new("RGB", pixels) for pixels in reference_pixels(size, MAX_REFERENCES)]
    prepared = encoder.prepare([references], [PROMPT])
    with torch.no_grad():
        seen = encoder.vision_of(prepared)
    return {
        "text encoder, vision tower": partial(_without_gradient, encoder.vision_of, prepared),
        "text encoder, language model": partial(_without_gradient, encoder.forward, prepared, seen),
    }


def _without_gradient(function: Callable[..., Any], *args: Any) -> None:
    with torch.no_grad():
        function(*args)
