"""Layer classes of the network and the VAE, which a host may replace, and filling networks from the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

LayerClass = Callable[..., Any]


class Operations(Protocol):
    """Layer classes with torch.nn's arguments: torch.nn itself, or ComfyUI's, which cast or store quantised weights."""

    @property
    def Linear(self) -> LayerClass: ...

    @property
    def LayerNorm(self) -> LayerClass: ...

    @property
    def RMSNorm(self) -> LayerClass: ...

    @property
    def Embedding(self) -> LayerClass: ...


class ConvOperations(Protocol):
    """Layer classes of the VAE, with torch.nn's arguments."""

    @property
    def Conv2d(self) -> LayerClass: ...


class Factory(TypedDict):
    """Dtype and device of a layer's weights."""

    dtype: torch.dtype | None
    device: torch.device | str | None


def fill_parameters(model: nn.Module, tensor_of: Callable[[str], Tensor], *, requires_grad: bool = True) -> None:
    """Replace the parameters of a model built on the meta device, one at a time.

    tensor_of: parameter name -> tensor in its final dtype and place.
    """
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""

        def of_module(name: str, _: Tensor, prefix: str = prefix) -> Tensor:
            return tensor_of(prefix + name)

        set_parameters(module, of_module, requires_grad=requires_grad)


def set_parameters(module: nn.Module, tensor_of: Callable[[str, Tensor], Tensor], *, requires_grad: bool) -> None:
    """Replace the parameters of one module, not of its children. tensor_of: (name, old parameter) -> new tensor."""
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            module._parameters[name] = nn.Parameter(tensor_of(name, parameter), requires_grad=requires_grad)
