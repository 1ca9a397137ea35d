"""Several processes: summed gradients, or parameters, gradients and optimizer states sharded over them (FSDP2)."""

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
    """Shard a network over all processes, block by block (torch's fully_shard).

    Gradients are summed, not averaged: losses are already divided by the size of the whole batch. Raises ConfigError
    in a run of one process.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError(
            "network.shard: expected a run of several processes, got one; start it with accelerate launch, or set "
            "shard: false"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*network.transformer_blocks, network):
        sharded: Any = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has plain sums only


def is_sharded(x: Tensor) -> bool:
    """True for a shard of a distributed tensor."""
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This process's shard, without a copy."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """The full tensor; collective, so every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def locally(tree: object) -> Any:
    """Replace the tensors in nested dicts and lists by this process's shards."""
    if isinstance(tree, dict):
        return {k: locally(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(locally(v) for v in tree)
    return local(tree) if isinstance(tree, Tensor) else tree


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes; fully_shard does so itself for sharded parameters."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for p in parameters:
            if p.grad is not None and not is_sharded(p):
                torch.distributed.all_reduce(p.grad)
