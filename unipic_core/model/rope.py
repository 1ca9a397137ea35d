"""Rotary positions of the packed sequence (frame, row, column), as the released weights were trained."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..conditioning.sequence import SampleShapes

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [1 or B, L + S, 1, head_dim / 2] float32: text first, then the pictures."""


def image_positions(shapes: SampleShapes, layered: bool = False) -> Tensor:
    """[S, 3] positions. Picture i has frame i; rows and columns are centred: -(h - h//2) .. h//2 - 1.

    layered: Qwen-Image-Layered's variant, in which the last picture (the condition) has frame -1.
    """
    pieces = []
    for i, shape in enumerate(shapes):
        frame = -1 if layered and i == len(shapes) - 1 else i
        rows = torch.arange(shape.height) - (shape.height - shape.height // 2)
        columns = torch.arange(shape.width) - (shape.width - shape.width // 2)
        grid = torch.meshgrid(torch.tensor([frame]), rows, columns, indexing="ij")
        pieces.append(torch.stack(grid, dim=-1).reshape(-1, 3))
    return torch.cat(pieces)


def text_start(shapes: SampleShapes, layered: bool = False) -> int:
    """First text position: the largest h//2 or w//2 over ALL pictures, references included."""
    start = max(max(s.height // 2, s.width // 2) for s in shapes)
    return max(start, len(shapes) - 1) if layered else start


@lru_cache(maxsize=64)
def joint_positions(batch_shapes: tuple[SampleShapes, ...], text_tokens: int, layered: bool = False) -> Tensor:
    """[1 or B, L + S, 3] float32 on the CPU: text first, then the pictures; one row for equal samples, else padded."""
    samples = batch_shapes[:1] if len(set(batch_shapes)) == 1 else batch_shapes
    rows = []
    with torch.inference_mode(False):  # what is kept must serve training too
        for shapes in samples:
            text = text_start(shapes, layered) + torch.arange(text_tokens)
            rows.append(torch.cat([text[:, None].expand(-1, 3), image_positions(shapes, layered)]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()


def rotation(positions: Tensor, axes_dims: tuple[int, int, int], theta: float = 10000.0) -> Rotation:
    """cos and sin of positions [.., N, 3]; each axis turns its own share of the head's pairs."""
    parts = [positions[..., i, None] * _frequencies(dim, theta, positions) for i, dim in enumerate(axes_dims)]
    angles = torch.cat(parts, dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def _frequencies(dim: int, theta: float, like: Tensor) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=like.device).float() / dim)


def rotate(x: Tensor, cos_sin: Rotation) -> Tensor:
    """Rotate neighbouring pairs of x [B, S, H, D] in float32; returns x's dtype."""
    cos, sin = cos_sin
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=-1).flatten(-2).to(x.dtype)
