"""Products of TensorFloat-32 for the tangent: on a GPU by its units, on a CPU emulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

DROPPED_BITS = 13
"""Float32 has 23 bits of mantissa, TensorFloat-32 has 10."""

aten = torch.ops.aten
OPERANDS: dict[Any, tuple[int, int]] = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}
"""Matrix product -> places of its two operands."""


@contextmanager
def tensor_float32(device_type: str) -> Iterator[None]:
    """Compute float32 matrix products within from operands of 10 bits of mantissa, with float32 sums.

    On "cuda" by the tensor cores; elsewhere emulated, slower than float32 and with attention as two products.
    """
    if device_type != "cuda":
        with sdpa_kernel(SDPBackend.MATH), Rounded():
            yield
        return
    options: Any = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(options, "fp32_precision") else ("allow_tf32", True)
    before = getattr(options, name)
    setattr(options, name, value)
    try:
        yield
    finally:
        setattr(options, name, before)


def rounded(x: Tensor) -> Tensor:
    """Round float32 to 10 bits of mantissa, to nearest, ties away from zero; other dtypes stay."""
    if x.dtype != torch.float32:
        return x
    half = 1 << (DROPPED_BITS - 1)
    return ((x.contiguous().view(torch.int32) + half) & -(1 << DROPPED_BITS)).view(torch.float32)


class Rounded(TorchDispatchMode):
    """Round the float32 operands of all matrix products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = OPERANDS.get(func.overloadpacket, ())
        args = tuple(rounded(a) if i in places else a for i, a in enumerate(args))
        return func(*args, **(kwargs or {}))
