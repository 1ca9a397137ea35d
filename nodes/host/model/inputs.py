"""Inputs of the network: ComfyUI's latents and text, checked, packed and numbered as the core's sequence."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.common_dit import pad_to_patch_size
from torch import Tensor

from ....unipic_core.conditioning.sequence import PATCH, LatentShape, PackedLatents, pack_latents
from ....unipic_core.errors import UniPicError
from ....unipic_core.model.config import REFERENCES, TARGET, TEXT
from ....unipic_core.model.reference_bias import attention_bias
from ....unipic_core.model.rope import joint_positions

REFERENCE_METHODS = ("index", "index_timestep_zero", "negative_index")
"""ComfyUI's names for the frames of references: 1, 2, ...; the same, modulated at t = 0; -1, -2, ..."""


@dataclass(frozen=True)
class NetworkInputs:
    """Inputs of one call of the network for a batch of B, packed.

    key: all that the results depend on beside these tensors and the weights. context: text [B, L, D]; ids: positions
    [B, L + S, 3], text first; bias: attention bias of the text [B, L] or None; options: transformer_options without
    patches, which apply to the target's segment alone; reference_bias: log strengths [N_O, K] of K references in this
    step, or None.
    """

    attention_form: str
    key: Hashable
    latents: PackedLatents
    context: Tensor
    ids: Tensor
    bias: Tensor | None
    additional_t_cond: Tensor | None
    options: dict[str, Any]
    reference_bias: Tensor | None = None

    @property
    def has_references(self) -> bool:
        return len(self.latents.shapes[0]) > 1

    @property
    def references(self) -> Tensor:
        """Tokens of all references [B, N, 4C]."""
        return self.latents.tokens[:, self.latents.num_target_tokens :]

    @cached_property
    def rows(self) -> dict[str, int]:
        """Samples of REFERENCES and of TEXT to compute: 1 where the whole batch shares them, as seeds do; else B."""
        references = [self.references, self.additional_t_cond]
        inputs = {REFERENCES: references, TEXT: [*references, self.context, self.bias]}
        return {piece: 1 if _all_rows_equal(tensors) else len(self.context) for piece, tensors in inputs.items()}

    def cache_key(self, piece: str) -> tuple[Hashable, Sequence[Tensor]]:
        """All inputs of a piece's keys and values: for TEXT the references too, since it attends to them."""
        rows = self.rows[piece]
        tensors = [t[:rows] for t in (self.references, self.additional_t_cond) if t is not None]
        shapes = self.latents.shapes[0]
        if piece == REFERENCES:
            return (self.key, shapes[1:]), tensors
        tensors += [t[:rows] for t in (self.context, self.bias) if t is not None]
        return (self.key, shapes, self.bias is None), tensors

    def approximate_key(self) -> tuple[Hashable, Sequence[Tensor]]:
        """All inputs of the references' keys and values in the form "full" but the target and the time: the text's key,
        and the log strengths, since references attend to the target, which depends on them."""
        key, tensors = self.cache_key(TEXT)
        bias = self.reference_bias
        return (key, bias is None), tensors if bias is None else [*tensors, bias]

    def mask(self, segments: Sequence[tuple[str, ...]], images: int) -> Tensor | None:
        """Attention bias [B, 1 or queries, keys] over the keys of these segments for the queries of the last one, which
        has `images` image tokens."""
        pieces = [piece for segment in segments for piece in segment]
        padding = None
        if self.bias is not None and TEXT in pieces:
            before = self.references.shape[1] if REFERENCES in pieces[: pieces.index(TEXT)] else 0
            after = images if TARGET in pieces else 0
            padding = F.pad(self.bias, (before, after))[:, None]
        if self.reference_bias is None or TARGET not in pieces:
            return padding
        whole = self._strengths(pieces, segments[-1], images)[None]
        return whole if padding is None else whole + padding

    def _strengths(self, pieces: Sequence[str], target: Sequence[str], images: int) -> Tensor:
        """Attention bias [queries, keys] of the references' strengths. pieces: of the keys; target: of the queries."""
        assert self.reference_bias is not None  # checked by `mask`
        words, references = self.context.shape[1], self.references.shape[1]
        before = 0 if REFERENCES in target else references
        keys = before + (words if TEXT in pieces else 0) + images
        first_query = words if TEXT in target else 0
        first_key = words + self.latents.num_target_tokens if REFERENCES in target else 0
        tokens = [shape.num_tokens for shape in self.latents.shapes[0][1:]]
        bias = self.reference_bias.to(self.latents.tokens)
        return attention_bias(bias, tokens, first_query + images, first_query, keys, first_key)


def _all_rows_equal(tensors: Sequence[Tensor | None]) -> bool:
    return all(torch.equal(t, t[:1].expand_as(t)) for t in tensors if t is not None)


def packed(x: Tensor, references: Sequence[Tensor], in_channels: int) -> PackedLatents:
    """[target | reference 1 | ...], each padded to whole tokens; a reference of one sample serves the whole batch.

    x and references: [B, C, 1, H, W] or without the frame. UniPicError for latents of another model or of a video.
    """
    tokens, shapes = [], []
    for latent in (x, *references):
        _check_latent(latent, in_channels)
        latent = pad_to_patch_size(latent, (PATCH,) * 2 if latent.ndim == 4 else (1, PATCH, PATCH))
        shapes.append(LatentShape.of_latents(latent))
        tokens.append(pack_latents(latent).to(x.dtype).expand(x.shape[0], -1, -1))
    return PackedLatents(torch.cat(tokens, dim=1), (tuple(shapes),) * x.shape[0], shapes[0].num_tokens)


def _check_latent(latent: Tensor, in_channels: int) -> None:
    channels, frames = latent.shape[1], latent.shape[2] if latent.ndim == 5 else 1
    if channels * PATCH**2 != in_channels:
        raise UniPicError(
            f"this model expects latents of {in_channels // PATCH**2} channels, got {channels}; use the VAE of the "
            "same Load UniPic"
        )
    if frames != 1:
        raise UniPicError(f"UniPic expects a latent of one frame, got {frames}; it makes pictures, not videos")


def checked_text(context: Tensor, width: int) -> Tensor:
    """Text embeddings [B, L, D]; UniPicError unless D is the width that the network takes."""
    if context.shape[-1] != width:
        raise UniPicError(
            f"this model expects text of width {width}, got {context.shape[-1]}; use the CLIP of the same Load UniPic"
        )
    return context


def checked_method(method: str) -> str:
    """One of REFERENCE_METHODS, or UniPicError."""
    if method not in REFERENCE_METHODS:
        raise UniPicError(
            f"the reference latents method must be one of {', '.join(REFERENCE_METHODS)}, got {method!r}; choose index "
            "in the node that sets it, or remove that node"
        )
    return method


def positions(latents: PackedLatents, words: int, layered: bool, method: str) -> Tensor:
    """Positions [B, L + S, 3] for RoPE, text first, on the CPU. layered: the network's use_layer3d_rope."""
    ids = joint_positions(latents.shapes, words, layered).repeat(len(latents.tokens), 1, 1)
    if method == "negative_index":
        ids[:, words:, 0] = -ids[:, words:, 0].abs()
    return ids
