"""Memory plan of a pipeline: device or main memory for each part, from the files' headers and the free memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UniPicError
from ..run.memory import MEMINFO, WORKING_BYTES, gigabytes, meminfo

ENCODER_BYTES = 2 * 2**30
"""Memory reserved for activations of the condition encoder."""

ROOMS = 2
"""Blocks for which the device has room while others are in main memory (model/block_swap.py)."""

MemoryInfo = Callable[[torch.device], tuple[int, int]]
"""device -> (free, total) bytes, as torch.cuda.mem_get_info."""


@dataclass(frozen=True)
class PartSizes:
    """Bytes of each part once loaded.

    network: the network without its blocks' matrices. block: the matrices of one of its `blocks`. restored: the largest
    matrix, if matrices are dequantised for each product. kv_cache: cached keys and values of a run.
    """

    network: int
    block: int
    blocks: int
    restored: int
    text_encoder: int
    vae: int
    kv_cache: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the network with its blocks, the condition encoder and the VAE."""
        return {
            "network": self.network + self.blocks * self.block,
            "text_encoder": self.text_encoder,
            "vae": self.vae,
        }


@dataclass(frozen=True)
class MemoryPlan:
    """Placement of the parts. turns: one part at a time is on the device, the others are in main memory. left_behind:
    number of last blocks of the network whose matrices stay in main memory and are copied one block ahead of their use,
    for which the device has room for two."""

    turns: bool = False
    left_behind: int = 0

    def note(self, blocks: int) -> str:
        """Describe the plan in one sentence, for a network of `blocks` blocks; empty if all parts are on the device."""
        if not self.turns:
            return ""
        note = "the GPU cannot hold all parts, so they take turns on it"
        if not self.left_behind:
            return note
        return (
            f"{note}, and {self.left_behind} of the network's {blocks} blocks are copied to it in every step; "
            "--storage fp8 halves the bytes copied"
        )


def plan_memory(
    device: torch.device,
    sizes: PartSizes,
    memory: MemoryInfo | None = None,
    main: Callable[[], int | None] | None = None,
) -> MemoryPlan:
    """Plan all parts on the device; else one part at a time; else with some of the network's blocks in main memory.

    memory: free and total bytes of a CUDA device. main: bytes of main memory and swap, None if unknown. Raises
    UniPicError if the parts fit nowhere.
    """
    if device.type != "cuda":
        _require_main_memory(sizes, (main or main_memory)())
        return MemoryPlan()
    free, _ = (memory or torch.cuda.mem_get_info)(device)
    loaded = sum(sizes.parts.values()) + sizes.kv_cache
    if loaded + sizes.restored + WORKING_BYTES <= free:
        return MemoryPlan()
    working = sizes.kv_cache + sizes.restored + WORKING_BYTES
    _require_device_memory(device, sizes, working, free)
    _require_main_memory(sizes, (main or main_memory)())
    missing = sizes.parts["network"] + working - free
    if missing <= 0 or not sizes.block:
        return MemoryPlan(turns=True)
    return MemoryPlan(turns=True, left_behind=min(math.ceil(missing / sizes.block) + ROOMS, sizes.blocks))


def _require_device_memory(device: torch.device, sizes: PartSizes, working: int, free: int) -> None:
    """Raise UniPicError if one part, with its activations, is larger than the device's free memory."""
    needed = {
        "the condition encoder": sizes.text_encoder + ENCODER_BYTES,
        "the network with two of its blocks": sizes.network + min(ROOMS, sizes.blocks) * sizes.block + working,
        "the VAE": sizes.vae + WORKING_BYTES,
    }
    part, most = max(needed.items(), key=lambda entry: entry[1])
    if most > free:
        raise UniPicError(
            f"{part} needs {gigabytes(most)} with its activations, {device} has {gigabytes(free)} free; close other "
            'programs on it, run the weights in ComfyUI, or pass device="cpu"'
        )


def _require_main_memory(sizes: PartSizes, total: int | None) -> None:
    needed = sum(sizes.parts.values())
    if total is not None and needed > total:
        raise UniPicError(
            f"the weights need {gigabytes(needed)} of main memory, this machine has {gigabytes(total)} with its swap; "
            'store the network in fp8 with storage="fp8", use torch.bfloat16, or a machine with more memory'
        )


def main_memory() -> int | None:
    """Total bytes of main memory and swap; None where the system does not say (outside Linux)."""
    try:
        memory = meminfo(MEMINFO)
        return memory["MemTotal"] + memory["SwapTotal"]
    except KeyError:
        return None
