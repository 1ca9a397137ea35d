"""Conversions of the flow. t = 0 is data, t = 1 is noise; x_t = (1 - t) x0 + t eps; v = eps - x0."""

from __future__ import annotations

import torch
from torch import Tensor


def like(t: Tensor | float, x: Tensor) -> Tensor:
    """Convert t, a number or [B], to a tensor that broadcasts over x [B, ...]; float64 for float64 x, else float32."""
    t = torch.as_tensor(t, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def add_noise(x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t = like(t, x0)
    return ((1 - t) * x0 + t * eps).to(x0.dtype)


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x0."""
    return eps - x0


def velocity_to_x0(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """x0 = x_t - t v."""
    return (x_t - like(t, x_t) * v).to(x_t.dtype)


def x0_to_velocity(x_t: Tensor, x0: Tensor, t: Tensor | float) -> Tensor:
    """v = (x_t - x0) / t, for t > 0."""
    return ((x_t - x0) / like(t, x_t)).to(x_t.dtype)
