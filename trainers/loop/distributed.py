"""Checkpoints of sharded networks by torch.distributed.checkpoint (DCP): any number of processes reads any other's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..roles.sharding import several_processes

SHARDS, SETTINGS = "shards", "settings.pt"


@contextmanager
def readable_errors() -> Iterator[None]:
    """DCP's exceptions, which are no `Exception`, as RuntimeError; without its warning of one process alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()), (error,))[0]
        raise RuntimeError(str(first)) from error


def is_distributed(folder: Path) -> bool:
    """True for a checkpoint of this form."""
    return (folder / SHARDS).is_dir()


def save_distributed(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], process: int) -> None:
    """Write each process's shares, and what is no tensor once; every process must call this."""
    with readable_errors():
        save(dict(tensors), checkpoint_id=str(folder / SHARDS), no_dist=not several_processes())
    if not process:
        torch.save(settings, folder / SETTINGS)


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Size]]:
    """(what is no tensor, name -> size of every tensor)."""
    settings = torch.load(folder / SETTINGS, map_location="cpu", weights_only=True)
    stored = FileSystemReader(folder / SHARDS).read_metadata().state_dict_metadata
    return settings, {name: torch.Size(getattr(entry, "size", ())) for name, entry in stored.items()}


def load_distributed(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill these tensors, whole or distributed; every process must call this."""
    with readable_errors():
        load(tensors, checkpoint_id=str(folder / SHARDS), no_dist=not several_processes())
