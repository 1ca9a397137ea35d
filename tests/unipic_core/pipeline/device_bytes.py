"""Count the bytes on a device that is simulated: tensors without memory, in which the CPU stands for the GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from unipic_core.model.block_swap import swap_blocks
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.model.stored import StoredLinear, StoredOperations
from unipic_core.weights.stored import Storage
from unipic_core.weights.transformer import is_block_matrix

DEVICE, MAIN = torch.device("cpu"), torch.device("lazy:0")
"""What stands for the GPU, and for the main memory: a device of torch's that computes nothing here."""


class DeviceBytes(TorchDispatchMode):
    """now: bytes of all storages on DEVICE that are alive; peak: the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type == DEVICE.type:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@contextmanager
def counting() -> Iterator[DeviceBytes]:
    with FakeTensorMode(allow_non_fake_inputs=True), DeviceBytes() as counted:
        yield counted


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention that writes no scores, as fused kernels do."""
    return torch.empty_like(q)


def network(config: MMDiTConfig, storage: Storage, dtype: torch.dtype) -> MMDiT:
    """The network as `load_stored` leaves it on DEVICE, without numbers."""
    with _disable_current_modes():
        made = MMDiT(config, operations=StoredOperations, device="meta", compute_dtype=dtype, attention=fused)
    swap_blocks(made, storage.left_behind)
    for module_name, module in made.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            shape = tuple(parameter.shape)
            if isinstance(module, StoredLinear) and is_block_matrix(f"{module_name}.{name}", shape):
                kind = torch.float8_e4m3fn if storage.fp8 else dtype
                place = DEVICE if module.on_device else MAIN
                module.store(torch.empty(shape, dtype=kind, device=place), torch.ones(()) if storage.fp8 else None)
            else:
                module._parameters[name] = nn.Parameter(torch.empty(shape, dtype=dtype, device=DEVICE), False)
    return made
