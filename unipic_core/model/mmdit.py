"""The network: Qwen-Image's double-stream diffusion transformer (MMDiT), with diffusers' parameter names.

Layers come from an `operations` namespace and attention is one function, so that a host such as ComfyUI can supply
casting or quantised layers and another attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..conditioning.sequence import PackedLatents, TextCond
from .attention import Attention, scaled_dot_product_attention
from .attention_forms import CachedKeyValues, Segment, Span, advance, key_mask, reference_tokens, spans, through_blocks
from .blocks import Block, JointState, KeyValue, KeyValues, KeyValueStore, OutputNorm, TimeEmbedding
from .config import REFERENCES, SEGMENTS, TARGET, TEXT, MMDiTConfig
from .layers import Factory, Operations
from .reference_bias import attention_bias, joined_mask
from .rope import Rotation, joint_positions, rotation


class MMDiTLayers(nn.Module):
    """Layers of the network under diffusers' names, and the embedding of text and time.

    Base class of `MMDiT` and of hosts' networks with another forward. operations: layer classes.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        operations: Operations = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        factory: Factory = {"dtype": dtype, "device": device}
        self.config = config
        width = config.width
        self.time_text_embed = TimeEmbedding(width, config.use_additional_t_cond, operations, factory)
        self.txt_norm = operations.RMSNorm(config.joint_attention_dim, eps=1e-6, **factory)
        self.img_in = operations.Linear(config.in_channels, width, **factory)
        self.txt_in = operations.Linear(config.joint_attention_dim, width, **factory)
        self.transformer_blocks = nn.ModuleList(Block(config, operations, factory) for _ in range(config.num_layers))
        self.norm_out = OutputNorm(width, operations, factory)
        self.proj_out = operations.Linear(width, config.patch_size**2 * config.out_channels, **factory)

    def embed_text(self, embeds: Tensor) -> Tensor:
        """Project text embeddings [B, L, D] to [B, L, width]."""
        return self.txt_in(self.txt_norm(embeds))

    def embed_time(
        self, t: Tensor | float, like: Tensor, additional: Tensor | None = None, and_zero: bool = False
    ) -> Tensor:
        """Embed times t, a number or [B], to [B, width]; with `and_zero` to [2B, width], the second half at t = 0.

        like: embedded tokens [B, ...], which give batch, dtype and device. additional: [1] or [B] index of
        `use_additional_t_cond`.
        """
        batch, device = like.shape[0], like.device
        t = torch.as_tensor(t, dtype=torch.float32, device=device).reshape(-1).expand(batch)
        additional = None if additional is None else additional.reshape(-1).expand(batch)
        if and_zero:
            t = torch.cat([t, torch.zeros_like(t)])
            additional = None if additional is None else additional.repeat(2)
        return self.time_text_embed(t, like.dtype, additional)


class MMDiT(MMDiTLayers):
    """Velocity network. `attention` may be replaced at any time.

    dtype: of the weights. compute_dtype: of the activations, if the weights are stored in a dtype that only the layers
    of `operations` compute with (fp8, quantised); None = the weights' dtype.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        operations: Operations = nn,
        attention: Attention = scaled_dot_product_attention,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, operations=operations, dtype=dtype, device=device)
        self.attention = attention
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing = False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.compute_dtype or self.img_in.weight.dtype

    def forward(
        self,
        latents: PackedLatents,
        t: Tensor | float,
        text: TextCond,
        additional_t_cond: Tensor | None = None,
        cache: CachedKeyValues | None = None,
        reference_bias: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity [B, N_O, 4C] of the target tokens at time t, a number or [B], in [0, 1].

        Samples may differ in references and text; the result of a sample does not depend on the others. cache: result
        of `prefill` with the same references and text; it saves time and does not change the velocity. reference_bias:
        [N_O, K] added to the scores of the target's queries on the keys of each of K references (`reference_bias.py`),
        for samples with the same shapes; None = no mask. Raises ValueError if the batches of latents and text differ.
        """
        batch = latents.tokens.shape[0]
        if text.embeds.shape[0] != batch:
            raise ValueError(f"expected {batch} text conditions, got {text.embeds.shape[0]}; expand or stack them")
        if reference_bias is not None and len(set(latents.shapes)) > 1:
            raise ValueError("a reference bias needs samples with the same shapes; run them one by one")
        segments, past = self._segments(latents, t, text, additional_t_cond, cache or {}, reference_bias)
        step = _recomputed if self.gradient_checkpointing and torch.is_grad_enabled() else advance
        segments = through_blocks(self.transformer_blocks, segments, past, step)
        target = segments[-1]
        return self.proj_out(self.norm_out(target.img, target.temb[:batch]))

    def prefill(
        self,
        latents: PackedLatents,
        text: TextCond | None = None,
        additional_t_cond: Tensor | None = None,
        cache: CachedKeyValues | None = None,
        store: Callable[[], KeyValueStore] = list,
    ) -> CachedKeyValues:
        """Compute the keys and values that are the same in every step; empty for the attention form "full".

        Without text: only those of the references, which serve every prompt. cache: keys and values already computed.
        Those of the text depend on the references, and on the target's size, which its positions follow. store: makes
        the sequence that receives one piece's keys and values block by block.
        """
        segments, past = self._segments(latents, None, text, additional_t_cond, cache or {})
        stores = [store() for _ in segments]

        def collect(of_block: Sequence[KeyValue]) -> None:
            for stored, kv in zip(stores, of_block, strict=True):
                stored.append(kv)

        through_blocks(self.transformer_blocks, segments, past, collect=collect)
        new = {segment.pieces[0]: stored for segment, stored in zip(segments, stores, strict=True)}
        return {**(cache or {}), **new}

    def _segments(
        self,
        latents: PackedLatents,
        t: Tensor | float | None,
        text: TextCond | None,
        additional_t_cond: Tensor | None,
        cache: CachedKeyValues,
        reference_bias: Tensor | None = None,
    ) -> tuple[Sequence[Segment], list[KeyValues]]:
        """Segments to compute, and keys and values of the cached segments. t: None = without the target's segment."""
        places = spans(latents, text)
        rope = self.rope(latents, places[TEXT].stop, latents.tokens.device)
        segments: list[Segment] = []
        past: list[KeyValues] = []
        attended: list[Span] = []
        for pieces in SEGMENTS[self.config.attention_form]:
            start, stop = places[pieces[0]].start, places[pieces[-1]].stop
            has_target = TARGET in pieces
            if start == stop or (has_target and t is None):
                continue
            attended += [places[piece] for piece in pieces]
            if not has_target and pieces[0] in cache:
                past.append(cache[pieces[0]])
                continue
            mask = key_mask(attended, len(latents.tokens), latents.tokens.device)
            if has_target and reference_bias is not None:
                first_query = places[TARGET].start - start
                bias = reference_bias.to(latents.tokens.device, self.dtype)
                mask = joined_mask(_bias_of(bias, latents, stop - start, first_query, attended, places), mask)
            state = JointState(
                rope=(rope[0][:, start:stop], rope[1][:, start:stop]),
                mask=mask,
                reference=reference_tokens(latents) if self._two_times(pieces) else None,
                attention=self.attention,
                return_kv=not has_target,
            )
            segments.append(self._segment(pieces, latents, t if has_target else 0.0, text, additional_t_cond, state))
        return segments, past

    def _segment(
        self,
        pieces: tuple[str, ...],
        latents: PackedLatents,
        t: Tensor | float | None,
        text: TextCond | None,
        additional_t_cond: Tensor | None,
        state: JointState,
    ) -> Segment:
        """Embed the tokens of some pieces as input of the first block."""
        n = latents.num_target_tokens
        img = None
        if TARGET in pieces or REFERENCES in pieces:
            images = slice(0 if TARGET in pieces else n, None if REFERENCES in pieces else n)
            img = self.img_in(latents.tokens[:, images].to(self.dtype))
        txt = self.embed_text(text.embeds.to(self.dtype)) if text is not None and TEXT in pieces else None
        like = txt if img is None else img
        assert like is not None  # a segment has tokens
        temb = self.embed_time(0.0 if t is None else t, like, additional_t_cond, self._two_times(pieces))
        return Segment(pieces, img, txt, temb, state, n if TARGET in pieces else 0)

    def _two_times(self, pieces: tuple[str, ...]) -> bool:
        """True if one segment has references modulated at t = 0 and a target at t."""
        return self.config.zero_cond_t and TARGET in pieces and REFERENCES in pieces

    def rope(self, latents: PackedLatents, text_tokens: int, device: torch.device) -> Rotation:
        positions = joint_positions(latents.shapes, text_tokens, self.config.use_layer3d_rope)
        return rotation(positions.to(device), self.config.axes_dims_rope)


def _bias_of(
    bias: Tensor,
    latents: PackedLatents,
    queries: int,
    first_query: int,
    attended: Sequence[Span],
    places: dict[str, Span],
) -> Tensor:
    """Attention bias [queries, keys] of the target's segment. attended: places of its keys, in order."""
    before = attended[: next(i for i, span in enumerate(attended) if span is places[REFERENCES])]
    keys, first_key = (sum(span.stop - span.start for span in part) for part in (attended, before))
    tokens = [shape.num_tokens for shape in latents.shapes[0][1:]]
    return attention_bias(bias, tokens, queries, first_query, keys, first_key)


def _recomputed(
    block: Block, segments: Sequence[Segment], past: tuple[KeyValue, ...], last: bool
) -> tuple[list[Segment], list[KeyValue]]:
    """`advance` with gradient checkpointing: the backward pass recomputes the activations."""
    result: tuple[list[Segment], list[KeyValue]] = checkpoint(advance, block, segments, past, last, use_reentrant=False)
    return result
