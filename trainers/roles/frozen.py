"""Frozen base network with weights stored as float32, bfloat16, fp8 or nf4, in main memory or on the GPU.

Each layer dequantises its weight on use, on the device and in the dtype of its input. The same stored weights
therefore serve a bfloat16 forward pass under autocast and a float32 tangent outside of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unipic_core.model.attention import attention_named
from unipic_core.model.block_swap import swap_blocks
from unipic_core.model.layers import set_parameters
from unipic_core.model.mmdit import MMDiT
from unipic_core.model.pinned import pinned
from unipic_core.model.stored import StoredLinear
from unipic_core.weights.convert import quantise_fp8
from unipic_core.weights.transformer import is_block_matrix, open_transformer

from ..config.run import ConfigError, NetworkConfig
from .sharding import Sharding, fill_share, is_main_process, mesh_of, several_processes, split

TENSOR_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "nf4": torch.uint8}
"""Storage dtype of a weight -> dtype of its tensor; nf4 packs two weights into a byte."""

NF4_BLOCK = 64
"""Number of nf4 weights that share one float32 scale."""


class FrozenLinear(StoredLinear):
    """Frozen linear layer whose stored weight is dequantised on each use.

    The dequantised copy is freed after the product; the backward pass dequantises again. weight: [out, in], or for nf4
    packed bytes [out * in / 2, 1]. scale: fp8: a scalar; nf4: one per NF4_BLOCK weights.
    """

    storage_dtype: str = "fp32"

    def reserve(self, storage_dtype: str, device: str = "cpu") -> None:
        """Allocate memory for a weight in this storage dtype and a float32 bias."""
        self.storage_dtype = storage_dtype
        stored, scale = empty_storage((self.out_features, self.in_features), storage_dtype)
        self.weight = nn.Parameter(torch.empty_like(stored, device=device), requires_grad=False)
        self.register_buffer("scale", None if scale is None else torch.empty_like(scale, device=device), False)
        bias = torch.empty(self.out_features, device=device)
        self.bias = None if self.bias is None else nn.Parameter(bias, requires_grad=False)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantise a weight [out, in] and copy it with a bias [out] into the reserved memory."""
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        for name, tensor in self.stored_tensors(tensors).items():
            getattr(self, name).data.copy_(tensor)

    def stored_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to store, by name, from a weight [out, in] and perhaps a bias [out]: quantised as reserved."""
        if self.scale is None:
            return dict(tensors)
        weight, scale = QUANTISERS[self.storage_dtype](tensors["weight"])
        return {**tensors, "weight": weight, "scale": scale}

    def dequantised(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] on this device in this dtype."""
        if self.storage_dtype != "nf4" or self.scale is None:
            return super().dequantised(device, dtype)
        weight, scale = self.stored(device)
        assert scale is not None  # as in main memory
        return dequantise_nf4(weight, scale, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
        if self.swap is not None and self.swap.serves(self, x.device):
            self.swap.stored(self, x.device, returns=torch.is_grad_enabled())  # backward begins with the last block
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = FrozenProduct.apply(x, self)
            return y
        return self.product(x)  # no custom function: forward-mode differentiation does not support it

    def place(self, device: torch.device) -> None:
        """Move the layer to a device; with on_device False only its bias."""
        self.weight = nn.Parameter(self._placed(self.weight.data, device), requires_grad=False)
        if self.scale is not None:
            self.scale = self._placed(self.scale, device)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.data.to(device), requires_grad=False)

    def _placed(self, stored: Tensor, device: torch.device) -> Tensor:
        if self.on_device:
            return stored.to(device)
        return pinned(stored) if device.type == "cuda" else stored


class FrozenProduct(torch.autograd.Function):
    """x W^T + b of a FrozenLinear that saves no dequantised weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantised(grad.device, grad.dtype), None


class FrozenOperations:
    """Layer classes of a frozen `MMDiT`."""

    Linear: ClassVar[type] = FrozenLinear
    LayerNorm: ClassVar[type] = nn.LayerNorm
    RMSNorm: ClassVar[type] = nn.RMSNorm
    Embedding: ClassVar[type] = nn.Embedding


# --- nf4 --------------------------------------------------------------------------------------------------------------


def bitsandbytes_functional() -> Any:
    """Import bitsandbytes.functional. Raises ConfigError if it is not installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ConfigError(
            'network.weights nf4 needs bitsandbytes; pip install "comfyui-unipic[quant]", or choose bf16 or fp8'
        ) from error
    return functional


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weight [out, in] to (packed bytes [out * in / 2, 1], float32 scales [out * in / 64]) on its device.

    The work is done on a GPU if there is one: a CPU takes tens of minutes for the released weights.
    """
    fastest = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else weight.device
    packed, state = bitsandbytes_functional().quantize_4bit(weight.to(fastest), blocksize=NF4_BLOCK, quant_type="nf4")
    return packed.to(weight.device), state.absmax.to(weight.device)


def dequantise_nf4(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantise to a weight of `shape`.

    bitsandbytes' QuantState is rebuilt on each call because it stays on the device of its last use. The weight is
    passed as one long row: on a CPU, bitsandbytes 0.50 applies wrong scales to blocks that span two rows.
    """
    functional = bitsandbytes_functional()
    code = functional.get_4bit_type("nf4", device=packed.device)
    row = torch.Size((1, shape[0] * shape[1]))
    state = functional.QuantState(scale, row, code, NF4_BLOCK, "nf4", dtype)
    weight: Tensor = functional.dequantize_4bit(packed, state)
    return weight.view(shape)


QUANTISERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"fp8": quantise_fp8, "nf4": quantise_nf4}


def empty_storage(shape: tuple[int, int], storage_dtype: str) -> tuple[Tensor, Tensor | None]:
    """Stored weight and scale of a layer [out, in] on the meta device."""
    count = shape[0] * shape[1]
    scales = {"fp8": (), "nf4": (math.ceil(count / NF4_BLOCK),)}
    stored_shape = (math.ceil(count / 2), 1) if storage_dtype == "nf4" else shape
    stored = torch.empty(stored_shape, dtype=TENSOR_DTYPES[storage_dtype], device="meta")
    return stored, torch.empty(scales[storage_dtype], device="meta") if storage_dtype in scales else None


# --- the network ------------------------------------------------------------------------------------------------------


def storage_dtype_of(name: str, shape: tuple[int, ...], base_dtype: str) -> str:
    """Storage dtype of the weight `name` in a base of `base_dtype`.

    Layers outside the blocks are small and affect all tokens, so they keep at least bfloat16.
    """
    return base_dtype if base_dtype == "fp32" or is_block_matrix(name, shape) else "bf16"


def load_frozen(config: NetworkConfig) -> MMDiT:
    """Load the frozen base tensor by tensor in its storage dtype; activations are float32 or autocast's.

    With config.shard it stays on the meta device, for `shard_frozen`.
    """
    if config.weights == "nf4":
        bitsandbytes_functional()  # fail before reading weights
    opened = open_transformer(config.transformer or config.model)
    weights, sizes = opened.weights, opened.config
    network = MMDiT(
        sizes,
        operations=FrozenOperations,
        attention=attention_named(config.attention),
        device="meta",
        compute_dtype=torch.float32,
    )
    keep_in_main_memory(network, config.block_swap)
    device = "meta" if config.shard else "cpu"
    for name, module in network.named_modules():  # allocate all first: temporary tensors would fragment the memory
        if isinstance(module, FrozenLinear):
            shape = (module.out_features, module.in_features)
            module.reserve(storage_dtype_of(f"{name}.weight", shape, config.weights), device)
        else:
            set_parameters(module, lambda _, p: torch.empty(p.shape, device=device), requires_grad=False)
    if not config.shard:
        for name, module in network.named_modules():
            for n, tensor in tensors_of(name, module, weights.get).items():
                getattr(module, n).data.copy_(tensor)
    network.gradient_checkpointing = config.gradient_checkpointing
    return network.eval()


def tensors_of(name: str, module: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Tensors to store in a module by their names in it. read: full parameter name -> tensor of the file."""
    tensors = {n: read(f"{name}.{n}") for n, p in module._parameters.items() if p is not None}
    return module.stored_tensors(tensors) if tensors and isinstance(module, FrozenLinear) else tensors


def shard_frozen(
    network: MMDiT,
    device: torch.device,
    sharding: Sharding,
    read: Callable[[str], Tensor],
    adapters: Sequence[nn.Parameter],
) -> None:
    """Shard a frozen base on the meta device over processes and fill it; its adapters stay whole in each.

    read: parameter name -> whole tensor; the main process alone calls it, layer by layer, and quantises.
    """
    several, main = several_processes(), is_main_process()
    values = [p.detach().clone() for p in adapters]
    if several:
        split(network, mesh_of(device, sharding.over), whole=adapters)
    network.to_empty(device=device)
    for p, value in zip(adapters, values, strict=True):
        p.data.copy_(value)
    of_adapters = set(map(id, adapters))
    for name, module in network.named_modules():
        names = [n for n, p in module._parameters.items() if p is not None and id(p) not in of_adapters]
        names += ["scale"] if names and isinstance(module, FrozenLinear) and module.scale is not None else []
        tensors = tensors_of(name.replace(".base_layer", ""), module, read) if names and main else {}
        for n in names:
            fill_share(getattr(module, n).detach(), partial(tensors.__getitem__, n))


def keep_in_main_memory(network: MMDiT, blocks: int) -> None:
    """Keep the stored weights of the last `blocks` blocks in main memory (block swap)."""
    total = len(network.transformer_blocks)
    if blocks > total:
        raise ConfigError(f"network.block_swap must be at most the network's {total} blocks, got {blocks}")
    swap_blocks(network, blocks)


def place(network: nn.Module, device: torch.device) -> None:
    """Move a network to a device; frozen layers with on_device False keep their weights in main memory."""
    for module in network.modules():
        if isinstance(module, FrozenLinear):
            module.place(device)
        else:
            for p in module._parameters.values():
                if p is not None:
                    p.data = p.data.to(device)
