"""Linear layers on a GPU's fp8 units: torch._scaled_mm, with the activations' scale taken anew in every call."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipic_core.weights.convert import quantise_fp8

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST_ROWS = 16
"""The kernel's matrices come in multiples of 16; one row of a time embedding is padded to that."""


def scaled_product(
    x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """x [n, in] and weight [out, in] in fp8, a scale each -> [n, out] in `dtype`; sums as fast as the units can."""
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=scale, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


class ScaledLinear(nn.Module):
    """y = (x / s_x)_fp8 (W / s_w)_fp8^T s_x s_w + b, with one scale per tensor. Inputs in bfloat16, no gradients."""

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=FP8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.ones((), device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def fill(self, weight: Tensor) -> None:
        """Take over a weight [out, in] in any type."""
        values, scale = quantise_fp8(weight)
        self.weight.data.copy_(values)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if count < LEAST_ROWS:
            rows = F.pad(rows, (0, 0, 0, LEAST_ROWS - count))
        scale = torch.linalg.vector_norm(rows, float("inf")).float().clamp(min=1e-12) / LARGEST
        values = (rows / scale).clamp(-LARGEST, LARGEST).to(FP8)
        y = scaled_product(values, self.weight, scale, self.scale, x.dtype, self.bias)
        return y[:count].view(*x.shape[:-1], -1)


class ScaledOperations:
    """What `MMDiT` makes a network with fp8 layers of."""

    Linear: ClassVar[type] = ScaledLinear
    LayerNorm: ClassVar[type] = nn.LayerNorm
    RMSNorm: ClassVar[type] = nn.RMSNorm
    Embedding: ClassVar[type] = nn.Embedding
