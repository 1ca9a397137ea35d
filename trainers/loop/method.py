"""Interface between a training method and the loop, and the order of a run's batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..config.methods import OptimizerConfig
from ..config.run import ConfigError
from ..roles.types import NamedParameters
from .export import Export
from .metrics import Metrics

MAIN = "student"
"""Main part: its updates count for the EMA, and its metrics have no prefix."""


@dataclass(frozen=True)
class Share:
    """Share of every batch that this process computes."""

    process: int = 0
    processes: int = 1

    def part(self, count: int) -> slice:
        """Samples of this process in a batch of `count`. Raises ConfigError if it cannot be divided evenly."""
        if count % self.processes:
            raise ConfigError(
                f"batch_size: expected a multiple of {self.processes}, the number of processes, got {count}"
            )
        size = count // self.processes
        return slice(self.process * size, (self.process + 1) * size)


class MicroBatch(Protocol):
    """Input of a method's loss: samples that are computed at once.

    index: of its micro step; name: for messages; counts: False for a filler that only keeps processes in step.
    """

    @property
    def index(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def counts(self) -> bool: ...

    def to(self, device: torch.device | str) -> Any: ...


B = TypeVar("B", bound=MicroBatch)


@dataclass(frozen=True)
class Batch(Generic[B]):
    """Samples of one micro step that a process computes, as micro-batches one after another. name: for messages."""

    micro_batches: tuple[B, ...]
    index: int
    name: str

    @classmethod
    def of_one(cls, micro_batch: B) -> Batch[B]:
        """The batch that is a single micro-batch."""
        return cls((micro_batch,), micro_batch.index, micro_batch.name)

    def to(self, device: torch.device | str) -> Batch[B]:
        return replace(self, micro_batches=tuple(one.to(device) for one in self.micro_batches))


class Method(Protocol):
    """Training method as the loop sees it. A part is one set of trained parameters: "student" or "fake_score".

    Methods are its subclasses, which inherit the defaults.
    """

    loader_workers: int = 0
    prefetch: int = 0
    """Batches that a thread reads ahead; 0: none."""

    slots: int = 1
    """Largest number of updates in a step."""

    sharded: bool = False
    """True for networks sharded over the processes, which then all take part in previews."""

    shards_trained: bool = False
    """True if the trained parameters are among them: all processes take part in exports and checkpoints."""

    @property
    def data_contents(self) -> str:
        """Digest of the rows that a resumed run must train on; "" for drawn data."""
        return ""

    @property
    def adapter_writer(self) -> Callable[[Path], None] | None:
        """Function that writes the student's LoRA into a folder; None for methods that train none."""
        return None

    def data_report(self) -> Mapping[str, float]:
        """Counts for RUN/data.json; empty for drawn data."""
        return {}

    def place(self, device: torch.device, share: Share) -> None:
        """Move networks to the device and set this process's share of batches."""

    def close(self) -> None:
        """End what prepares batches; none is asked for any more."""
        return None

    def updates(self, step: int) -> tuple[str, ...]:
        """Parts updated in a step, in order."""

    def trained(self, part: str) -> NamedParameters: ...

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        """(moving average, parameter) of everything with an EMA."""

    def optimizer(self, part: str) -> OptimizerConfig: ...

    def batch(self, index: int) -> Batch[Any]:
        """Batch of a micro step, a pure function of its index: resumed and uninterrupted runs see the same batches."""

    def loss(self, part: str, batch: Any) -> tuple[Tensor, Metrics]:
        """Loss per sample of this process's share, [B], and metrics."""

    def preview(self) -> Image.Image: ...

    def exports(self) -> list[Export]:
        """Files and folders to export, LoRAs first."""


class HoldsOut(Method, Protocol):
    """Method with held-out rows."""

    def without(self, batch: Any, rows: Sequence[int]) -> Any:
        """The micro-batch without these rows; a filler if none is left."""

    def validation_batches(self) -> Iterator[Batch[Any]]:
        """This process's share of the held-out rows."""


class MicroSteps(Dataset):
    """Batches of steps start .. stop - 1 in order of use, for a DataLoader to prepare ahead."""

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

    def __getitem__(self, i: int) -> Batch[Any]:
        return self.batch(self.indices[i])
