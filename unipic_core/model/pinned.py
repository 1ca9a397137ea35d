"""Pinned main memory, within a bound."""

from __future__ import annotations

import os

import torch
from torch import Tensor

PINNED_SHARE = 0.5
"""Largest share of main memory that is pinned: pinned pages cannot be moved out, not even for other programs."""


def pinned(x: Tensor) -> Tensor:
    """Copy to pinned memory, from which a GPU copies at full speed; the tensor itself where that has no room."""
    allocated = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    if x.is_pinned() or allocated + x.nbytes > PINNED_SHARE * _main_memory():
        return x
    try:
        return x.pin_memory()
    except RuntimeError:  # a limit of the system
        return x


def _main_memory() -> int:
    """Bytes of main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # outside Unix
        return 16 * 2**30
