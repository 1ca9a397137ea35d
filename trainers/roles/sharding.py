"""Several processes: summed gradients, or parameters, gradients and optimizer states sharded over them (FSDP2).

A sharded network is spread over all processes, or over groups of them (one machine, say) that each hold a whole copy
(hybrid sharding). Each block is gathered where it computes: trained networks in float32 or bfloat16, a frozen base in
its storage dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unipic_core.model.mmdit import MMDiT

from ..config.parse import ConfigError


@dataclass(frozen=True)
class Sharding:
    """How networks are sharded. over: number of processes that share one copy, 0: all of them.

    gather: dtype in which the weights of trained networks are sent to where they compute; None: as they are stored,
    float32. Shards, reductions of gradients and optimizer states stay float32.
    """

    over: int = 0
    gather: torch.dtype | None = None


class GatheredLinear(nn.Linear):
    """Linear layer whose weight may be gathered in another dtype than that of its input, in which it computes."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class GatheredRMSNorm(nn.RMSNorm):
    """RMSNorm with a float32 weight, in whatever dtype it is gathered."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, None if self.weight is None else self.weight.float(), self.eps)


class GatheredOperations:
    """Layer classes of an `MMDiT` whose weights are gathered in another dtype than float32."""

    Linear: ClassVar[type] = GatheredLinear
    LayerNorm: ClassVar[type] = nn.LayerNorm
    RMSNorm: ClassVar[type] = GatheredRMSNorm
    Embedding: ClassVar[type] = nn.Embedding


def several_processes() -> bool:
    """True in a run that accelerate launch or torchrun started, of one process or more."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def shard(network: MMDiT, device: torch.device, sharding: Sharding, tensor_of: Callable[[str], Tensor]) -> None:
    """Shard a network on the meta device over processes, block by block (torch's fully_shard), and fill it.

    tensor_of: parameter name -> whole tensor in its final dtype. Only the main process calls it, for one parameter
    after the other, and sends the others their shares: no process ever holds a whole network. In a run without
    processes nothing is spread. Gradients are summed, not averaged: losses are already divided by the size of the whole
    batch.
    """
    if several_processes():
        split(network, mesh_of(device, sharding.over), sharding.gather)
    network.to_empty(device=device)
    for name, p in network.named_parameters():
        fill_share(p.detach(), partial(tensor_of, name))


def is_main_process() -> bool:
    """True in the main process, and in a run without processes."""
    return not several_processes() or torch.distributed.get_rank() == 0


@torch.no_grad()
def fill_share(p: Tensor, read: Callable[[], Tensor]) -> None:
    """Fill a parameter from the whole tensor that `read` gives in the main process; every process must ask."""
    if not several_processes():
        p.copy_(read())
        return
    tensor = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    if is_main_process():
        tensor.copy_(read())
    if isinstance(p, DTensor):
        shares = distribute_tensor(sendable(tensor), p.device_mesh, p.placements)
        sendable(p.to_local()).copy_(shares.to_local())
    else:
        torch.distributed.broadcast(sendable(tensor), 0)
        p.copy_(tensor)


def sendable(x: Tensor) -> Tensor:
    """The tensor as bytes if it is in fp8, which not every backend sends."""
    return x.view(torch.uint8) if x.is_floating_point() and x.itemsize == 1 else x


def mesh_of(device: torch.device, over: int) -> DeviceMesh:
    """Mesh of all processes: [processes], or [copies, processes of one copy]. Processes of a machine are neighbours.

    Raises ConfigError, in every process, if their number is no multiple of `over`.
    """
    processes = torch.distributed.get_world_size()
    if processes % (over or processes):
        raise ConfigError(
            f"network.shard_over: expected a divisor of the number of processes, {processes}, got {over}; change it, "
            "or start another number of processes"
        )
    if over in (0, processes):
        return init_device_mesh(device.type, (processes,))
    return init_device_mesh(device.type, (processes // over, over), mesh_dim_names=("copies", "shards"))


def split(
    network: MMDiT, mesh: DeviceMesh, gather: torch.dtype | None = None, whole: Sequence[nn.Parameter] = ()
) -> None:
    """Shard the parameters of a network but those in `whole`; their memory comes later.

    Inputs are not cast: times and the steps of a finite difference would be rounded.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=gather, reduce_dtype=torch.float32 if gather else None, cast_forward_inputs=False
    )
    # torch warns once per process and class that outputs must not be changed in place; none is
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in (*network.transformer_blocks, network):
        sharded: Any = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
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


BUCKET = 2**24
"""Numbers that are summed over the processes in one call. LoRAs have thousands of small gradients, each of which would
wait for the network's latency."""


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes; fully_shard does so itself for sharded parameters."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    bucket: list[Tensor] = []
    for p in parameters:
        if p.grad is None or is_sharded(p):
            continue
        if bucket and (p.grad.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + p.grad.numel() > BUCKET):
            _sum_together(bucket)
            bucket = []
        bucket.append(p.grad)
    _sum_together(bucket)


def _sum_together(gradients: Sequence[Tensor]) -> None:
    """Sum tensors of one type over all processes, in place and in one call."""
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
