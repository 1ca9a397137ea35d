"""Where the parts of a pipeline lie, decided from the files' headers and the free memory before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UniPicError

WORKING_BYTES = 4 * 2**30
"""Kept free for activations of network and VAE. A 1024x1024 output with six references in bfloat16 takes 0.7 GiB in the
network and 1.3 GiB in the VAE, counted tensor by tensor; kernels have workspaces, and the allocator leaves holes."""

ENCODER_BYTES = 2 * 2**30
"""Kept free for activations of the condition encoder."""

MemoryInfo = Callable[[torch.device], tuple[int, int]]
"""device -> (free, total) bytes, as torch.cuda.mem_get_info."""

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class PartSizes:
    """Bytes that each part takes once loaded.

    network: all of the network but its blocks' matrices. block: the matrices of one of its `blocks`. restored: room for
    the largest matrix where matrices are restored for each product. kv_cache: what a run keeps.
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
    """turns: one part at a time is on the device, the others wait in the main memory. left_behind: the matrices of so
    many of the network's last blocks stay in the main memory, from where each product copies its own."""

    turns: bool = False
    left_behind: int = 0

    def note(self, blocks: int) -> str:
        """What to tell of it, for a network of so many blocks; empty where everything is on the device."""
        if not self.turns:
            return ""
        note = "the GPU cannot hold all parts, so they take turns on it"
        if not self.left_behind:
            return note
        return (
            f"{note}, and {self.left_behind} of the network's {blocks} blocks are copied to it in every step; "
            "--storage fp8 halves what is copied"
        )


def plan_memory(
    device: torch.device,
    sizes: PartSizes,
    memory: MemoryInfo | None = None,
    main: Callable[[], int | None] | None = None,
) -> MemoryPlan:
    """Everything on the device; else one part at a time; else with some of the network's blocks left behind.

    memory: of the device, only asked of CUDA. main: bytes of the main memory and its swap, None where nobody knows.
    UniPicError in one sentence where the parts fit nowhere.
    """
    if device.type != "cuda":
        _require_main_memory(sizes, (main or main_memory)())
        return MemoryPlan()
    free, _ = (memory or torch.cuda.mem_get_info)(device)
    held = sum(sizes.parts.values()) + sizes.kv_cache
    if held + sizes.restored + WORKING_BYTES <= free:
        return MemoryPlan()
    working = sizes.kv_cache + sizes.restored + WORKING_BYTES
    _require_device_memory(device, sizes, working, free)
    _require_main_memory(sizes, (main or main_memory)())
    missing = sizes.parts["network"] + working - free
    return MemoryPlan(turns=True, left_behind=max(math.ceil(missing / sizes.block), 0) if sizes.block else 0)


def _require_device_memory(device: torch.device, sizes: PartSizes, working: int, free: int) -> None:
    """UniPicError naming the part that the device cannot hold alone with what it works in."""
    needed = {
        "the condition encoder": sizes.text_encoder + ENCODER_BYTES,
        "the network without its blocks": sizes.network + working,
        "the VAE": sizes.vae + WORKING_BYTES,
    }
    part, most = max(needed.items(), key=lambda entry: entry[1])
    if most > free:
        raise UniPicError(
            f"{device} has {_size(free)} free, and {part} takes {_size(most)} with what it works in, even one part at "
            'a time; close other programs on it, run the weights in ComfyUI, or pass device="cpu"'
        )


def _require_main_memory(sizes: PartSizes, total: int | None) -> None:
    needed = sum(sizes.parts.values())
    if total is not None and needed > total:
        raise UniPicError(
            f"the weights take {_size(needed)} of main memory and this machine has {_size(total)} with its swap; hold "
            'the network in fp8 with storage="fp8", use torch.bfloat16, or a machine with more memory'
        )


def main_memory() -> int | None:
    """Bytes of main memory and swap in all; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        return sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
