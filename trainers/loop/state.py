"""What a checkpoint keeps: trained tensors, their moving averages, optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..roles.sharding import is_sharded, local, locally


class Trained(Protocol):
    """A part of the loop."""

    name: str
    parameters: list[torch.nn.Parameter]
    optimizers: list[Optimizer]
    schedulers: list[LambdaLR]


class State:
    """Saved by the main process, or by every process its own share where parameters are spread over them.

    updates: of the main part so far, by which its moving average warms up.
    """

    def __init__(self, parts: Iterable[Trained], averages: Sequence[Tensor]) -> None:
        self.parts, self.averages = list(parts), list(averages)
        self.updates = 0
        self.sharded = any(is_sharded(p) for part in self.parts for p in part.parameters)

    def file(self, folder: Path, process: int) -> Path:
        return folder / f"state-{process if self.sharded else 0:05d}.pt"

    @torch.no_grad()
    def save(self, folder: Path, process: int) -> None:
        if process and not self.sharded:
            return
        torch.save(self.tensors(), self.file(folder, process))

    def tensors(self) -> dict[str, Any]:
        """All that is saved: this process's share."""
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
        """Bytes that this process saves."""
        return bytes_in(self.tensors())

    def load(self, folder: Path, process: int) -> None:
        """Read what `save` wrote; the run must have as many processes as then if its parameters are spread."""
        self.restore(self.read(folder, process))

    def read(self, folder: Path, process: int) -> dict[str, Any]:
        """The stored tensors, on the CPU; raises many kinds of errors for a damaged file."""
        stored = torch.load(self.file(folder, process), map_location="cpu", weights_only=True)
        return {"parts": stored["parts"], "averages": stored["averages"], "updates": stored["updates"]}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Put what `read` gave into the parts of this run."""
        self.updates = state["updates"]
        for own, kept in zip(self.averages, state["averages"], strict=True):
            local(own).copy_(kept)
        for part in self.parts:
            found = state["parts"][part.name]
            for p, kept in zip(part.parameters, found["parameters"], strict=True):
                local(p.detach()).copy_(kept)
            for optimizer, kept in zip(part.optimizers, found["optimizers"], strict=True):
                load_optimizer(optimizer, kept)
            for scheduler, kept in zip(part.schedulers, found["schedulers"], strict=True):
                load_scheduler(scheduler, kept)


def bytes_in(tree: Any) -> int:
    """Of all tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(map(bytes_in, values))


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """What the optimizer remembers of each parameter, each share put back where its parameter lies.

    Rates, decays and the like stay this run's own: they may have been changed, and allowed to.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in state["param_groups"] for i in group["params"]]
    places = dict(zip(order, parameters, strict=True))
    back = {i: {k: put_back(places[i], v) for k, v in values.items()} for i, values in state["state"].items()}
    groups = optimizer.state_dict()["param_groups"]
    own = [{**group, "params": kept["params"]} for group, kept in zip(groups, state["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": back, "param_groups": own})


def load_scheduler(scheduler: LambdaLR, state: dict[str, Any]) -> None:
    """Go to the update at which the schedule stood, with this run's own rates."""
    factors = [factor(state["last_epoch"]) for factor in scheduler.lr_lambdas]
    rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    scheduler.load_state_dict({**state, "base_lrs": scheduler.base_lrs, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def put_back(parameter: Tensor, value: object) -> Any:
    """A share of a tensor like the parameter becomes one; everything else stays."""
    if not (isinstance(value, Tensor) and is_sharded(parameter)) or value.shape != local(parameter.detach()).shape:
        return value
    whole = torch.zeros_like(parameter)
    local(whole).copy_(value)
    return whole
