"""Packing of latents into the network's token sequence.

A picture's latent [B, C, 1, H', W'] becomes H'/2 * W'/2 tokens of 4C values (2x2 neighbourhoods). The sequence of a
sample is [target | reference 1 | ... | reference K], stored with the shape in tokens of each piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PATCH = 2
"""Side of the neighbourhood of one token, in latent pixels."""

VAE_SCALE = 8
"""Pixels per latent pixel in each dimension (Qwen-Image VAE)."""

PIXELS_PER_TOKEN = PATCH * VAE_SCALE


@dataclass(frozen=True)
class LatentShape:
    """Size of one picture in tokens. UniPic has one frame; the field gives diffusers' order (f, h, w)."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width

    @classmethod
    def of_pixels(cls, width: int, height: int) -> LatentShape:
        """Shape of a picture of width x height pixels. Raises ValueError unless both are multiples of 16."""
        if width <= 0 or height <= 0 or width % PIXELS_PER_TOKEN or height % PIXELS_PER_TOKEN:
            raise ValueError(
                f"picture size must be positive multiples of {PIXELS_PER_TOKEN}, got {width}x{height}; "
                f"try {nearest_multiple(width, PIXELS_PER_TOKEN)}x{nearest_multiple(height, PIXELS_PER_TOKEN)}"
            )
        return cls(1, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN)

    @classmethod
    def of_latents(cls, latents: Tensor) -> LatentShape:
        """Shape of the picture whose latents are [..., H, W]."""
        return cls(1, latents.shape[-2] // PATCH, latents.shape[-1] // PATCH)


SampleShapes = tuple[LatentShape, ...]
"""Shapes of one sample's pictures: target, reference 1, ..., reference K."""


def nearest_multiple(value: float, multiple: int) -> int:
    """Round to the nearest multiple, ties to even like Python's round; at least one multiple."""
    return max(round(value / multiple), 1) * multiple


def pack_latents(latents: Tensor) -> Tensor:
    """Pack latents [B, C, 1, H, W] or [B, C, H, W] to tokens [B, H/2 * W/2, 4C]; exact inverse of `unpack_latents`.

    Raises ValueError for several frames and for odd H or W.
    """
    if latents.ndim == 5:
        if latents.shape[2] != 1:
            raise ValueError(f"expected one frame, got latents of shape {tuple(latents.shape)}")
        latents = latents[:, :, 0]
    b, c, h, w = latents.shape
    if h % PATCH or w % PATCH:
        raise ValueError(f"latent height and width must be even, got {h}x{w}")
    # UniPic 3, eq. 6
    x = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack_latents(tokens: Tensor, shape: LatentShape) -> Tensor:
    """Unpack tokens [B, h * w, 4C] to latents [B, C, 1, 2h, 2w]. Raises ValueError for another number of tokens."""
    b, n, values = tokens.shape
    if n != shape.num_tokens:
        raise ValueError(f"expected {shape.num_tokens} tokens for {shape.height}x{shape.width}, got {n}")
    c = values // PATCH**2
    x = tokens.reshape(b, shape.height, shape.width, c, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c, 1, shape.height * PATCH, shape.width * PATCH)


@dataclass(frozen=True)
class PackedLatents:
    """Immutable batch of packed sequences.

    tokens: [B, S, 4C], the target's tokens first; rows shorter than S are padded at the end.
    shapes: one tuple per sample; the references may differ between samples, the number of target tokens may not.
    num_target_tokens: N_O, the tokens whose velocity the network predicts.
    """

    tokens: Tensor
    shapes: tuple[SampleShapes, ...]
    num_target_tokens: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each sample without padding."""
        return tuple(sum(s.num_tokens for s in shapes) for shapes in self.shapes)

    @property
    def mask(self) -> Tensor | None:
        """Padding mask [B, S] bool, True for a token; None if nothing is padded."""
        seq = self.tokens.shape[1]
        if all(n == seq for n in self.lengths):
            return None
        lengths = torch.tensor(self.lengths, device=self.tokens.device)
        return torch.arange(seq, device=self.tokens.device) < lengths[:, None]

    @property
    def target(self) -> Tensor:
        """Tokens of the target [B, N_O, 4C]."""
        return self.tokens[:, : self.num_target_tokens]

    def row(self, i: int) -> PackedLatents:
        """Return sample i as a batch of one, with its padding."""
        return replace(self, tokens=self.tokens[i : i + 1], shapes=self.shapes[i : i + 1])

    def with_target(self, x_t: Tensor) -> PackedLatents:
        """Replace the target by x_t [B, N_O, 4C]; samplers call this in every step."""
        if x_t.shape[1] != self.num_target_tokens:
            raise ValueError(f"expected {self.num_target_tokens} target tokens, got {x_t.shape[1]}")
        return replace(self, tokens=torch.cat([x_t, self.tokens[:, self.num_target_tokens :].to(x_t)], dim=1))


def pack_with_references(
    x_t: Tensor, target: LatentShape | Sequence[LatentShape], references: Sequence[Sequence[Tensor]] = ()
) -> PackedLatents:
    """Pack targets x_t [B, N_O, 4C] with each sample's reference latents (UniPic 3, eq. 7 and 8).

    target: the targets' shape, or one per sample, all with N_O tokens. references: one list per sample of latents
    [C, 1, H, W] or [1, C, 1, H, W]; empty = no references. Raises ValueError if counts or shapes do not match.
    """
    batch = x_t.shape[0]
    targets = [target] * batch if isinstance(target, LatentShape) else list(target)
    samples = list(references) or [[] for _ in range(batch)]
    if len(samples) != batch or len(targets) != batch:
        raise ValueError(f"expected references and shapes for {batch} samples, got {len(samples)} and {len(targets)}")
    if any(s.num_tokens != x_t.shape[1] for s in targets):
        raise ValueError(f"expected target shapes of {x_t.shape[1]} tokens, got {targets}")
    rows, shapes = [], []
    for row, shape, latents in zip(x_t, targets, samples, strict=True):
        packed = [pack_latents(z if z.ndim == 5 else z[None])[0].to(row) for z in latents]
        # UniPic 3, eq. 7: S = [target | reference 1 | ... | reference K]
        rows.append(torch.cat([row, *packed]))
        # UniPic 3, eq. 8: the shape of each piece
        shapes.append((shape, *map(LatentShape.of_latents, latents)))
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return PackedLatents(tokens, tuple(shapes), x_t.shape[1])


@dataclass(frozen=True)
class TextCond:
    """Text condition: output of the condition encoder. embeds: [B, L, D]; mask: [B, L] bool, True = token; None = no
    padding."""

    embeds: Tensor
    mask: Tensor | None = None

    @classmethod
    def stack(cls, conds: Sequence[TextCond]) -> TextCond:
        """Batch samples of different lengths, padded at the end."""
        rows = [e if c.mask is None else e[m] for c in conds for e, m in zip(c.embeds, _masks(c), strict=True)]
        lengths = torch.tensor([len(r) for r in rows], device=rows[0].device)
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        if bool((lengths == embeds.shape[1]).all()):
            return cls(embeds)
        return cls(embeds, torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None])

    def to(self, device: torch.device | str) -> TextCond:
        return TextCond(self.embeds.to(device), None if self.mask is None else self.mask.to(device))

    def row(self, i: int) -> TextCond:
        """Return the condition of sample i, [1, L, D], with its padding."""
        return TextCond(self.embeds[i : i + 1], None if self.mask is None else self.mask[i : i + 1])

    def expand(self, batch: int) -> TextCond:
        """Repeat one condition for a batch, without copying."""
        mask = None if self.mask is None else self.mask.expand(batch, -1)
        return TextCond(self.embeds.expand(batch, -1, -1), mask)


def _masks(cond: TextCond) -> Tensor:
    if cond.mask is not None:
        return cond.mask
    return torch.ones(cond.embeds.shape[:2], dtype=torch.bool, device=cond.embeds.device)
