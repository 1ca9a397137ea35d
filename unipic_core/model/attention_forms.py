"""Which tokens see which: the forms of attention, as segments of the sequence that attend to those before them.

The whole sequence is [text | target | references]. In the release all of it is one segment. In the causal forms
references, or references and text, come first: they are modulated at t = 0 and see nothing that a step changes, so
their keys and values are the same in every step and for every seed, and references' also for every prompt. They are
computed once and kept (`MMDiT.prefill`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..conditioning.sequence import PackedLatents, TextCond
from .blocks import JointState, KeyValue
from .config import REFERENCES, TARGET, TEXT

ConditionCache = Mapping[str, tuple[KeyValue, ...]]
"""The result of `MMDiT.prefill`: REFERENCES or TEXT -> keys and values in every block."""


@dataclass(frozen=True)
class Segment:
    """Tokens that attend to one another and to the segments before them, on their way through the blocks.

    img [B, S, width], txt [B, L, width]: None where the segment has none. wanted: the image tokens, from the first,
    that are wanted after the last block; 0: only keys and values are.
    """

    pieces: tuple[str, ...]
    img: Tensor | None
    txt: Tensor | None
    temb: Tensor
    state: JointState
    wanted: int


Step = Callable[[Any, Sequence[Segment], tuple[KeyValue, ...], bool], tuple[list[Segment], list[KeyValue]]]
"""(block, segments, keys and values of earlier segments in this block, last block) -> segments, those they keep."""


def advance(
    block: Any, segments: Sequence[Segment], past: tuple[KeyValue, ...], last: bool
) -> tuple[list[Segment], list[KeyValue]]:
    """All segments through one block, each attending to those before it.

    Returns the segments, and the keys and values of those that keep them.
    """
    done, kept = [], []
    for segment in segments:
        state = replace(segment.state, past=past)
        img, txt, kv = block(segment.img, segment.txt, segment.temb, state, segment.wanted if last else None)
        done.append(replace(segment, img=img, txt=txt))
        if kv is not None:
            past = (*past, kv)
            kept.append(kv)
    return done, kept


def through_blocks(
    blocks: Iterable[object],
    segments: Sequence[Segment],
    past: Sequence[Sequence[KeyValue]] = (),
    step: Step = advance,
    keep: list[list[KeyValue]] | None = None,
) -> Sequence[Segment]:
    """The loop over the blocks. past: keys and values, by block, of each earlier segment that is not computed.

    step: what happens in one block; a host hooks in here. keep: a list that gets each block's keys and values; without
    one they are freed after their block.
    """
    blocks = list(blocks)
    for i, block in enumerate(blocks):
        segments, kept = step(block, segments, tuple(kv[i] for kv in past), block is blocks[-1])
        if keep is not None:
            keep.append(kept)
    return segments


@dataclass(frozen=True)
class Span:
    """A piece's place in [text | target | references], and which of its tokens are there in each sample."""

    start: int
    stop: int
    mask: Tensor | None
    """[B, stop - start] bool; None = all."""


def spans(latents: PackedLatents, text: TextCond | None) -> dict[str, Span]:
    """The place of every piece; an absent one is empty."""
    words = 0 if text is None else text.embeds.shape[1]
    middle, end = words + latents.num_target_tokens, words + latents.tokens.shape[1]
    images = latents.mask
    return {
        TEXT: Span(0, words, None if text is None or text.mask is None else text.mask.bool()),
        TARGET: Span(words, middle, None),
        REFERENCES: Span(middle, end, None if images is None else images[:, latents.num_target_tokens :]),
    }


def key_mask(seen: Sequence[Span], batch: int, device: torch.device) -> Tensor | None:
    """[B, 1, 1, keys], True where a key of these pieces may be attended to; None if nothing is padded."""
    if all(span.mask is None for span in seen):
        return None
    everything = torch.ones(batch, 1, dtype=torch.bool, device=device)
    masks = [everything.expand(-1, s.stop - s.start) if s.mask is None else s.mask for s in seen]
    mask = torch.cat(masks, dim=1)
    # a sample without references beside one that has some: its padding must see something, or softmax gives NaN
    return (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]


def reference_tokens(latents: PackedLatents) -> Tensor:
    """[1, S, 1] bool: True where a token belongs to a reference."""
    seq = latents.tokens.shape[1]
    return (torch.arange(seq, device=latents.tokens.device) >= latents.num_target_tokens)[None, :, None]
