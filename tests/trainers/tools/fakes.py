"""Tensors without memory that count the bytes they would take: a training step at its real size, on any machine."""

import weakref
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trainers.roles.frozen import FrozenLinear, FrozenOperations, storage_dtype_of
from unipic_core.model.layers import set_parameters
from unipic_core.model.mmdit import MMDiT


class Counted(TorchDispatchMode):
    """now: bytes of all storages alive that were made inside; peak: the most there were since `peak` was set."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, id(storage))

    def drop(self, key):
        self.now -= self.sizes.pop(key, 0)


@contextmanager
def fake():
    """Inside, tensors have no memory; peft moves nothing."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        Counted() as counted,
        mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self),
    ):
        yield counted


class LayerNorm(nn.LayerNorm):
    """As CUDA's autocast has it: in float32."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, None, None, self.eps)


class Operations(FrozenOperations):
    LayerNorm = LayerNorm


class PlainOperations(Operations):
    Linear = nn.Linear


def base(sizes, kind):
    """A frozen base as `load_frozen` leaves it, without numbers."""
    network = MMDiT(sizes, operations=Operations, device="meta", compute_dtype=torch.float32)
    for name, module in network.named_modules():
        if isinstance(module, FrozenLinear):
            module.reserve(storage_dtype_of(f"{name}.weight", (module.out_features, module.in_features), kind))
        else:
            set_parameters(module, lambda _, parameter: torch.empty(parameter.shape), requires_grad=False)
    return network
