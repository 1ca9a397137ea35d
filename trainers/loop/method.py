"""What a method brings to the training loop, and its batches in the order of their use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..config.methods import OptimizerConfig
from ..config.run import ConfigError
from ..roles.types import Named
from .export import Export
from .metrics import Metrics

MAIN = "student"
"""The part whose update makes a step; its metrics carry no prefix."""


@dataclass(frozen=True)
class Share:
    """Which part of every batch this process computes."""

    process: int = 0
    processes: int = 1

    def part(self, count: int) -> slice:
        """The samples of a batch of `count` that are this process's; ConfigError if it cannot be divided evenly."""
        if count % self.processes:
            raise ConfigError(
                f"batch_size {count} cannot be shared evenly by {self.processes} processes; "
                f"make it a multiple of {self.processes}"
            )
        size = count // self.processes
        return slice(self.process * size, (self.process + 1) * size)


class Batch(Protocol):
    """What a method computes a loss on. index: of its micro step; name: for messages."""

    index: int
    name: str

    def to(self, device: torch.device | str) -> Any: ...


class Method(Protocol):
    """What a training method brings to the loop. A part is what one optimizer trains: "student", "fake_score"."""

    loader_workers: int
    slots: int
    """The most updates that a step can have."""

    sharded: bool
    """Whether the networks are spread over the processes, which then all take part in previews and exports."""

    def place(self, device: torch.device, share: Share) -> None:
        """Move everything to the device; batches will be this process's share."""

    def updates(self, step: int) -> tuple[str, ...]:
        """The parts that a step updates, in order."""

    def trained(self, part: str) -> Named: ...

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        """(moving average, parameter) for all that has an EMA."""

    def optimizer(self, part: str) -> OptimizerConfig: ...

    def batch(self, index: int) -> Any:
        """The Batch of a micro step: a pure function of it, so that a resumed run sees what an unbroken one sees."""

    def loss(self, part: str, batch: Any) -> tuple[Tensor, Metrics]:
        """One loss per sample of this process's share, [B]."""

    def preview(self) -> Image.Image: ...

    def exports(self) -> list[Export]:
        """The files and folders that the run leaves, LoRAs first."""


class HoldsOut(Method, Protocol):
    """A method whose data have rows that no step trains on."""

    def validation_batches(self) -> Iterator[Any]:
        """This process's share of these rows, in batches that have `pieces`."""


class MicroSteps(Dataset):
    """The batches of steps start .. stop in the order of their use, so that a DataLoader can prepare them ahead."""

    def __init__(self, method: Method, start: int, stop: int, accumulation: int) -> None:
        self.batch = method.batch
        self.indices = [
            (step * method.slots + slot) * accumulation + i
            for step in range(start, stop)
            for slot in range(len(method.updates(step)))
            for i in range(accumulation)
        ]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:
        return self.batch(self.indices[i])
