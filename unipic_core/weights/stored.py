"""Load the network with little memory: its blocks' matrices in fp8, and some of the blocks in main memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.block_swap import swap_blocks
from ..model.mmdit import MMDiT
from ..model.stored import StoredLinear, StoredOperations
from .convert import quantise_fp8
from .files import Weights
from .formats.quantised import FP8
from .lora import LoRA, MergeReport
from .transformer import OpenedModel, is_block_matrix

STORAGES = ("auto", "full", "fp8")
"""Storage of the blocks' matrices: "full" in the dtype to compute in; "fp8" in fp8 with one scale each; "auto" as in
the file if it has scaled fp8, else "full"."""


@dataclass(frozen=True)
class Storage:
    """Storage of the blocks' matrices. fp8: in fp8. left_behind: number of last blocks that stay in main memory."""

    fp8: bool = False
    left_behind: int = 0


def holds_fp8(opened: OpenedModel, storage: str) -> bool:
    """True if the blocks' matrices will be stored in fp8. storage: one of STORAGES."""
    if storage != "auto":
        return storage == "fp8"
    return any(opened.weights.dtype(name) in FP8 for name in opened.block_matrices)


def load_stored(opened: OpenedModel, storage: Storage, dtype: torch.dtype, device: torch.device | str) -> MMDiT:
    """Load like `load_transformer`, with the blocks' matrices in `storage` and all else on the device in `dtype`."""
    network = MMDiT(opened.config, operations=StoredOperations, device="meta", compute_dtype=dtype)
    swap_blocks(network, storage.left_behind)
    for module_name, module in network.named_modules():
        for name, parameter in list(module._parameters.items()):
            full = f"{module_name}.{name}" if module_name else name
            if parameter is None:
                continue
            if isinstance(module, StoredLinear) and is_block_matrix(full, tuple(parameter.shape)):
                values, scale = _matrix(opened.weights, full, storage.fp8, dtype)
                place = device if module.on_device else "cpu"
                module.store(values.to(place), scale)
            else:
                module._parameters[name] = nn.Parameter(opened.weights.get(full).to(device=device, dtype=dtype))
    return network.eval()


def _matrix(weights: Weights, name: str, fp8: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Read a matrix in its storage dtype, and its scale; scaled fp8 of the file is not rounded again."""
    if not fp8:
        return weights.get(name).to(dtype), None
    if weights.dtype(name) not in FP8:
        return quantise_fp8(weights.get(name))
    quantisation = weights.quantised.get(name)
    scale = None if quantisation is None or quantisation.scale is None else quantisation.scale.read().float()
    return weights.stored(name).clone(), scale if scale is None or scale.numel() == 1 else scale.reshape(-1, 1)


def merge_into_stored(
    network: MMDiT, weights: Weights, before: Sequence[tuple[LoRA, float]], lora: LoRA, strength: float
) -> MergeReport:
    """Add a LoRA to a network of `load_stored` whose matrices are in fp8. Raises LoRAError like `merge_lora`.

    Each matrix is computed again from the file's weights with all LoRAs and rounded to fp8 once: added to the rounded
    matrix, a change smaller than a step of fp8 would be lost. before: the LoRAs that the network has.
    """
    parameters = dict(network.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    fitted = [(one.fit(shapes), by) for one, by in (*before, (lora, strength))]
    last = fitted[-1][0]
    last.check(strength)
    for name in last.table if strength else ():
        module = network.get_submodule(name.rpartition(".")[0])
        if isinstance(module, StoredLinear) and module.weight.dtype in FP8 and name.endswith(".weight"):
            value = weights.get(name).float()
            for one, by in fitted:
                value = one.apply(name, value, by)
            module.store(*quantise_fp8(value))
        else:
            parameters[name].copy_(last.apply(name, parameters[name], strength))
            if isinstance(module, StoredLinear) and module.swap is not None:
                module.swap.release()
    return last.report


def holds_matrices_in_fp8(network: MMDiT) -> bool:
    """True if a network from `load_stored` or `load_transformer` has matrices in fp8."""
    return any(isinstance(m, StoredLinear) and m.weight.dtype in FP8 for m in network.modules())
