"""Attention forms: the sequence divided into segments, each of which attends to itself and to the segments before it.

The sequence is [text | target | references]. In the release (form "full") it is one segment. In the causal forms the
references, or the references and the text, come first: they are modulated at t = 0 and attend to nothing that a step
changes, so their keys and values are the same for all steps and seeds, and those of the references for all prompts.
They are computed once and cached (`MMDiT.prefill`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..conditioning.sequence import PackedLatents, TextCond
from .blocks import BlockKeyValues, JointState, KeyValue, KeyValues
from .config import REFERENCES, TARGET, TEXT

CachedKeyValues = Mapping[str, KeyValues]
"""Result of `MMDiT.prefill`: REFERENCES or TEXT -> keys and values in every block."""


@dataclass(frozen=True)
class Segment:
    """Hidden states of tokens that attend to one another and to the segments before them.

    img [B, S, width], txt [B, L, width]: None if the segment has no such tokens. num_outputs: number of leading image
    tokens needed after the last block; 0 = only keys and values are needed.
    """

    pieces: tuple[str, ...]
    img: Tensor | None
    txt: Tensor | None
    temb: Tensor
    state: JointState
    num_outputs: int


Step = Callable[[Any, Sequence[Segment], BlockKeyValues, bool], tuple[list[Segment], list[KeyValue]]]
"""(block, segments, keys and values of earlier segments in this block, True for the last block) -> (segments, the keys
and values that they return)."""


def advance(
    block: Any, segments: Sequence[Segment], past: tuple[KeyValue, ...], last: bool
) -> tuple[list[Segment], list[KeyValue]]:
    """Apply one block to all segments in order; each attends to those before it.

    Returns the segments, and the keys and values of those whose state has `return_kv`.
    """
    advanced, key_values = [], []
    for segment in segments:
        state = replace(segment.state, past=past)
        img, txt, kv = block(segment.img, segment.txt, segment.temb, state, segment.num_outputs if last else None)
        advanced.append(replace(segment, img=img, txt=txt))
        if kv is not None:
            past = (*past, kv)
            key_values.append(kv)
    return advanced, key_values


def through_blocks(
    blocks: Iterable[object],
    segments: Sequence[Segment],
    past: Sequence[KeyValues] = (),
    step: Step = advance,
    collect: Callable[[list[KeyValue]], object] | None = None,
) -> Sequence[Segment]:
    """Apply all blocks to the segments.

    past: for each earlier segment that is not computed, its keys and values in every block. step: function that
    applies one block; hosts hook in here. collect: called with each block's keys and values; without it they are freed
    after their block.
    """
    blocks = list(blocks)
    for i, block in enumerate(blocks):
        segments, of_block = step(block, segments, tuple(kv[i] for kv in past), block is blocks[-1])
        if collect is not None:
            collect(of_block)
    return segments


@dataclass(frozen=True)
class Span:
    """Place of a piece in the whole sequence. mask: [B, stop - start] bool, True = token; None = no padding."""

    start: int
    stop: int
    mask: Tensor | None


def spans(latents: PackedLatents, text: TextCond | None) -> dict[str, Span]:
    """Place of every piece in the sequence; an absent piece has an empty span."""
    words = 0 if text is None else text.embeds.shape[1]
    middle, end = words + latents.num_target_tokens, words + latents.tokens.shape[1]
    images = latents.mask
    return {
        TEXT: Span(0, words, None if text is None or text.mask is None else text.mask.bool()),
        TARGET: Span(words, middle, None),
        REFERENCES: Span(middle, end, None if images is None else images[:, latents.num_target_tokens :]),
    }


def key_mask(spans: Sequence[Span], batch: int, device: torch.device) -> Tensor | None:
    """Attention mask [B, 1, 1, keys] over the keys of these spans, True = attend; None if nothing is padded."""
    if all(span.mask is None for span in spans):
        return None
    everything = torch.ones(batch, 1, dtype=torch.bool, device=device)
    masks = [everything.expand(-1, s.stop - s.start) if s.mask is None else s.mask for s in spans]
    mask = torch.cat(masks, dim=1)
    # a sample without references beside one with references: its padding must attend to some key, or softmax gives NaN
    return (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]


def reference_tokens(latents: PackedLatents) -> Tensor:
    """Mask [1, S, 1] bool of the image tokens, True for those of references."""
    seq = latents.tokens.shape[1]
    return (torch.arange(seq, device=latents.tokens.device) >= latents.num_target_tokens)[None, :, None]
