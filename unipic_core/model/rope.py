"""Rotary position embedding of the packed sequence (frame, row, column), as in the training of the released weights."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..conditioning.sequence import SampleShapes

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the angles, each [1 or B, L + S, 1, head_dim / 2] float32: text first, then the pictures."""


def image_positions(shapes: SampleShapes, layered: bool = False) -> Tensor:
    """Positions [S, 3] of the image tokens: frame i for picture i; centred rows and columns, -(h - h//2) .. h//2 - 1.

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
    """Position of the first text token: the largest h//2 or w//2 of all pictures, references included."""
    start = max(max(s.height // 2, s.width // 2) for s in shapes)
    return max(start, len(shapes) - 1) if layered else start


@lru_cache(maxsize=64)
def joint_positions(batch_shapes: tuple[SampleShapes, ...], text_tokens: int, layered: bool = False) -> Tensor:
    """Positions [1 or B, L + S, 3] float32 on the CPU: text, then pictures; one row for equal samples, else padded."""
    samples = batch_shapes[:1] if len(set(batch_shapes)) == 1 else batch_shapes
    rows = []
    with torch.inference_mode(False):  # the cached tensor must be usable in training too
        for shapes in samples:
            text = text_start(shapes, layered) + torch.arange(text_tokens)
            rows.append(torch.cat([text[:, None].expand(-1, 3), image_positions(shapes, layered)]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float()


def rotation(positions: Tensor, axes_dims: tuple[int, int, int], theta: float = 10000.0) -> Rotation:
    """Compute cos and sin of the rotation angles for positions [.., N, 3]; axis i rotates axes_dims[i] / 2 pairs."""
    parts = [positions[..., i, None] * _frequencies(dim, theta, positions) for i, dim in enumerate(axes_dims)]
    angles = torch.cat(parts, dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def _frequencies(dim: int, theta: float, like: Tensor) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=like.device).float() / dim)


def rotate(x: Tensor, cos_sin: Rotation) -> Tensor:
    """Rotate neighbouring pairs of x [B, S, H, D] in float32; the result has x's dtype."""
    cos, sin = cos_sin
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=-1).flatten(-2).to(x.dtype)
