"""Network inputs of a batch: padded sequences, micro-batches of similar length, and their random draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unipic_core.conditioning.sequence import (
    LatentShape,
    PackedLatents,
    TextCond,
    pack_latents,
    pack_with_references,
)

from ..data.shards import Rows
from ..seeds import mixed_seed
from .correspondence import Owners
from .token_pointer import ShownTokens


@dataclass(frozen=True)
class Inputs:
    """Network inputs of one micro-batch at micro step `index`.

    x0: [B, N, 4C]; latents: sequence with x0 as its target; first: index of its first sample in the batch, the noise
    seed without `rows`; name: for messages; owners: reference of each target token, for data with masks; dropped: bool
    [B], samples without their prompt; rows: numbers of the samples in the data, the noise seeds; counts: False for a
    filler that only keeps processes in step; mask: float32 [B, N], the share of each target token that trains in a
    masked loss, None: all of each; shown: reference tokens that each target token shows, for endless scenes.
    """

    x0: Tensor
    latents: PackedLatents
    cond: TextCond
    uncond: TextCond
    index: int = 0
    first: int = 0
    name: str = ""
    owners: Owners | None = None
    dropped: Tensor | None = None
    rows: tuple[int, ...] = ()
    counts: bool = True
    mask: Tensor | None = None
    shown: ShownTokens | None = None

    @property
    def finite(self) -> Tensor:
        """Bool [B]: samples whose latents and text embeddings hold finite numbers only."""
        tensors = (self.x0, self.latents.tokens, self.cond.embeds, self.uncond.embeds)
        return torch.stack([torch.isfinite(t).flatten(1).all(1) for t in tensors]).all(0)

    def filler(self) -> Inputs:
        """The same shapes without a number of the data, which only keeps processes in step."""
        latents = replace(self.latents, tokens=torch.zeros_like(self.latents.tokens))
        cond, uncond = (replace(text, embeds=torch.zeros_like(text.embeds)) for text in (self.cond, self.uncond))
        return replace(self, x0=torch.zeros_like(self.x0), latents=latents, cond=cond, uncond=uncond, counts=False)

    def to(self, device: torch.device | str) -> Inputs:
        latents = replace(self.latents, tokens=self.latents.tokens.to(device))
        cond, uncond = self.cond.to(device), self.uncond.to(device)
        owners = None if self.owners is None else self.owners.to(device)
        dropped = None if self.dropped is None else self.dropped.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        shown = None if self.shown is None else self.shown.to(device)
        moved = replace(self, x0=self.x0.to(device), latents=latents, cond=cond, uncond=uncond, mask=mask)
        return replace(moved, owners=owners, dropped=dropped, shown=shown)


def make_inputs(rows: Rows, index: int = 0, first: int = 0, name: str = "") -> Inputs:
    """Make a batch from cached rows. Raises ValueError without text embeddings."""
    if rows.cond is None or rows.uncond is None:
        raise ValueError(f"the cached samples of {name or 'this batch'} have no text embeddings")
    x0 = pack_latents(rows.target)
    shape = LatentShape.of_latents(rows.target)
    samples = [[r[i][:, None] for r in rows.references] for i in range(len(x0))]
    latents = pack_with_references(x0, shape, samples)
    mask = None if rows.mask is None else rows.mask.flatten(1)  # row by row, as tokens are packed
    return Inputs(x0, latents, rows.cond, rows.uncond, index, first, name, mask=mask)


def padded_batch(batches: Sequence[Inputs]) -> Inputs:
    """Join batches with equal numbers of target tokens; shorter sequences and texts are padded."""
    x0 = torch.cat([b.x0 for b in batches])
    tokens = [row[:n] for b in batches for row, n in zip(b.latents.tokens, b.latents.lengths, strict=True)]
    shapes = tuple(s for b in batches for s in b.latents.shapes)
    latents = PackedLatents(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), shapes, x0.shape[1])
    cond, uncond = (TextCond.stack([getattr(b, name) for b in batches]) for name in ("cond", "uncond"))
    rows = tuple(row for b in batches for row in b.rows)
    mask = joined_masks(batches)
    return replace(batches[0], x0=x0, latents=latents, cond=cond, uncond=uncond, rows=rows, mask=mask)


def joined_masks(batches: Sequence[Inputs]) -> Tensor | None:
    """The masks of all samples; those without one train everywhere."""
    if all(b.mask is None for b in batches):
        return None
    return torch.cat([torch.ones(b.x0.shape[:2]) if b.mask is None else b.mask for b in batches])


def select_text(first: np.ndarray, a: TextCond, b: TextCond) -> TextCond:
    """Take sample i from `a` where first[i] is True, else from `b`."""
    rows = [(a if f else b).row(i) for i, f in enumerate(first)]
    return TextCond.stack(rows)


class Draws:
    """Random numbers of one micro step: a pure function of (seed, index, row), drawn on the CPU."""

    def __init__(self, seed: int, batch: Inputs) -> None:
        self.like = batch.x0
        rows = batch.rows or range(batch.first, batch.first + len(batch.x0))
        self.generators = [torch.Generator().manual_seed(mixed_seed(seed, batch.index, row)) for row in rows]

    def noise(self) -> Tensor:
        """Draw eps [B, N, 4C], new on every call."""
        shape = self.like.shape[1:]
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.like)
