"""Several processes: summed gradients, or parameters, gradients and optimizer states sharded over them (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unipic_core.model.mmdit import MMDiT


def several_processes() -> bool:
    """True in a run that accelerate launch or torchrun started, of one process or more."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def shard(network: MMDiT, device: torch.device, tensor_of: Callable[[str], Tensor]) -> None:
    """Shard a network on the meta device over all processes, block by block (torch's fully_shard), and fill it.

    tensor_of: parameter name -> whole tensor in its final dtype. Only the main process calls it, for one parameter
    after the other, and sends the others their shares: no process ever holds a whole network. In a run without
    processes nothing is spread. Gradients are summed, not averaged: losses are already divided by the size of the whole
    batch.
    """
    if several_processes():
        split(network, device)
    network.to_empty(device=device)
    for name, p in network.named_parameters():
        fill_share(p.detach(), partial(tensor_of, name))


@torch.no_grad()
def fill_share(p: Tensor, read: Callable[[], Tensor]) -> None:
    """Fill a parameter from the whole tensor that `read` gives in the main process; every process must ask."""
    if not isinstance(p, DTensor):
        p.copy_(read())
        return
    main = torch.distributed.get_rank() == 0
    tensor = read().to(p.device) if main else torch.empty(p.shape, dtype=p.dtype, device=p.device)
    p.to_local().copy_(distribute_tensor(tensor.to(p.dtype), p.device_mesh, p.placements).to_local())


def split(network: MMDiT, device: torch.device) -> None:
    """Shard the parameters of a network; their memory comes later."""
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
