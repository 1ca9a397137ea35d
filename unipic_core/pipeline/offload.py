"""Where the parts lie: all on the device, or one at a time when its memory is short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UniPicError
from ..model.attention import attention_named
from ..model.compile import check_compiler


def checked_device(device: torch.device | str) -> torch.device:
    """The device, or UniPicError if this machine has none of its kind."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UniPicError(f"there is no device {str(device)!r}; use 'cuda', 'cuda:1' or 'cpu'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UniPicError('no CUDA GPU can be used here; pass device="cpu"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UniPicError(f"there is no {device}; this machine has {torch.cuda.device_count()} CUDA GPUs")
    try:
        usable = not torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise UniPicError(f"this machine has no device {str(device)!r} to compute on; use 'cuda' or 'cpu'")
    return device


def check_machine(device: torch.device | str, attention: str, compile: bool) -> None:
    """UniPicError if this machine lacks the device, the attention's package, or what torch.compile needs."""
    place = checked_device(device)
    attention_named(attention)
    if compile:
        check_compiler(place)


class Placement:
    """Parts with a method .to(device). Offloading: only the part in use is on the device, the others on the CPU."""

    def __init__(self, device: torch.device, offload: bool) -> None:
        self.device = device
        self.offload = offload

    def place(self, parts: Mapping[str, Any], name: str) -> Any:
        """The named part, on the device."""
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
    """Turns running out of memory, on a GPU or on the CPU, into a UniPicError that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UniPicError(f"out of memory; {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise UniPicError(f"out of memory; {advice}") from error
