"""What the network and the VAE are built of: classes of layers, which a host may bring, and where their weights go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypedDict

import torch

LayerClass = Callable[..., Any]


class Operations(Protocol):
    """Classes of layers with the arguments of torch.nn's. torch.nn is one; ComfyUI's cast or hold quantised weights."""

    @property
    def Linear(self) -> LayerClass: ...

    @property
    def LayerNorm(self) -> LayerClass: ...

    @property
    def RMSNorm(self) -> LayerClass: ...

    @property
    def Embedding(self) -> LayerClass: ...


class ConvOperations(Protocol):
    """The same for the VAE."""

    @property
    def Conv2d(self) -> LayerClass: ...


class Factory(TypedDict):
    """Type and device of a layer's weights."""

    dtype: torch.dtype | None
    device: torch.device | str | None
