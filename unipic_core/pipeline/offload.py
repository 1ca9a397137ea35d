"""Placement of the parts on the device, all of them or one at a time; checks of the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UniPicError
from ..model.attention import attention_named
from ..model.compile import check_compiler


def checked_device(device: torch.device | str) -> torch.device:
    """Return the device; raise UniPicError if this machine does not have it."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UniPicError(f"there is no device {str(device)!r}; use 'cuda', 'cuda:1' or 'cpu'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UniPicError('no CUDA GPU is usable on this machine; pass device="cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UniPicError(f"there is no {device}; this machine has {torch.cuda.device_count()} CUDA GPUs")
    try:
        usable = not torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise UniPicError(f"this machine has no device {str(device)!r} to compute on; use 'cuda' or 'cpu'")
    return device


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Dtype to compute in: float32 on a CPU, else bfloat16. Raises UniPicError like `checked_device`."""
    return torch.float32 if checked_device(device).type == "cpu" else torch.bfloat16


def check_machine(device: torch.device | str, attention: str, compile: bool) -> None:
    """Raise UniPicError if this machine lacks the device, the attention's package, or a compiler for torch.compile."""
    place = checked_device(device)
    attention_named(attention)
    if compile:
        check_compiler(place)


class Placement:
    """Moves parts with a method .to(device). offload: only the part in use is on the device, the others on the CPU."""

    def __init__(self, device: torch.device, offload: bool) -> None:
        self.device = device
        self.offload = offload

    def place(self, parts: Mapping[str, Any], name: str) -> Any:
        """Move the named part to the device and return it."""
        if self.offload:
            for other, part in parts.items():
                if other != name:
                    part.to("cpu")
            empty_cache(self.device)
        parts[name].to(self.device)
        return parts[name]


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def readable_out_of_memory(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors, on a GPU or on the CPU, into a UniPicError with this advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UniPicError(f"out of memory; {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise UniPicError(f"out of memory; {advice}") from error
