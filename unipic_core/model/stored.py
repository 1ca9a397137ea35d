"""Linear layers whose weights are stored in fp8 or in main memory, and dequantised on each use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pinned import pinned

Stored = tuple[Tensor, Tensor | None]
"""Stored weight of a layer, and its scale."""


class Swap(Protocol):
    """Copies weights to the device ahead of their use (block_swap.BlockSwap)."""

    def serves(self, layer: StoredLinear, device: torch.device) -> bool: ...

    def stored(self, layer: StoredLinear, device: torch.device, returns: bool = False) -> Stored: ...

    def release(self) -> None: ...


class StoredLinear(nn.Linear):
    """Linear layer whose stored weight is dequantised on each use, on the device of the input.

    weight: [out, in] in its storage dtype. scale: for fp8 a scalar or [out, 1]; None for an unscaled weight.
    """

    on_device: bool = True
    """True: the stored weight moves to the device with the layer. False: it stays in main memory."""

    swap: Swap | None = None
    """Copies the weight to the device ahead of its use; None: it is copied for each product."""

    scale: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", None, persistent=False)

    def store(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Set the stored weight and its scale; the weight is pinned if it stays in main memory beside a GPU."""
        if self.swap is not None:
            self.swap.release()
        if not self.weight.is_meta and self.weight.dtype == weight.dtype:
            self.weight.data.copy_(weight)
        else:
            pins = not self.on_device and torch.cuda.is_available()
            self.weight = nn.Parameter(pinned(weight) if pins else weight, requires_grad=False)
        self.scale = None if scale is None else scale.to(weight.device)

    def dequantised(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] on this device in this dtype."""
        weight, scale = self.stored(device)
        weight = weight.to(dtype)
        return weight if scale is None else weight.mul_(scale)

    def stored(self, device: torch.device, returns: bool = False) -> Stored:
        """Stored weight and its scale on this device. returns: a backward pass follows and asks for them again."""
        if self.swap is not None and self.swap.serves(self, device):
            return self.swap.stored(self, device, returns)
        scale = None if self.scale is None else self.scale.to(device, non_blocking=True)
        return self.weight.to(device, non_blocking=True), scale

    def product(self, x: Tensor) -> Tensor:
        """Compute x W^T + b in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantised(x.device, x.dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        """Move the layer as torch does; with on_device False all but its weight and scale."""
        if self.on_device:
            return super()._apply(fn, recurse)
        if self.swap is not None:
            self.swap.release()
        weight, scale = self._parameters.pop("weight"), self._buffers.pop("scale")
        try:
            super()._apply(fn, recurse)
        finally:
            others = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({"weight": weight, **others})
            self._buffers["scale"] = scale
        return self


class StoredOperations:
    """Layers for `MMDiT` with StoredLinear in the place of nn.Linear."""

    Linear: ClassVar[type] = StoredLinear
    LayerNorm: ClassVar[type] = nn.LayerNorm
    RMSNorm: ClassVar[type] = nn.RMSNorm
    Embedding: ClassVar[type] = nn.Embedding
