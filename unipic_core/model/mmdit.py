"""The network: Qwen-Image's double-stream diffusion transformer, with diffusers' parameter names.

Layers come from an `operations` namespace and attention is one function, so a host such as ComfyUI can bring its own
casting, quantised and attention parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..conditioning.sequence import PackedLatents, TextCond
from .attention import Attention, scaled_dot_product_attention
from .attention_forms import ConditionCache, Segment, Span, advance, key_mask, reference_tokens, spans, through_blocks
from .blocks import Block, JointState, KeyValue, OutputNorm, TimeEmbedding
from .config import REFERENCES, SEGMENTS, TARGET, TEXT, MMDiTConfig
from .layers import Factory, Operations
from .rope import Rotation, joint_positions, rotation


class MMDiTLayers(nn.Module):
    """The network's layers under diffusers' names, and how text and time are embedded. `operations` makes the layers.

    Base of `MMDiT`, and of the networks of hosts that call it in their own way.
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
        """[B, L, D] -> [B, L, width]."""
        return self.txt_in(self.txt_norm(embeds))

    def embed_time(
        self, t: Tensor | float, like: Tensor, additional: Tensor | None = None, and_zero: bool = False
    ) -> Tensor:
        """[B, width] for embedded tokens `like` [B, ...], or [2B, width] with a second half at t = 0."""
        batch, device = like.shape[0], like.device
        t = torch.as_tensor(t, dtype=torch.float32, device=device).reshape(-1).expand(batch)
        additional = None if additional is None else additional.reshape(-1).expand(batch)
        if and_zero:
            t = torch.cat([t, torch.zeros_like(t)])
            additional = None if additional is None else additional.repeat(2)
        return self.time_text_embed(t, like.dtype, additional)


class MMDiT(MMDiTLayers):
    """The velocity network. `attention` may be replaced at any time.

    dtype: that of the weights. compute_dtype: that of the activations, where `operations` store weights in a form that
    they alone can compute with (fp8, quantised); None = the weights' own.
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
        """What activations are computed in."""
        return self.compute_dtype or self.img_in.weight.dtype

    def forward(
        self,
        latents: PackedLatents,
        t: Tensor | float,
        text: TextCond,
        additional_t_cond: Tensor | None = None,
        cache: ConditionCache | None = None,
    ) -> Tensor:
        """Velocity [B, N_O, 4C] of the target tokens at time t (a number or [B], in [0, 1]).

        Samples may differ in references and in text; each gives what it gives alone. cache: of `prefill` with the same
        references and text; what it holds is not computed again, and the velocity is the same with and without it.
        """
        batch = latents.tokens.shape[0]
        if text.embeds.shape[0] != batch:
            raise ValueError(f"expected {batch} text conditions, got {text.embeds.shape[0]}")
        segments, past = self._segments(latents, t, text, additional_t_cond, cache or {})
        step = _recomputed if self.gradient_checkpointing and torch.is_grad_enabled() else advance
        segments = through_blocks(self.transformer_blocks, segments, past, step)
        moving = segments[-1]
        return self.proj_out(self.norm_out(moving.img, moving.temb[:batch]))

    def prefill(
        self,
        latents: PackedLatents,
        text: TextCond | None = None,
        additional_t_cond: Tensor | None = None,
        cache: ConditionCache | None = None,
    ) -> ConditionCache:
        """Keys and values of the tokens that no step changes; nothing for the attention form "full".

        Without text those of the references alone, which serve every prompt. cache: what is there already. The text's
        depend on the references, and on the target's size, from which its positions start.
        """
        segments, past = self._segments(latents, None, text, additional_t_cond, cache or {})
        kept: list[list[KeyValue]] = []
        through_blocks(self.transformer_blocks, segments, past, keep=kept)
        by_segment = zip(segments, zip(*kept, strict=True), strict=True)
        return {**(cache or {}), **{segment.pieces[0]: kv for segment, kv in by_segment}}

    def _segments(
        self,
        latents: PackedLatents,
        t: Tensor | float | None,
        text: TextCond | None,
        additional_t_cond: Tensor | None,
        cache: ConditionCache,
    ) -> tuple[Sequence[Segment], list[Sequence[KeyValue]]]:
        """The segments to compute, and the cached ones before them. t: None = without the target's."""
        places = spans(latents, text)
        rope = self.rope(latents, places[TEXT].stop, latents.tokens.device)
        segments: list[Segment] = []
        past: list[Sequence[KeyValue]] = []
        seen: list[Span] = []
        for pieces in SEGMENTS[self.config.attention_form]:
            start, stop = places[pieces[0]].start, places[pieces[-1]].stop
            moving = TARGET in pieces
            if start == stop or (moving and t is None):
                continue
            seen += [places[piece] for piece in pieces]
            if not moving and pieces[0] in cache:
                past.append(cache[pieces[0]])
                continue
            state = JointState(
                rope=(rope[0][:, start:stop], rope[1][:, start:stop]),
                mask=key_mask(seen, len(latents.tokens), latents.tokens.device),
                reference=reference_tokens(latents) if self._two_times(pieces) else None,
                attention=self.attention,
                keeps=not moving,
            )
            segments.append(self._segment(pieces, latents, t if moving else 0.0, text, additional_t_cond, state))
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
        """The embedded tokens of some pieces, as they enter the first block."""
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
        """Whether references are modulated at t = 0 beside a target at t, in one segment."""
        return self.config.zero_cond_t and TARGET in pieces and REFERENCES in pieces

    def rope(self, latents: PackedLatents, text_tokens: int, device: torch.device) -> Rotation:
        positions = joint_positions(latents.shapes, text_tokens, self.config.use_layer3d_rope)
        return rotation(positions.to(device), self.config.axes_dims_rope)


def _recomputed(
    block: Block, segments: Sequence[Segment], past: tuple[KeyValue, ...], last: bool
) -> tuple[list[Segment], list[KeyValue]]:
    """`advance` whose activations are computed again in the backward pass, instead of held."""
    result: tuple[list[Segment], list[KeyValue]] = checkpoint(advance, block, segments, past, last, use_reentrant=False)
    return result
