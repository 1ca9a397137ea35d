"""Checkpoint contents: trained parameters, their moving averages, optimizer and scheduler states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..roles.sharding import is_sharded, local, locally


class TrainedPart(Protocol):
    """Part of the loop (loop.Part), as far as checkpoints need it."""

    name: str
    parameters: list[torch.nn.Parameter]
    optimizers: list[Optimizer]
    schedulers: list[LambdaLR]


class State:
    """State of a run: written by the main process, or with sharded parameters by every process.

    updates: number of updates of the main part, which sets the decay of its moving average.
    """

    def __init__(self, parts: Iterable[TrainedPart], averages: Sequence[Tensor], data: str = "") -> None:
        self.data = data
        self.parts, self.averages = list(parts), list(averages)
        self.updates = 0
        self.sharded = any(is_sharded(p) for part in self.parts for p in part.parameters)

    def file(self, folder: Path, process: int) -> Path:
        return folder / f"state-{process if self.sharded else 0:05d}.pt"

    @torch.no_grad()
    def save(self, folder: Path, process: int) -> None:
        """Write this process's state file, if it has one."""
        if process and not self.sharded:
            return
        torch.save(self.tensors(), self.file(folder, process))

    def tensors(self) -> dict[str, Any]:
        """Contents of this process's state file."""
        parts = {
            part.name: {
                "parameters": [local(p.detach()) for p in part.parameters],
                "optimizers": [locally(o.state_dict()) for o in part.optimizers],
                "schedulers": [s.state_dict() for s in part.schedulers],
            }
            for part in self.parts
        }
        averages = [local(average) for average in self.averages]
        return {"parts": parts, "averages": averages, "updates": self.updates}

    @property
    def nbytes(self) -> int:
        """Size of this process's state file."""
        return bytes_in(self.tensors())

    def load(self, folder: Path, process: int) -> None:
        """Read and restore; with sharded parameters the number of processes must be that of `save`."""
        self.restore(self.read(folder, process))

    def read(self, folder: Path, process: int) -> dict[str, Any]:
        """Read the state file to the CPU; raises errors of many types for a damaged file."""
        stored = torch.load(self.file(folder, process), map_location="cpu", weights_only=True)
        return {"parts": stored["parts"], "averages": stored["averages"], "updates": stored["updates"]}

    @torch.no_grad()
    def restore_weights(self, state: dict[str, Any]) -> None:
        """Copy weights and averages of the result of `read` into this run."""
        self.updates = state["updates"]
        for average, stored in zip(self.averages, state["averages"], strict=True):
            local(average).copy_(stored)
        for part in self.parts:
            for p, stored in zip(part.parameters, state["parts"][part.name]["parameters"], strict=True):
                local(p.detach()).copy_(stored)

    def restore(self, state: dict[str, Any]) -> None:
        """Copy the result of `read` into the parts of this run."""
        self.restore_weights(state)
        for part in self.parts:
            stored_part = state["parts"][part.name]
            for optimizer, stored in zip(part.optimizers, stored_part["optimizers"], strict=True):
                load_optimizer(optimizer, stored)
            for scheduler, stored in zip(part.schedulers, stored_part["schedulers"], strict=True):
                load_scheduler(scheduler, stored)


def bytes_in(tree: object) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(map(bytes_in, values))


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's state of each parameter; shards become distributed tensors like their parameters.

    Learning rate, weight decay and other options stay those of this run, which may differ (--allow-config-change).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in state["param_groups"] for i in group["params"]]
    by_index = dict(zip(order, parameters, strict=True))
    restored = {
        i: {k: like_parameter(by_index[i], v) for k, v in values.items()} for i, values in state["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]
    options = [{**group, "params": old["params"]} for group, old in zip(groups, state["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": restored, "param_groups": options})


def load_scheduler(scheduler: LambdaLR, state: dict[str, Any]) -> None:
    """Continue the schedule at the stored update, with this run's learning rates."""
    factors = [factor(state["last_epoch"]) for factor in scheduler.lr_lambdas]
    rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    scheduler.load_state_dict({**state, "base_lrs": scheduler.base_lrs, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def like_parameter(parameter: Tensor, value: object) -> Any:
    """Turn a shard of the parameter's shape into a distributed tensor; other values stay."""
    if not (isinstance(value, Tensor) and is_sharded(parameter)) or value.shape != local(parameter.detach()).shape:
        return value
    distributed = torch.zeros_like(parameter)
    local(distributed).copy_(value)
    return distributed
