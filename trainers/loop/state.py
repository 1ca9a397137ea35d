"""Checkpoint contents: trained parameters, their moving averages, optimizer and scheduler states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..optimizers.by_name import PROGRESS
from ..roles.sharding import is_sharded, local, locally
from .distributed import is_distributed, load_distributed, read_settings, save_distributed


class TrainedPart(Protocol):
    """Part of the loop (loop.Part), as far as checkpoints need it."""

    name: str
    parameters: list[torch.nn.Parameter]
    optimizers: list[Optimizer]
    schedulers: list[LambdaLR]


class State:
    """State of a run: one file by the main process, or, where networks are sharded, a distributed checkpoint (DCP).

    updates: number of updates of the main part, which sets the decay of its moving average. data: digest of the rows.
    sharded: networks may be spread over processes; any number of them reads what any number wrote.
    """

    def __init__(
        self, parts: Iterable[TrainedPart], averages: Sequence[Tensor], data: str = "", sharded: bool = False
    ) -> None:
        self.data = data
        self.parts, self.averages = list(parts), list(averages)
        self.updates = 0
        self.sharded = sharded

    def file(self, folder: Path, process: int) -> Path:
        return folder / f"state-{process if self.sharded else 0:05d}.pt"

    @torch.no_grad()
    def save(self, folder: Path, process: int) -> None:
        """Write this process's state file, if it has one."""
        if self.sharded:
            save_distributed(folder, self.named_tensors(), self.settings(), process)
        elif not process:
            torch.save(self.tensors(), self.file(folder, process))

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors, whole or distributed, under names that no number of processes changes."""
        named = {f"averages/{i}": average for i, average in enumerate(self.averages)}
        for part in self.parts:
            named |= {f"{part.name}/parameters/{i}": p.detach() for i, p in enumerate(part.parameters)}
            for k, optimizer in enumerate(part.optimizers):
                for i, values in optimizer.state_dict()["state"].items():
                    tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
                    named |= {f"{part.name}/optimizers/{k}/{i}/{name}": v for name, v in tensors.items()}
        return named

    def settings(self) -> dict[str, Any]:
        """What is no tensor."""
        parts = {
            part.name: {
                "groups": [o.state_dict()["param_groups"] for o in part.optimizers],
                "schedulers": [s.state_dict() for s in part.schedulers],
            }
            for part in self.parts
        }
        return {"parts": parts, "updates": self.updates}

    def read_distributed(self, folder: Path) -> dict[str, Any]:
        """This process's shares, in the form of `tensors`."""
        settings, sizes = read_settings(folder)
        wanted = {name: self._room(name, size) for name, size in sizes.items()}
        load_distributed(folder, wanted)
        parts: dict[str, Any] = {}
        for part in self.parts:
            stored = settings["parts"][part.name]
            optimizers = [{"state": {}, "param_groups": groups} for groups in stored["groups"]]
            prefix = f"{part.name}/optimizers/"
            for name in (name for name in wanted if name.startswith(prefix)):
                k, i, key = name.removeprefix(prefix).split("/", 2)
                optimizers[int(k)]["state"].setdefault(int(i), {})[key] = local(wanted[name])
            parameters = [local(wanted[f"{part.name}/parameters/{i}"]) for i in range(len(part.parameters))]
            parts[part.name] = {"parameters": parameters, "optimizers": optimizers, "schedulers": stored["schedulers"]}
        averages = [local(wanted[f"averages/{i}"]) for i in range(len(self.averages))]
        return {"parts": parts, "averages": averages, "updates": settings["updates"]}

    def _room(self, name: str, size: torch.Size) -> Tensor:
        """An empty tensor to load into, distributed as what it belongs to."""
        for part in self.parts:
            if name.startswith(f"{part.name}/"):
                kind, *rest = name.removeprefix(f"{part.name}/").split("/")
                members = part.parameters if kind == "parameters" else parameters_of(part.optimizers[int(rest[0])])
                owner = members[int(rest[0 if kind == "parameters" else 1])]
                return torch.zeros_like(owner.detach()) if owner.shape == size else torch.zeros(size)
        return torch.zeros_like(self.averages[int(name.removeprefix("averages/"))])

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
        """Read and restore; checkpoints of sharded networks by earlier versions need as many processes as then."""
        self.restore(self.read(folder, process))

    def read(self, folder: Path, process: int) -> dict[str, Any]:
        """Read the state file to the CPU; raises errors of many types for a damaged file."""
        if self.sharded and is_distributed(folder):
            return self.read_distributed(folder)
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


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """In the order of the numbers in its state."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def bytes_in(tree: object) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(map(bytes_in, values))


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's state of each parameter; shards become distributed tensors like their parameters.

    Learning rate, weight decay and other options stay those of this run, which may differ (--allow-config-change);
    only what optimizers keep of their state among them is restored (PROGRESS).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in state["param_groups"] for i in group["params"]]
    by_index = dict(zip(order, parameters, strict=True))
    restored = {
        i: {k: like_parameter(by_index[i], v) for k, v in values.items()} for i, values in state["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]
    options = [
        {**group, **{k: v for k, v in old.items() if k in PROGRESS}, "params": old["params"]}
        for group, old in zip(groups, state["param_groups"], strict=True)
    ]
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
