"""A frozen base in little memory: weights stored as float32, bfloat16, fp8 or nf4, anywhere, and restored where and
when a layer needs them. Nothing else of the network knows.

So the same stored weights serve a bfloat16 forward under autocast and a float32 tangent outside of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipic_core.model.attention import attention_named
from unipic_core.model.layers import set_parameters
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.convert import is_block_matrix, quantise_fp8
from unipic_core.weights.transformer import open_transformer

from ..config.run import ConfigError, NetworkConfig

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "nf4": torch.uint8}
"""Forms of a stored weight, and the type of its tensor; nf4 packs two weights in a byte."""

NF4_BLOCK = 64
"""Weights that share one float32 scale in nf4."""


class FrozenLinear(nn.Linear):
    """A linear layer that never trains. Its weight is stored in one form and restored for each use.

    A restored copy lives no longer than one product: what the backward pass needs of the weight is restored again.
    weight: [out, in], or nf4's packed bytes [out * in / 2, 1]. scale: of fp8 one number, of nf4 one per NF4_BLOCK.
    """

    kind: str = "fp32"
    moves: bool = True
    """Whether `place` takes the stored weight to the device, or leaves it in the main memory."""

    scale: Tensor | None

    def reserve(self, kind: str) -> None:
        """Room in the main memory for a weight of the form `kind` and a float32 bias."""
        self.kind = kind
        stored, scale = stored_form((self.out_features, self.in_features), kind)
        self.weight = nn.Parameter(torch.empty_like(stored, device="cpu"), requires_grad=False)
        self.register_buffer("scale", None if scale is None else torch.empty_like(scale, device="cpu"), False)
        self.bias = None if self.bias is None else nn.Parameter(torch.empty(self.out_features), requires_grad=False)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep a weight [out, in] and a bias [out] in the room that was reserved."""
        if self.scale is not None:
            weight, scale = QUANTISERS[self.kind](weight)
            self.scale.copy_(scale)
        self.weight.data.copy_(weight)
        if bias is not None:
            self.bias.data.copy_(bias)

    def restored(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] where and as it is needed."""
        weight = self.weight.to(device, non_blocking=True)
        if self.scale is None:
            return weight.to(dtype)
        scale = self.scale.to(device, non_blocking=True)
        if self.kind == "nf4":
            return restore_nf4(weight, scale, (self.out_features, self.in_features), dtype)
        return weight.to(dtype).mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            made: Tensor = Product.apply(x, self)
            return made
        return self.product(x)  # no custom function here: forward-mode differentiation goes through

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b in the type of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.restored(x.device, x.dtype), bias)

    def place(self, device: torch.device) -> None:
        """Take the layer to a device, or what does not stay behind of it."""
        self.weight = nn.Parameter(self._placed(self.weight.data, device), requires_grad=False)
        if self.scale is not None:
            self.scale = self._placed(self.scale, device)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.data.to(device), requires_grad=False)

    def _placed(self, stored: Tensor, device: torch.device) -> Tensor:
        if self.moves:
            return stored.to(device)
        return stored.pin_memory() if device.type == "cuda" else stored  # a GPU reads pinned memory at full speed


class Product(torch.autograd.Function):
    """x W^T + b of a FrozenLinear, which keeps no restored weight for its gradient with respect to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.restored(grad.device, grad.dtype), None


class FrozenOperations:
    """What `MMDiT` makes a frozen base of."""

    Linear: ClassVar[type] = FrozenLinear
    LayerNorm: ClassVar[type] = nn.LayerNorm
    RMSNorm: ClassVar[type] = nn.RMSNorm
    Embedding: ClassVar[type] = nn.Embedding


# --- nf4 --------------------------------------------------------------------------------------------------------------


def four_bit() -> Any:
    """bitsandbytes' functions, or ConfigError."""
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ConfigError(
            'network.weights nf4 needs bitsandbytes; pip install "comfyui-unipic[quant]", or choose bf16 or fp8'
        ) from error
    return functional


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (packed bytes [out * in / 2, 1], scales [out * in / 64] float32), on the weight's device.

    A GPU is borrowed where there is one: a CPU takes tens of minutes for the released weights.
    """
    fast = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else weight.device
    packed, state = four_bit().quantize_4bit(weight.to(fast), blocksize=NF4_BLOCK, quant_type="nf4")
    return packed.to(weight.device), state.absmax.to(weight.device)


def restore_nf4(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight of `shape`. bitsandbytes' own state is made anew: it would stay on the device of its last use.

    It is given one long row, because bitsandbytes 0.50 takes the wrong scales on a CPU for blocks that reach from one
    row into the next.
    """
    functional = four_bit()
    code = functional.get_4bit_type("nf4", device=packed.device)
    row = torch.Size((1, shape[0] * shape[1]))
    state = functional.QuantState(scale, row, code, NF4_BLOCK, "nf4", dtype)
    restored: Tensor = functional.dequantize_4bit(packed, state)
    return restored.view(shape)


QUANTISERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"fp8": quantise_fp8, "nf4": quantise_nf4}


def stored_form(shape: tuple[int, int], kind: str) -> tuple[Tensor, Tensor | None]:
    """The stored weight of a layer [out, in] and its scale, without memory (on the device meta)."""
    count = shape[0] * shape[1]
    scales = {"fp8": (), "nf4": (math.ceil(count / NF4_BLOCK),)}
    stored = torch.empty((math.ceil(count / 2), 1) if kind == "nf4" else shape, dtype=STORED[kind], device="meta")
    return stored, torch.empty(scales[kind], device="meta") if kind in scales else None


# --- the network ------------------------------------------------------------------------------------------------------


def form_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """How the weight `name` is stored in a base of `kind`: layers outside the blocks are few, and what they do is felt
    by all tokens, so they have no less than bfloat16."""
    return kind if kind == "fp32" or is_block_matrix(name, shape) else "bf16"


def load_frozen(config: NetworkConfig) -> MMDiT:
    """The base of adapter mode, filled tensor by tensor in its stored form; activations are float32 or autocast's."""
    if config.weights == "nf4":
        four_bit()  # before anything is read
    opened = open_transformer(config.transformer or config.model)
    weights, sizes = opened.weights, opened.config
    network = MMDiT(
        sizes,
        operations=FrozenOperations,
        attention=attention_named(config.attention),
        device="meta",
        compute_dtype=torch.float32,
    )
    leave_behind(network, config.block_swap)
    for name, module in network.named_modules():  # all room first: what comes and goes would leave holes between
        if isinstance(module, FrozenLinear):
            module.reserve(form_of(f"{name}.weight", (module.out_features, module.in_features), config.weights))
        else:
            set_parameters(module, lambda _, parameter: torch.empty(parameter.shape), requires_grad=False)
    for name, module in network.named_modules():
        own = {n: weights.get(f"{name}.{n}") for n, p in module._parameters.items() if p is not None}
        if isinstance(module, FrozenLinear):
            module.fill(own["weight"], own.get("bias"))
        else:
            for n, tensor in own.items():
                module.get_parameter(n).data.copy_(tensor)
    network.gradient_checkpointing = config.gradient_checkpointing
    return network.eval()


def leave_behind(network: MMDiT, blocks: int) -> None:
    """The stored weights of the last so many blocks stay in the main memory."""
    total = len(network.transformer_blocks)
    if blocks > total:
        raise ConfigError(f"network.block_swap must be at most the network's {total} blocks, got {blocks}")
    for block in network.transformer_blocks[total - blocks :]:
        for module in block.modules():
            if isinstance(module, FrozenLinear):
                module.moves = False


def place(network: nn.Module, device: torch.device) -> None:
    """Move a network to a device, each frozen layer as it wants."""
    for module in network.modules():
        if isinstance(module, FrozenLinear):
            module.place(device)
        else:
            for p in module._parameters.values():
                if p is not None:
                    p.data = p.data.to(device)
