"""Linear layers whose weights are stored in few bytes, or in the main memory, and restored for each product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StoredLinear(nn.Linear):
    """A linear layer whose weight is stored in one form and restored, where its input is, for each product.

    weight: [out, in] in the type of its storage. scale: of fp8 one number, or [out, 1]; None where there is none.
    """

    moves: bool = True
    """Whether the stored weight goes to the device with the layer, or stays in the main memory."""

    scale: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", None, persistent=False)

    def store(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Keep a weight as it is stored, with its scale; pinned if it stays behind and there is a GPU to copy it to."""
        if not self.moves and torch.cuda.is_available():
            weight = weight.pin_memory()
        if not self.weight.is_meta and self.weight.dtype == weight.dtype:
            self.weight.data.copy_(weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else scale.to(weight.device)

    def restored(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] where and as it is needed."""
        weight = self.weight.to(device, non_blocking=True).to(dtype)
        return weight if self.scale is None else weight.mul_(self.scale.to(device, non_blocking=True))

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b in the type of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.restored(x.device, x.dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        """As torch's, for a layer that stays behind without its weight and scale."""
        if self.moves:
            return super()._apply(fn, recurse)
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
    """Layers for `MMDiT` whose matrices are stored: only the linear ones differ from torch.nn's."""

    Linear: ClassVar[type] = StoredLinear
    LayerNorm: ClassVar[type] = nn.LayerNorm
    RMSNorm: ClassVar[type] = nn.RMSNorm
    Embedding: ClassVar[type] = nn.Embedding
