"""Parts of a method that are updated together, and the moving average of their parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..config.methods import OptimizerConfig
from ..config.run import RunConfig
from ..optimizers.by_name import learning_rate, lr_factor, make_optimizers
from ..roles.sharding import sum_gradients, whole
from ..roles.types import NamedParameters
from .method import MAIN, Method
from .metrics import Metrics


class Part:
    """Parameters that are updated together, with their optimizers and schedulers."""

    def __init__(self, name: str, parameters: NamedParameters, config: OptimizerConfig, updates: int) -> None:
        self.name, self.config = name, config
        self.parameters = [p for _, p in parameters]
        self.optimizers: list[Optimizer] = make_optimizers(parameters, config)
        factor = lr_factor(config, updates)
        self.schedulers = [LambdaLR(optimizer, factor) for optimizer in self.optimizers]
        self.prefix = "" if name == MAIN else f"{name}/"

    def update(self) -> Metrics:
        """Step the optimizers; returns gradient norm and learning rate. FloatingPointError: the norm is not finite."""
        sum_gradients(self.parameters)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(f"the gradients of {self.name} became {float(norm)}")
        lr = learning_rate(self.optimizers[0])
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return {f"{self.prefix}grad_norm": float(norm), f"{self.prefix}lr": lr}


def make_parts(config: RunConfig, method: Method) -> dict[str, Part]:
    """Create the parts by name, each with a learning rate schedule over its number of updates."""
    counts: dict[str, int] = defaultdict(int)
    for step in range(config.steps):
        for name in method.updates(step):
            counts[name] += 1
    return {name: Part(name, method.trained(name), method.optimizer(name), n) for name, n in counts.items()}


def update_average(averaged: Sequence[tuple[Tensor, Tensor]], decay: float, n: int) -> None:
    """Update the EMA; its decay grows as (1 + n) / (10 + n) up to `decay`, so short runs forget their start."""
    if averaged:
        averages, parameters = zip(*averaged, strict=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(averages), [p.detach() for p in parameters], 1 - min(decay, (1 + n) / (10 + n)))
