"""Several processes: gradients added up, or (FSDP2) parameters, gradients and optimizers spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from unipic_core.model.mmdit import MMDiT

from ..config.parse import ConfigError


def shard(network: MMDiT, device: torch.device) -> None:
    """Spread a network over all processes, block by block (torch's fully_shard).

    Gradients are added, not averaged: losses are already divided by the size of the whole batch. ConfigError in a run
    of one process.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError(
            "network.shard spreads networks over several processes, and this run has one; start it with accelerate "
            "launch, or set shard: false"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*network.transformer_blocks, network):
        sharded: Any = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # plain sums are what gloo has, and all that is wanted


def is_sharded(x: Tensor) -> bool:
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This process's share, without a copy."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """The full tensor; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def locally(tree: object) -> Any:
    """Nested dicts and lists with the shares of their tensors."""
    if isinstance(tree, dict):
        return {k: locally(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(locally(v) for v in tree)
    return local(tree) if isinstance(tree, Tensor) else tree


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add the gradients of all processes; fully_shard has done so for what it spreads."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for p in parameters:
            if p.grad is not None and not is_sharded(p):
                torch.distributed.all_reduce(p.grad)
