"""Memory of this machine: free bytes of a device, and main memory as Linux counts it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

WORKING_BYTES = 4 * 2**30
"""Memory reserved for activations of network and VAE. A 1024x1024 output with six references in bfloat16 takes 0.7 GiB
in the network and 1.3 GiB in the VAE, counted by tensors; the rest is for workspaces of kernels and fragmentation."""

MEMINFO = Path("/proc/meminfo" if sys.platform == "linux" else os.devnull)

FreeMemory = Callable[[torch.device], int | None]
"""device -> bytes that may still be allocated on it; None where the system does not say."""


def meminfo(path: Path = MEMINFO) -> dict[str, int]:
    """Read Linux's /proc/meminfo to bytes; empty where it cannot be read."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        pairs = (line.split(":", 1) for line in lines if ":" in line)
        return {name: int(value.split()[0]) * 1024 for name, value in pairs}
    except (OSError, ValueError, IndexError):
        return {}


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device, with those that PyTorch's allocator holds unused; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return meminfo().get("MemAvailable") if device.type == "cpu" else None


def beside_activations(free: int) -> int:
    """Bytes of the free ones that a cache may take: all but WORKING_BYTES for activations, or half of them."""
    return max(free - WORKING_BYTES, free // 2)


def fits(size: int, free: int | None) -> bool:
    """True if `size` bytes leave room for activations."""
    return free is None or size <= beside_activations(free)


def gigabytes(size: int) -> str:
    """Bytes as text, such as "3.2 GB"."""
    return f"{size / 1e9:.1f} GB"
