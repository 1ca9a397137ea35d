"""Lock of a run's folder: of two runs in one folder each would remove the other's checkpoints as leftovers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from unipic_core.replacing import lock

from .checkpointing import TrainingError


@contextmanager
def alone_in(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises TrainingError, in every process, while another run has it.

    Not seen: runs on other machines where a shared disk has no locks across machines, and runs on Windows.
    """
    descriptor, taken = None, False
    if accelerator.is_main_process:
        try:
            descriptor = lock(output.resolve())
        except BlockingIOError:
            taken = True
    try:
        if float(accelerator.reduce(torch.tensor(float(taken), device=accelerator.device), "sum")):
            raise TrainingError(f"another run is training in {output}; wait for its end, or choose another output")
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
