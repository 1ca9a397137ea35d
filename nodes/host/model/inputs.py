"""What ComfyUI gives its network, as the core's sequence: checked, filled up to whole tokens, packed and numbered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.ldm.common_dit import pad_to_patch_size
from torch import Tensor

from ....unipic_core.conditioning.sequence import PATCH, LatentShape, PackedLatents, pack_latents
from ....unipic_core.errors import UniPicError
from ....unipic_core.model.rope import joint_positions

REFERENCE_METHODS = ("index", "index_timestep_zero", "negative_index")
"""Ways to number references that the network has: frames 1, 2, ...; the same modulated at t = 0; frames -1, -2, ..."""


def packed(x: Tensor, references: Sequence[Tensor], in_channels: int) -> PackedLatents:
    """[target | reference 1 | ...], each padded to whole tokens; one reference may serve a whole batch.

    x and references: [B, C, 1, H, W] or without the frame. UniPicError for latents that do not belong to the network.
    """
    pieces, shapes = [], []
    for latent in (x, *references):
        _check_latent(latent, in_channels)
        latent = pad_to_patch_size(latent, (PATCH,) * 2 if latent.ndim == 4 else (1, PATCH, PATCH))
        shapes.append(LatentShape.of_latents(latent))
        pieces.append(pack_latents(latent).to(x.dtype).expand(x.shape[0], -1, -1))
    return PackedLatents(torch.cat(pieces, dim=1), (tuple(shapes),) * x.shape[0], shapes[0].num_tokens)


def _check_latent(latent: Tensor, in_channels: int) -> None:
    channels, frames = latent.shape[1], latent.shape[2] if latent.ndim == 5 else 1
    if channels * PATCH**2 != in_channels:
        raise UniPicError(
            f"this model works on latents of {in_channels // PATCH**2} channels and was given {channels}; use the VAE "
            "that Load UniPic gives with it"
        )
    if frames != 1:
        raise UniPicError(f"UniPic makes single pictures and was given a latent of {frames} frames; give it one")


def checked_text(context: Tensor, width: int) -> Tensor:
    """The text [B, L, D], or UniPicError if D is not the width that the network takes."""
    if context.shape[-1] != width:
        raise UniPicError(
            f"this model takes text of width {width} and was given {context.shape[-1]}; use the CLIP that Load UniPic "
            "gives with it"
        )
    return context


def checked_method(method: str) -> str:
    """One of REFERENCE_METHODS, or UniPicError."""
    if method not in REFERENCE_METHODS:
        raise UniPicError(
            f"this model numbers its references by {' or '.join(REFERENCE_METHODS)}; the conditioning asks for "
            f"{method!r}: remove the node that set it, or choose index"
        )
    return method


def positions(latents: PackedLatents, words: int, layered: bool, method: str) -> Tensor:
    """Positions [B, L + S, 3] for RoPE, text first, on the CPU. layered: the network's use_layer3d_rope."""
    ids = joint_positions(latents.shapes, words, layered).repeat(len(latents.tokens), 1, 1)
    if method == "negative_index":
        ids[:, words:, 0] = -ids[:, words:, 0].abs()
    return ids
